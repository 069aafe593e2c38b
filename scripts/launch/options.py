"""From the command line, the shell's environment and a recipe's launch section to the options of a launch.

train.py and scripts.launch both come here. SETTINGS is the one table of keys, flags and variables.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from scripts.launch.commands import DEFAULT_HOSTFILE, LAUNCHERS, Options, accelerator_name
from scripts.launch.platforms import ROOT, MachineKind, did_you_mean, load_platforms, platform_named
from training.utils.flags.recipe import load_recipe, recipe_file, recipes_of


class Setting(NamedTuple):
    """A key of a recipe's launch section, with the launcher's flag and the environment variable that win over it."""

    type: type
    flag: str = ""
    help: str = ""
    variable: str = ""


SETTINGS = {
    "platform": Setting(str, "--platform", "another platform of configs/platforms.yaml than the recipe's"),
    "deployment_type": Setting(str),  # for train.py
    "processes": Setting(int, "--num-gpus", "processes on each node", "NUM_GPUS"),
    "num_nodes": Setting(int, "--num-nodes", "the first N hosts of the hostfile; torchrun: how many nodes there are"),
    "hostfile": Setting(str, "--hostfile", f"lines HOST slots=N (several nodes: {DEFAULT_HOSTFILE})"),
    "master_port": Setting(int, "--master-port", "port of the first node", "MASTER_PORT"),
    "master_addr": Setting(str, "--master-addr", "address of the first node", "MASTER_ADDR"),
    "launcher": Setting(str, "--launcher", f"{', '.join(LAUNCHERS)}; default: DeepSpeed's own, with pdsh for several nodes"),
    "launcher_args": Setting(str, "--launcher-args", "more words for pdsh, mpirun or srun, as one quoted string"),
    "no_ssh": Setting(bool, "--no-ssh", "the same command is started on every node"),
    "ssh_port": Setting(int, "--ssh-port", "where sshd listens on the other nodes"),
    "venv_script": Setting(str, "--venv-script", "file to source on the other nodes first, as /opt/dtk/env.sh"),
    "env": Setting(dict),
}
NOUNS = {str: "text", int: "a whole number", bool: "true or false", dict: "a list of NAME: value"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of SETTINGS to a parser."""
    for setting in SETTINGS.values():
        if setting.flag:
            kind = {"action": "store_true"} if setting.type is bool else {"type": setting.type}
            variable = f" ({setting.variable} in the environment)" if setting.variable else ""
            parser.add_argument(setting.flag, default=None, help=setting.help + variable, **kind)


def plain_parser(advice: str, **words: Any) -> argparse.ArgumentParser:
    """Return a parser that takes no abbreviations, raises UserError with ``advice``, and shows its description as it stands."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **words)

    def refuse(message: str) -> None:
        raise UserError(f"{message[:1].upper()}{message[1:]}; {advice}")

    parser.error = refuse
    return parser


def plain_words(argv: list[str], flags: Container[str], quoted: str) -> list[str]:
    """Return the words with dashes in the names of our flags, and each value joined to its flag where ``quoted`` matches.

    A flag of a step keeps its spelling. argparse would take the value "--offload" for a flag.
    """
    words: list[str] = []
    for word in argv:
        name, *value = word.split("=", 1)
        ours = name.replace("_", "-")
        if words and re.fullmatch(quoted, words[-1]):
            words[-1] += f"={word}"
        else:
            words.append("=".join([ours, *value]) if ours.startswith("--") and ours in flags else word)
    return words


def find_recipe(name: str, platform: str | None = None) -> Path:
    """Return the path of a recipe given as one, or as PLATFORM/MODEL under configs. Raise UserError that lists what exists.

    platform: for which to read a file that serves several, where its path names none of them.
    """
    if platform:
        platform_named(platform)
    for path in (Path(name), ROOT / name, ROOT / "configs" / f"{name}.yaml"):
        named = path.parent / str(platform) / path.name
        if path.is_file() and recipe_file(named):
            return named.resolve()
        if recipe_file(path):
            return path.resolve()
    platform, model = Path(name).parent.name, Path(name).name.removesuffix(".yaml")
    if platform in load_platforms():
        models = [path.stem for path in recipes_of(ROOT / "configs", platform)]
        near, known = did_you_mean(model, models), ", ".join(models) or "none"
        raise UserError(f"{name}: no recipe for {model!r} on {platform}{near}; there are {known}.")
    if (ROOT / "configs" / f"{model}.yaml").is_file() and not did_you_mean(platform, load_platforms()):
        raise UserError(
            f"recipe {name}: no platform {platform}; to add it, give it an entry in configs/platforms.yaml and one under "
            f"platforms: of configs/{model}.yaml."
        )
    raise UserError(
        f"recipe {name}: no such file{did_you_mean(platform, load_platforms())}; those of the project are "
        f"configs/PLATFORM/MODEL.yaml, with the platforms {', '.join(load_platforms())}."
    )


def read_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a recipe. Raise UserError for a wrong launch section; the steps check their own."""
    recipe = load_recipe(str(path))
    for key, value in recipe.get("launch", {}).items():
        if key not in SETTINGS:
            near = did_you_mean(key, SETTINGS)
            raise UserError(f"{path}, launch: unknown key {key!r}{near}; known: {', '.join(SETTINGS)}.")
        wanted = SETTINGS[key].type
        if value is not None and not isinstance(value, wanted):
            raise UserError(f"{path}, launch: {key}: {value!r} is not {NOUNS[wanted]}; correct the value.")
    return recipe


