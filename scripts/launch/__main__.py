"""Start one step with a recipe on the machines that its platform describes; the launchers call it through launch.sh.

    python -m scripts.launch step1_sft configs/single_node/opt-1.3b.yaml [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
    python -m scripts.launch step3_ppo dcu_z100l/chatglm-6b ACTOR CRITIC [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags]

Flags that are not the launcher's go to the step and win over the recipe. What the step prints goes to the terminal and to
OUTPUT/training.log. Exit code: that of the step (2 for wrong input), 128 + signal for one that was killed; 1 for one that
ended without its sanbu_done.json, because DeepSpeed's launcher ends with 0 when its own child was killed.

Several nodes: from the first one by ssh (--hostfile, and pdsh or --launcher openmpi); or the same command on each node
(--no_ssh or --launcher torchrun, with --node_rank and --master_addr); or --launcher slurm inside an allocation.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import UserError, told
from scripts.launch.commands import (
    DEFAULT_HOSTFILE,
    DEFAULT_PORT,
    LAUNCHERS,
    Environment,
    Options,
    build_command,
    build_environment,
    check_one_node,
    master_address,
)
from scripts.launch.hostfile import is_loopback, resolved
from scripts.launch.platforms import ROOT, did_you_mean, load_platforms, platform_named
from training.utils.flags.recipe import load_recipe, recipe_file, recipes_of
from training.utils.flags.steps import STEPS as ARGUMENTS
from training.utils.run.environment import DONE, check_writable
from training.utils.run.metrics import format_seconds

STEPS = {"step1_sft": "sft", "step2_reward": "reward", "step2_dpo": "dpo", "step3_ppo": "ppo"}
TITLES = {step.section: step.title for step in ARGUMENTS}
POSITIONALS = dict.fromkeys(("sft", "reward", "dpo"), ("output_dir", "zero_stage")) | {
    "ppo": ("actor_model_name_or_path", "critic_model_name_or_path", "actor_zero_stage", "critic_zero_stage", "output_dir"),
}
# Keys of a recipe's launch section and what their values are.
LAUNCH_KEYS: dict[str, type] = {
    "platform": str, "deployment_type": str, "processes": int, "num_nodes": int, "hostfile": str, "master_port": int,
    "master_addr": str, "launcher": str, "launcher_args": str, "no_ssh": bool, "ssh_port": int, "venv_script": str, "env": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One step as it will be started."""

    title: str
    recipe: str
    flags: list[str]  # of the step
    options: Options
    command: list[str]
    environment: Environment
    output: Path

    @property
    def log(self) -> Path:
        """Where its output is kept; a file for each node, because they may share the folder."""
        own = "" if self.options.is_first_node else f"-node{self.options.node_rank}"
        return self.output / f"training{own}.log"


