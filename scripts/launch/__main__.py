"""Start one step with a recipe on the machines that its platform describes; the launchers call it through launch.sh.

    python -m scripts.launch step1_sft configs/single_node/opt-1.3b.yaml [OUTPUT] [ZERO_STAGE] [flags] [--dry-run]
    python -m scripts.launch step3_ppo dcu_z100l/chatglm-6b ACTOR CRITIC [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [flags]

Flags that are not the launcher's go to the step and win over the recipe. What the step prints goes to the terminal and to
OUTPUT/training.log. Exit code: that of the step (2 for wrong input), 128 + signal for one that was killed; 1 for one that
ended without its sanbu_done.json, because DeepSpeed's launcher ends with 0 when its own child was killed.

Several nodes: from the first one by ssh (--hostfile, and pdsh or --launcher openmpi); or the same command on each node
(--no_ssh or --launcher torchrun, with --node_rank and --master_addr); or --launcher slurm inside an allocation.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from errors import CommandLine, UserError, in_language, refuse, told, without_secrets
from scripts.launch.checks import check_inputs, check_machine, check_several, step_arguments
from scripts.launch.commands import SECRET, Environment, build_command, build_environment
from scripts.launch.options import Options, add_flags, find_recipe, options_of, plain_words, read_recipe
from scripts.launch.platforms import did_you_mean
from scripts.launch.processes import run_to_end, say, stoppable
from steps import STEPS, Step
from training.utils.run.environment import DONE, check_writable
from training.utils.run.metrics import format_seconds

CHINESE = """用配方在其平台所描述的机器上启动一个步骤；各启动脚本经 launch.sh 调用它。

    python -m scripts.launch step1_sft configs/single_node/opt-1.3b.yaml [OUTPUT] [ZERO_STAGE] [参数] [--dry-run]
    python -m scripts.launch step3_ppo dcu_z100l/chatglm-6b ACTOR CRITIC [ACTOR_ZERO] [CRITIC_ZERO] [OUTPUT] [参数]

不属于启动器的参数传给步骤，并优先于配方。步骤的输出显示在终端，并写入 OUTPUT/training.log。退出码：步骤的退出码（输入有误为 2）；
被信号终止为 128 + 信号；没有留下 sanbu_done.json 便结束为 1，因为 DeepSpeed 的启动器在子进程被杀时也以 0 结束。

多个节点：从第一个节点经 ssh 启动（--hostfile，以及 pdsh 或 --launcher openmpi）；或在每个节点运行同一命令（--no_ssh 或
--launcher torchrun，另给 --node_rank 和 --master_addr）；或在 Slurm 的作业中用 --launcher slurm。
"""
ROOMS = {step.room: step for step in STEPS}  # the word on the command line
POSITIONALS = ("output_dir", "zero_stage")
POSITIONALS_PPO = (
    "actor_model_name_or_path",
    "critic_model_name_or_path",
    "actor_zero_stage",
    "critic_zero_stage",
    "output_dir",
)


@dataclass(frozen=True)
class Launch:
    """One step as it will be started."""

    step: Step
    recipe: str
    args: Any  # of the step
    options: Options
    command: list[str]
    environment: Environment

    @property
    def output(self) -> Path:
        """Return the folder that the step writes to."""
        return Path(self.args.output_dir)

    @property
    def log(self) -> Path:
        """Return the file for what it prints; one for each node, because they may share the folder."""
        own = "" if self.options.is_first_node else f"-node{self.options.node_rank}"
        return self.output / f"training{own}.log"


# --- what to start ----------------------------------------------------------------------------------------------------


def build_parser() -> CommandLine:
    """Build the parser of the launcher's own flags; all others are the step's."""
    parser = CommandLine(
        "--help lists the launcher's flags.",
        prog="scripts.launch",
        usage="python -m scripts.launch STEP RECIPE [positional …] [flags of launcher and step]",
        description=__doc__,
        zh=CHINESE,
        epilog=in_language("Flags of the step:", "步骤的参数：") + " python -m training.STEP.main --help",
    )
    parser.add_argument("--dry-run", action="store_true", help="print command and environment, start nothing",
        zh="打印命令和环境变量，不启动")
    parser.add_argument("--node-rank", type=int, help="number of this node (NODE_RANK, SLURM_NODEID in the environment)",
        zh="本节点的编号（环境变量 NODE_RANK、SLURM_NODEID）")
    add_flags(parser)
    return parser


def prepare(argv: list[str], environ: Mapping[str, str] = os.environ) -> tuple[Launch, bool]:
    """Return the launch that a command line describes, and whether it is only to be shown. Raise UserError."""
    own = build_parser()
    words = plain_words(argv, own.flags, "--launcher-args")
    leading = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    given, step_flags = own.parse_known_args(words[leading:])
    if leading < 2:
        raise UserError("give a step and a recipe: python -m scripts.launch step1_sft configs/single_node/opt-1.3b.yaml")
    room, name, *positional = words[:leading]
    if room not in ROOMS:
        raise UserError(f"{room!r} is no step{did_you_mean(room, ROOMS)}; there are {', '.join(ROOMS)}.")
    step, path = ROOMS[room], find_recipe(name, given.platform)
    options = options_of(given, read_recipe(path).get("launch", {}), str(path), environ)
    check_several(options, given)
    recipe = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    flags = ["--config", recipe, *positional_flags(step, positional), *step_flags]
    args, environment = step_arguments(step, flags), build_environment(options, environ)
    command = build_command(options, step.module, flags, environ)
    return Launch(step, recipe, args, options, command, environment), given.dry_run


def positional_flags(step: Step, values: list[str]) -> list[str]:
    """Return the flags for positional arguments as earlier launchers had them; an empty one leaves the recipe's value."""
    names = POSITIONALS_PPO if step.section == "ppo" else POSITIONALS
    order = f"in order they are {', '.join(names)}"
    if len(values) > len(names):
        raise UserError(f"{values[len(names)]!r} is one argument too many; {order}, then flags with --.")
    flags = []
    for name, value in zip(names, values, strict=False):
        stage = name.endswith("zero_stage")
        wanted = "a number from 0 to 3" if stage else "a folder"
        wrong = not re.fullmatch(r"[0-3]|auto|", value) if stage else re.fullmatch(r"[0-3]", value)
        refuse(wrong, f"{value!r} stands where {name} does, {wanted}; {order}.")
        flags += [f"--{name}", value] if value else []
    return flags