def build_options(
    platform: MachineKind,
    given: argparse.Namespace,
    launch: Mapping[str, Any],
    environ: Mapping[str, str],
    processes: int | None,
) -> Options:
    """Return the options: command line before environment before recipe.

    processes: on each node, where neither of the three nor a hostfile says it.
    """
    values = {}
    for key, setting in SETTINGS.items():
        value = getattr(given, setting.flag[2:].replace("-", "_"), None)
        if value is None and environ.get(setting.variable):
            value = environ[setting.variable]
            value = number(setting.variable, value) if setting.type is int else value
        values[key] = launch.get(key) if value is None else value
    allocated = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES")
    if values["launcher"] == "slurm" and allocated and values["num_nodes"] is None:
        values |= {"num_nodes": number("SLURM_JOB_NUM_NODES", allocated), "hostfile": None}
    several = (values["num_nodes"] or platform.nodes) > 1
    if values["launcher"] != "slurm" and several and Path(DEFAULT_HOSTFILE).is_file():
        values["hostfile"] = values["hostfile"] or DEFAULT_HOSTFILE
    values |= {
        "platform": platform,
        "launcher_args": values["launcher_args"] or "",
        "no_ssh": bool(values["no_ssh"]),
        "node_rank": getattr(given, "node_rank", None),
        "env": {name: str(value) for name, value in (launch.get("env") or {}).items()},
    }
    del values["deployment_type"]
    options = Options(**values)
    if options.processes is None and not options.hosts:
        options.processes = processes
    return options


def options_of(
    given: argparse.Namespace, launch: dict[str, Any], path: str, environ: Mapping[str, str]
) -> Options:
    """Return the options of scripts.launch. Raise UserError where no platform is named, or not that of DS_ACCELERATOR."""
    name = given.platform or launch.get("platform")
    if name is None:
        raise UserError(f"{path}, launch: no platform is named; add platform: one of {', '.join(load_platforms())}.")
    platform = platform_named(name)
    accelerator = environ.get("DS_ACCELERATOR", "").lower()
    if accelerator and accelerator_name(accelerator) != platform.accelerator:
        raise UserError(
            f"DS_ACCELERATOR={accelerator} is set, but platform {name} ({platform.title}) runs on {platform.accelerator}; unset "
            f"it, or choose another recipe or --platform."
        )
    if name != launch.get("platform"):  # the recipe's numbers are those of its own platform
        launch = {key: value for key, value in launch.items() if key not in ("processes", "num_nodes")}
    return build_options(platform, given, launch, environ, platform.devices)


def number(name: str, text: str) -> int:
    """Return a whole number out of the environment. Raise UserError for anything else."""
    if not text.isdigit():
        raise UserError(f"{name}={text} in the environment is not a whole number; correct or unset it.")
    return int(text)


def check_words(options: Options, given: argparse.Namespace) -> None:
    """Raise UserError for a hostfile that is not there, and for flags of several nodes where there is one.

    Each node would train alone then, all of them the same. MASTER_ADDR in the environment and a recipe's no_ssh are left
    alone.
    """
    if options.hostfile and not Path(options.hostfile).is_file():
        raise UserError(f"--hostfile {options.hostfile}: no such file; write one line HOST slots=N for each node.")
    if options.several or options.launcher == "slurm":
        return
    no_ssh, address, rank = given.no_ssh, given.master_addr, given.node_rank
    if given.num_nodes == 1 or len(options.hosts) == 1:  # said so: a script for any number of nodes may give all its flags
        no_ssh, address, rank = None, None, rank or None
    here = (None, "127.0.0.1", "::1", "localhost")
    words = {f"--node_rank {rank}": rank is not None, "--no_ssh": no_ssh, f"--master_addr {address}": address not in here}
    for word, wrong in words.items():
        if wrong:
            raise UserError(
                f"{word} is for several nodes, and this is a run on one; give --num_nodes N or --hostfile FILE, or leave it out."
            )