# --- what to start ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The launcher's own flags; all others are the step's."""
    parser = argparse.ArgumentParser(
        prog="scripts.launch", usage="python -m scripts.launch STEP RECIPE [positional …] [flags of launcher and step]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Flags of the step: python -m training.STEP.main --help",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print command and environment, start nothing")
    parser.add_argument("--platform", help="another platform of configs/platforms.yaml than the recipe's")
    parser.add_argument("--num-gpus", type=int, help="processes on each node (NUM_GPUS in the environment)")
    parser.add_argument("--num-nodes", type=int, help="the first N hosts of the hostfile; torchrun: how many nodes there are")
    parser.add_argument("--hostfile", help=f"lines HOST slots=N (several nodes: {DEFAULT_HOSTFILE})")
    parser.add_argument("--launcher", help=f"{', '.join(LAUNCHERS)}; default: DeepSpeed's own, with pdsh for several nodes")
    parser.add_argument("--launcher-args", help="more words for pdsh, mpirun or srun, as one quoted string")
    parser.add_argument("--no-ssh", action="store_true", default=None, help="the same command is started on every node")
    parser.add_argument("--node-rank", type=int, help="number of this node (NODE_RANK, SLURM_NODEID in the environment)")
    parser.add_argument("--master-addr", help="address of the first node (MASTER_ADDR in the environment)")
    parser.add_argument("--master-port", type=int, help="port of the first node (MASTER_PORT in the environment)")
    parser.add_argument("--ssh-port", type=int, help="where sshd listens on the other nodes")
    parser.add_argument("--venv-script", help="file to source on the other nodes first, as /opt/dtk/env.sh")

    def refuse(message: str) -> None:
        raise UserError(f"{message[:1].upper()}{message[1:]}; --help lists the launcher's flags.")

    parser.error = refuse
    return parser


def prepare(argv: list[str], environ: Mapping[str, str] = os.environ) -> tuple[Launch, bool]:
    """The launch that a command line describes, and whether it is only to be shown. UserError for what is wrong with it."""
    own = build_parser()
    spellings = set(own._option_string_actions)
    words = []
    for word in argv:  # --num_gpus is --num-gpus; flags of the step keep their spelling
        name, *value = word.split("=", 1)
        ours = name.replace("_", "-") in spellings
        words.append("=".join([name.replace("_", "-"), *value]) if word.startswith("--") and ours else word)
    leading = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    positional, words = words[:leading], words[leading:]
    args, step_flags = own.parse_known_args(joined_values(words))
    if len(positional) < 2:
        raise UserError("give a step and a recipe: python -m scripts.launch step1_sft configs/single_node/opt-1.3b.yaml")
    section = section_of(positional[0])
    path = find_recipe(positional[1])
    recipe = read_recipe(path)
    if section not in recipe:
        raise UserError(f"{path} has no section {section}, which {positional[0]} reads; add one.")
    options = options_of(args, recipe.get("launch", {}), str(path), environ)
    check_one_node(options, args.num_nodes, args.node_rank, args.no_ssh, args.master_addr)
    flags = [*positional_flags(section, positional[2:]), *step_flags]
    output = flag_value(flags, "output_dir", "check_points_path") or recipe[section].get("output_dir")
    if not output:
        raise UserError(f"{path}, section {section}, names no output_dir; add it, or give --output_dir.")
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    environment = build_environment(options, environ)
    flags = ["--config", shown, *flags]
    command = build_command(options, f"training.{positional[0]}.main", flags, environ)
    return Launch(TITLES[section], shown, flags, options, command, environment, Path(output)), args.dry_run


def joined_values(words: list[str]) -> list[str]:
    """``--launcher-args VALUE`` as one word: argparse would take a value that begins with a dash for a flag."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] == "--launcher-args":
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def section_of(step: str) -> str:
    """The recipe's section of a step. UserError that lists the steps."""
    if step not in STEPS:
        raise UserError(f"{step!r} is no step{did_you_mean(step, STEPS)}; there are {', '.join(STEPS)}.")
    return STEPS[step]


def find_recipe(name: str) -> Path:
    """Return the path of a recipe given as one, or as PLATFORM/MODEL under configs. Raise UserError that lists what exists."""
    for path in (Path(name), ROOT / name, ROOT / "configs" / f"{name}.yaml"):
        if recipe_file(path):
            return path.resolve()
    platform, model = Path(name).parent.name, Path(name).name.removesuffix(".yaml")
    if platform in load_platforms():
        models = [path.stem for path in recipes_of(ROOT / "configs", platform)]
        raise UserError(
            f"{name}: no recipe for {model!r} on {platform}{did_you_mean(model, models)}; there are {', '.join(models) or 'none'}."
        )
    raise UserError(
        f"recipe {name}: no such file{did_you_mean(platform, load_platforms())}; those of the project are "
        f"configs/PLATFORM/MODEL.yaml, with the platforms {', '.join(load_platforms())}."
    )


def read_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """The sections of a recipe with its launch section checked; the steps check their own. UserError."""
    recipe = load_recipe(str(path))
    for key, value in recipe.get("launch", {}).items():
        if key not in LAUNCH_KEYS:
            near = did_you_mean(key, LAUNCH_KEYS)
            raise UserError(f"{path}, launch: unknown key {key!r}{near}; known: {', '.join(LAUNCH_KEYS)}.")
        wanted = LAUNCH_KEYS[key]
        if value is not None and not isinstance(value, wanted):
            raise UserError(f"{path}, launch: {key}: {value!r} is not {NOUNS[wanted]}; correct the value.")
    return recipe


NOUNS = {str: "text", int: "a whole number", bool: "true or false", dict: "a list of NAME: value"}


def options_of(args: argparse.Namespace, launch: dict[str, Any], path: str, environ: Mapping[str, str]) -> Options:
    """Where the processes run: command line before environment before recipe before platform."""
    name = args.platform or launch.get("platform")
    if name is None:
        raise UserError(f"{path}, launch: no platform is named; add platform: one of {', '.join(load_platforms())}.")
    platform = platform_named(name)
    accelerator = environ.get("DS_ACCELERATOR", "").lower()
    if accelerator and {"dcu": "cuda"}.get(accelerator, accelerator) != platform.accelerator:
        raise UserError(
            f"DS_ACCELERATOR={accelerator} is set, but platform {name} ({platform.title}) runs on {platform.accelerator}; unset "
            f"it, or choose another recipe or --platform."
        )
    moved = args.platform not in (None, launch.get("platform"))  # the recipe's numbers are those of its own platform

    def pick(key: str, flag: str | None = None, variable: str | None = None) -> Any:
        given = getattr(args, flag or key, None)
        if given is None and variable and environ.get(variable):
            given = number(variable, environ[variable]) if LAUNCH_KEYS[key] is int else environ[variable]
        return launch.get(key) if given is None and not (moved and key in ("processes", "num_nodes")) else given

    processes = pick("processes", "num_gpus", "NUM_GPUS")
    hostfile = pick("hostfile")
    if hostfile and not Path(hostfile).is_file():
        raise UserError(f"--hostfile {hostfile}: no such file; write one line HOST slots=N for each node.")
    launcher, num_nodes = pick("launcher"), pick("num_nodes")
    allocated = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES")
    if launcher == "slurm" and allocated and num_nodes is None:
        num_nodes, hostfile = number("SLURM_JOB_NUM_NODES", allocated), None
    for flag, value in (("--num-gpus", processes), ("--num-nodes", num_nodes)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} is not a number of them; give 1 or more.")
    master_port, ssh_port = pick("master_port", variable="MASTER_PORT"), pick("ssh_port")
    for flag, value in (("--master_port", master_port), ("--ssh_port", ssh_port)):
        if value is not None and not 0 < value < 65536:
            raise UserError(f"{flag} {value} is no port; give a number from 1 to 65535.")
    launcher_args = pick("launcher_args") or ""
    try:
        shlex.split(launcher_args)
    except ValueError as error:
        raise UserError(f"--launcher_args {launcher_args!r} is not read by a shell: {str(error).lower()}; correct it.") from error
    if launcher != "slurm" and not hostfile and (num_nodes or platform.nodes) > 1 and Path(DEFAULT_HOSTFILE).is_file():
        hostfile = DEFAULT_HOSTFILE
    options = Options(
        platform, processes, num_nodes, hostfile, launcher, launcher_args, bool(pick("no_ssh")), args.node_rank,
        pick("master_addr", variable="MASTER_ADDR"), master_port, ssh_port, pick("venv_script"),
        env={name: str(value) for name, value in (launch.get("env") or {}).items()},
    )  # fmt: skip
    if options.processes is None and not options.hosts:
        options.processes = platform.devices
    return options


def number(name: str, text: str) -> int:
    """A whole number out of the environment, or a UserError."""
    if not text.isdigit():
        raise UserError(f"{name}={text} in the environment is not a whole number; correct or unset it.")
    return int(text)


def positional_flags(section: str, values: list[str]) -> list[str]:
    """Positional arguments as earlier launchers had them; an empty one leaves the recipe's value."""
    names = POSITIONALS[section]
    if len(values) > len(names):
        raise UserError(
            f"{values[len(names)]!r} is one argument too many; in order they are {', '.join(names)}, then flags with --."
        )
    flags = []
    for name, value in zip(names, values, strict=False):
        if name.endswith("zero_stage") and not re.fullmatch(r"[0-3]|auto|", value):
            raise UserError(f"{value!r} stands where {name} does, a number from 0 to 3; in order they are {', '.join(names)}.")
        if not name.endswith("zero_stage") and re.fullmatch(r"[0-3]", value):
            raise UserError(f"{value!r} stands where {name} does, a folder; in order they are {', '.join(names)}.")
        flags += [f"--{name}", value] if value else []
    return flags


def flag_value(flags: list[str], *names: str) -> str | None:
    """The value of a flag under any of its names that wins: the last one."""
    found = None
    for word, following in zip(flags, [*flags[1:], ""], strict=False):
        spelling, *value = word.split("=", 1)
        if spelling.startswith("--") and spelling[2:].replace("-", "_") in names:
            found = value[0] if value else following
    return found


# --- show -------------------------------------------------------------------------------------------------------------


def shown(launch: Launch) -> str:
    """What would be started, as text that a shell reads: variables with their reasons, then the command."""
    options, environment = launch.options, launch.environment
    lines = [f"# {launch.title}, {launch.recipe}", f"# platform {options.platform.name}: {options.platform.title}"]
    lines += [f"# output and log: {launch.log}", ""]
    settings = [(f"export {name}={shlex.quote(value)}", environment.reasons[name]) for name, value in environment.variables.items()]
    settings += [(f"unset {name}", "the same choice stands in --include below") for name in environment.removed]
    if environment.forwarded:
        path = shlex.quote(str(env_file(launch.output)))
        settings.append((f"export DS_ENV_FILE={path}", "what the other nodes are told; see below"))
    width = min(max(len(text) for text, _ in settings), 52)
    lines += [f"{text:{width}}  # {reason}" for text, reason in settings]
    if environment.forwarded:
        lines += ["", f"# {env_file(launch.output)} will be written with"]
        lines += [f"#     {name}={value}" for name, value in environment.forwarded.items()]
    if options.several and (options.no_ssh or options.launcher == "torchrun"):
        lines += ["", f"# on node {options.node_rank} of {options.nodes}; the others are started alike, with their --node_rank"]
    return "\n".join([*lines, "", wrapped(launch.command)])


def wrapped(command: list[str]) -> str:
    """A command with one flag a line."""
    lines: list[list[str]] = [[]]
    for index, word in enumerate(command):
        if (word.startswith("--") or (word == "-m" and index > 2)) and lines[-1]:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n    ".join(" ".join(words) for words in lines)


# --- start ------------------------------------------------------------------------------------------------------------


def check_flags(launch: Launch) -> Launch:
    """The step's own check of its flags and recipe: one UserError here instead of one from each process in half a minute.

    Returns the launch with the output folder as the step reads it.
    """
    from training.utils.flags.parse import parse

    logger = logging.getLogger("sanbu")
    before, logger.level = logger.level, logging.ERROR  # what replaces a former flag is said by the step itself
    try:
        args = parse(next(one for one in ARGUMENTS if one.title == launch.title), launch.flags)
    finally:
        logger.level = before
    return replace(launch, output=Path(args.output_dir))


def check_machine(options: Options) -> None:
    """UserError for what would end the run at its start: too few devices, a taken port, a launcher that is not there."""
    tools = {"openmpi": ("mpirun", "ompi_info"), "slurm": ("srun",)}.get(options.launcher or "", ("pdsh", "ssh"))
    if options.by_ssh or options.launcher == "slurm":
        for tool in tools:
            if shutil.which(tool) is None:
                raise UserError(f"{tool} is not installed here; install it, or use --launcher torchrun or --no_ssh.")
    elif options.several and options.no_ssh and not options.hosts:
        raise UserError("--no_ssh needs --hostfile, with a line NAME slots=N for each node; the names need not be reachable.")
    check_deepspeed(options)
    if options.by_ssh and not options.hosts:
        raise UserError(f"several nodes need --hostfile with lines HOST slots=N; there is no {DEFAULT_HOSTFILE}.")
    if options.launcher != "slurm" and options.platform.accelerator != "cpu" and not options.by_ssh:
        check_devices(options)
    if options.by_ssh:
        check_address(options)
    elif not options.is_first_node:
        check_first_node(options)
    if options.master_port and options.is_first_node and options.launcher != "slurm":
        check_port(options)


def check_deepspeed(options: Options) -> None:
    """UserError for flags that the installed DeepSpeed's launcher does not know yet (0.14.2 has neither of these)."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        raise UserError(f"DeepSpeed is not installed for {sys.executable}: pip install -r requirements.txt, or set PYTHON.")
    known = (Path(found.origin).parent / "launcher" / "runner.py").read_text(encoding="utf-8")
    for flag, given in (("--no_ssh", options.no_ssh), ("--venv_script", options.venv_script)):
        if given and f'"{flag}"' not in known:
            raise UserError(f"the installed DeepSpeed's launcher has no {flag}; use --launcher torchrun, or a newer DeepSpeed.")


def check_devices(options: Options) -> None:
    """UserError unless the devices of this machine are the platform's kind, and enough."""
    from models.device import detect_platform, device_count

    found = detect_platform()
    wanted = options.platform
    if found.torch_device != wanted.accelerator:
        raise UserError(
            f"platform {wanted.name} ({wanted.title}) needs {wanted.accelerator}, but torch finds {found.name} here; check the "
            "driver and the torch build, or choose another recipe or --platform."
        )
    processes, count = options.processes or 1, device_count()
    if processes > count:
        raise UserError(
            f"the recipe wants {processes} devices, this machine shows {count}; give --num_gpus {count} (then raise "
            "--gradient_accumulation_steps, so that the global batch stays), or show more."
        )


def check_address(options: Options) -> None:
    """UserError if the other nodes cannot know the first one by the address they will be given."""
    address = options.master_addr or next(iter(options.hosts))
    try:
        found = resolved(address)[1]
    except OSError as error:
        raise UserError(f"the address of the first node, {address}, does not resolve; give --master_addr with its IP.") from error
    if is_loopback(found) and not options.master_addr:
        raise UserError(
            f"{address} resolves to {found} here, which the other nodes cannot reach; give --master_addr with the IP they see."
        )


def check_first_node(options: Options, patience: float = 60.0) -> None:
    """UserError if there is no way to the first node: its name means nothing, or no route leads there.

    Nobody needs to listen yet. patience: seconds in which a cluster may still make the name known.
    """
    address, port = master_address(options, os.environ), options.master_port or DEFAULT_PORT
    ends = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                if time.monotonic() < ends:
                    time.sleep(2)
                    continue
                raise UserError(
                    f"--master_addr {address}: {error.strerror} from {socket.gethostname()}, node {options.node_rank}; give the "
                    "address of the first node as this one reaches it (ip route get ADDRESS shows the way)."
                ) from error
        return


def check_port(options: Options) -> None:
    """UserError if another program listens on the port that was asked for."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", options.master_port))
        except OSError as error:
            raise UserError(
                f"--master_port {options.master_port}: {error.strerror.lower()}; another run may use it, so give another port."
            ) from error


def env_file(output: Path) -> Path:
    """What DS_ENV_FILE names: the variables of the other nodes, in the step's own folder."""
    return (output / "deepspeed_env").resolve()


def passed_on(environment: Environment, output: Path) -> dict[str, str]:
    """The environment of the command; what other nodes are told is written to env_file, for DeepSpeed to read."""
    env = environment.over(os.environ)
    if environment.forwarded:
        lines = [f"{name}={value}\n" for name, value in environment.forwarded.items()]
        env_file(output).write_text("".join(lines), encoding="utf-8")
        env["DS_ENV_FILE"] = str(env_file(output))
    return env


def start(launch: Launch) -> int:
    """Run the step to its end; returns its exit code."""
    from scripts.launch.processes import exit_code, explain, run_step, say

    launch = check_flags(launch)
    check_machine(launch.options)
    check_writable(launch.output)
    env = passed_on(launch.environment, launch.output)
    done = launch.output / DONE
    if not launch.options.is_first_node:  # the first process of this node leaves a mark of its own
        done = launch.output / f".done-node{launch.options.node_rank}"
        env["SANBU_NODE_DONE"] = str(done)
    done.unlink(missing_ok=True)
    say(wrapped(launch.command))
    started = time.monotonic()
    code, lines = run_step(launch.command, env, launch.log)
    code = exit_code(code, lines)
    seconds = time.monotonic() - started
    if code != 0 or not done.is_file():
        say(explain(launch.title, code, lines, seconds, launch.log), stream=sys.stderr)
        return code or 1
    if not launch.options.is_first_node:
        done.unlink()
    say(f"{launch.title} took {format_seconds(seconds)}: {launch.output}")
    return 0


@told
def main(argv: list[str] | None = None) -> int:
    """Start or show one step; returns the exit code."""
    from scripts.launch.processes import Interrupted, say

    try:
        launch, dry_run = prepare(sys.argv[1:] if argv is None else argv)
        if dry_run:
            say(shown(launch))
            return 0
        return start(launch)
    except Interrupted as stop:
        say("\nstopped; the same command with --resume continues from the newest checkpoint.", stream=sys.stderr)
        return 128 + stop.args[0]


if __name__ == "__main__":
    sys.exit(main())