# --- show -------------------------------------------------------------------------------------------------------------


def shown(launch: Launch) -> str:
    """Return what would be started, as text that a shell reads: variables with their reasons, then the command."""
    options, environment = launch.options, launch.environment
    lines = [f"# {launch.args.title}, {launch.recipe}", f"# platform {options.platform.name}: {options.platform.title}"]
    lines += [f"# output and log: {launch.log}", ""]
    values = {name: masked(name, value) for name, value in environment.variables.items()}
    settings = {f"export {name}={shlex.quote(value)}": environment.reasons[name] for name, value in values.items()}
    settings |= {f"unset {name}": "the same choice stands in --include below" for name in environment.removed}
    file = env_file(launch.output)
    if environment.forwarded:
        settings[f"export DS_ENV_FILE={shlex.quote(str(file))}"] = "what the other nodes are told; see below"
    width = min(max(map(len, settings)), 52)
    lines += [f"{text:{width}}  # {reason}" for text, reason in settings.items()]
    if environment.forwarded:
        lines += ["", f"# {file} will be written with"]
        lines += [f"#     {name}={masked(name, value)}" for name, value in environment.forwarded.items()]
    if options.several and (options.no_ssh or options.launcher == "torchrun"):
        lines += ["", f"# on node {options.node_rank} of {options.nodes}; the others are started alike, with their --node_rank"]
    return "\n".join([*lines, "", without_secrets(wrapped(launch.command))])


def masked(name: str, value: str) -> str:
    """Return a variable's value for the terminal: *** for a secret."""
    return "***" if SECRET.search(name) else without_secrets(value)


def wrapped(command: list[str]) -> str:
    """Return a command with one flag a line."""
    text = ""
    for index, word in enumerate(command):
        new = word.startswith("--") or (word == "-m" and index > 2)
        text += (" \\\n    " if new else " ") + shlex.quote(word)
    return text[1:]


# --- start ------------------------------------------------------------------------------------------------------------


def env_file(output: Path) -> Path:
    """Return the path for DS_ENV_FILE: the variables of the other nodes, in the step's own folder."""
    return (output / "deepspeed_env").resolve()


def passed_on(environment: Environment, output: Path) -> dict[str, str]:
    """Return the environment of the command. Write what other nodes are told to env_file, for DeepSpeed to read."""
    env = environment.over(os.environ)
    if environment.forwarded:
        lines = [f"{name}={value}\n" for name, value in environment.forwarded.items()]
        env_file(output).unlink(missing_ok=True)  # perhaps one that everybody may read
        with open(env_file(output), "x", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
            file.writelines(lines)
        env["DS_ENV_FILE"] = str(env_file(output))
    return env


def start(launch: Launch) -> int:
    """Run the step to its end; return its exit code."""
    check_inputs(launch.args)
    check_writable(launch.output)
    check_machine(launch.options)
    env, done = passed_on(launch.environment, launch.output), launch.output / DONE
    if not launch.options.is_first_node:  # the first process of this node leaves a mark of its own
        done = launch.output / f".done-node{launch.options.node_rank}"
        env["SANBU_NODE_DONE"] = str(done)
    say(without_secrets(wrapped(launch.command)))
    code, seconds = run_to_end(launch.args.title, launch.command, env, launch.log, done)
    if code == 0:
        if not launch.options.is_first_node:
            done.unlink()
        say(f"{launch.args.title} took {format_seconds(seconds)}: {launch.output}")
    return code


@told
def main(argv: list[str] | None = None) -> int:
    """Start or show one step; return the exit code."""
    launch, dry_run = prepare(sys.argv[1:] if argv is None else argv)
    if dry_run:
        say(shown(launch))
        return 0
    return stoppable(start)(launch)


if __name__ == "__main__":
    sys.exit(main())
