"""From the command line, the shell's environment and a recipe's launch section to the options of a launch.

train.py and scripts.launch both come here. The fields of Options are the one table of keys, flags and variables.
"""

import argparse
import re
import shlex
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_type_hints

from errors import CommandLine, UserError, refuse
from scripts.launch.hostfile import is_this_machine, read_hostfile
from scripts.launch.platforms import ROOT, MachineKind, did_you_mean, load_platforms, platform_named
from training.utils.flags.recipe import load_recipe, recipe_file, recipes_of

LAUNCHERS = ("pdsh", "openmpi", "torchrun", "slurm")
DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's own
DEFAULT_PORT = 29500  # several nodes must agree on one; a single node takes any that is free


NOUNS = {str: "text", int: "a whole number", bool: "true or false", dict: "a list of NAME: value"}


def setting(help: str, zh: str, variable: str = "") -> Any:
    """Return a field of Options. help, zh: of its flag, in both languages. variable: of the environment, with that meaning."""
    return field(default=None, metadata={"help": help, "zh": zh, "variable": variable})


@dataclass
class Options:
    """Places and ways of starting processes: the keys of a recipe's launch section, and what follows from them."""

    platform: MachineKind
    processes: int | None = setting("processes on each node", "每个节点的进程数", "NUM_GPUS")  # None: every device
    num_nodes: int | None = setting(
        "the first N hosts of the hostfile; torchrun: how many nodes there are", "hostfile 的前 N 台主机；torchrun：节点总数"
    )
    hostfile: str | None = setting(
        f"lines HOST slots=N (several nodes: {DEFAULT_HOSTFILE})", f"若干行 HOST slots=N（多节点缺省：{DEFAULT_HOSTFILE}）"
    )
    master_port: int | None = setting("port of the first node", "第一个节点的端口", "MASTER_PORT")
    master_addr: str | None = setting("address of the first node", "第一个节点的地址", "MASTER_ADDR")
    launcher: str | None = setting(
        f"{', '.join(LAUNCHERS)}; default: DeepSpeed's own, with pdsh for several nodes",
        f"{'、'.join(LAUNCHERS)}；缺省：DeepSpeed 自己的启动器，多节点时用 pdsh",
    )
    launcher_args: str | None = setting(
        "more words for pdsh, mpirun or srun, as one quoted string", "传给 pdsh、mpirun 或 srun 的更多参数，写成一个带引号的字符串"
    )
    no_ssh: bool | None = setting("the same command is started on every node", "每个节点都已启动同一命令")
    ssh_port: int | None = setting("where sshd listens on the other nodes", "其他节点上 sshd 的端口")
    venv_script: str | None = setting(
        "file to source on the other nodes first, as /opt/dtk/env.sh", "其他节点先 source 的文件，例如 /opt/dtk/env.sh"
    )
    env: dict | None = field(default=None, metadata={"help": "", "zh": "", "variable": ""})
    node_rank: int | None = None
    hosts: dict[str, int] = field(default_factory=dict)  # what the hostfile says, empty where there is none

    def __post_init__(self) -> None:
        """Read the hostfile. Raise UserError for a value that no machine has."""
        near, known = did_you_mean(str(self.launcher), LAUNCHERS), ", ".join(LAUNCHERS)
        refuse(
            self.launcher not in (None, *LAUNCHERS),
            f"--launcher {self.launcher} is unknown{near}; use {known}, or none of them: pdsh for several nodes.",
        )
        for flag, count in (("--num-gpus", self.processes), ("--num-nodes", self.num_nodes)):
            refuse(count is not None and count < 1, f"{flag} {count} is not a number of them; give 1 or more.")
        for flag, port in (("--master_port", self.master_port), ("--ssh_port", self.ssh_port)):
            refuse(port not in (None, *range(1, 65536)), f"{flag} {port} is no port; give a number from 1 to 65535.")
        split_words("--launcher_args", self.launcher_args or "")
        self.env = {name: str(value) for name, value in (self.env or {}).items()}
        if self.hostfile and Path(self.hostfile).is_file():
            self.hosts = read_hostfile(self.hostfile)
            more = (self.num_nodes or 0) > len(self.hosts)
            refuse(more, f"--num_nodes {self.num_nodes}, but {self.hostfile} names {len(self.hosts)} hosts; add some.")
            self.hosts = dict(islice(self.hosts.items(), self.num_nodes))
            if self.processes is None and len(self.hosts) == 1:
                self.processes = next(iter(self.hosts.values()))  # else every device of this machine would be used
        for host, slots in self.hosts.items():
            refuse(
                (self.processes or 0) > slots,
                f"{self.processes} processes a node are wanted, but {self.hostfile} gives {host} slots={slots}; give "
                f"--num_gpus {slots} or correct the line.",
            )

    @property
    def nodes(self) -> int:
        """Return the number of nodes that take part."""
        return len(self.hosts) or self.num_nodes or self.platform.nodes

    @property
    def several(self) -> bool:
        """Return True where more than one node takes part, or one that is not this machine."""
        return self.nodes > 1 or self.elsewhere

    @property
    def elsewhere(self) -> bool:
        """Return True where the hostfile names one host, and it is to be reached by ssh."""
        here = self.no_ssh or self.launcher not in (None, "pdsh", "openmpi")  # the command was started on that host
        return len(self.hosts) == 1 and not here and not is_this_machine(*self.hosts)

    @property
    def by_ssh(self) -> bool:
        """Return True where this machine starts the processes of the other nodes: their environment travels with the command."""
        return self.several and not self.no_ssh and self.launcher in (None, "pdsh", "openmpi")

    @property
    def is_first_node(self) -> bool:
        """Return True where the process with rank 0 runs under this command."""
        return not self.node_rank or self.by_ssh or self.launcher == "slurm"


SETTINGS = {one.name: one.metadata for one in fields(Options) if one.metadata}
TYPES = {name: get_args(hint)[0] for name, hint in get_type_hints(Options).items() if name in SETTINGS}
TYPES = {"platform": str, "deployment_type": str} | TYPES  # deployment_type: for train.py


# --- command lines ----------------------------------------------------------------------------------------------------


def flag_name(key: str) -> str:
    """Return the flag of a key of the launch section, as argparse names it."""
    return "num_gpus" if key == "processes" else key


def add_flags(parser: CommandLine) -> None:
    """Add the launchers' flags to a parser."""
    other, zh = "another platform of configs/platforms.yaml than the recipe's", "configs/platforms.yaml 中的另一平台，代替配方的"
    parser.add_argument("--platform", help=other, zh=zh)
    for key, words in SETTINGS.items():
        kind = {"action": "store_true"} if TYPES[key] is bool else {"type": TYPES[key]}
        name = words["variable"]
        variable, zh = (f" ({name} in the environment)", f"（环境变量 {name}）") if name else ("", "")
        if words["help"]:
            flag = f"--{flag_name(key).replace('_', '-')}"
            parser.add_argument(flag, default=None, help=words["help"] + variable, zh=words["zh"] + zh, **kind)


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


def split_words(flag: str, text: str) -> list[str]:
    """Return the words of a quoted string as a shell reads them. Raise UserError for an open quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag} cannot be read ({error}); check its quotes.") from error


# --- recipes ----------------------------------------------------------------------------------------------------------


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
    near, platforms = did_you_mean(platform, load_platforms()), ", ".join(load_platforms())
    if platform in load_platforms():
        models = [path.stem for path in recipes_of(ROOT / "configs", platform)]
        known = f"{did_you_mean(model, models)}; there are {', '.join(models) or 'none'}"
        raise UserError(f"{name}: no recipe for {model!r} on {platform}{known}.")
    refuse(
        not near and (ROOT / "configs" / f"{model}.yaml").is_file(),
        f"recipe {name}: no platform {platform}; to add it, give it an entry in configs/platforms.yaml and one under "
        f"platforms: of configs/{model}.yaml.",
    )
    raise UserError(
        f"recipe {name}: no such file{near}; those of the project are configs/PLATFORM/MODEL.yaml, with the platforms {platforms}."
    )


def read_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """Return the sections of a recipe. Raise UserError for a wrong launch section; the steps check their own."""
    recipe = load_recipe(str(path))
    for key, value in recipe.get("launch", {}).items():
        near, known = did_you_mean(key, TYPES), ", ".join(TYPES)
        refuse(key not in TYPES, f"{path}, launch: unknown key {key!r}{near}; known: {known}.")
        wrong = value is not None and not isinstance(value, TYPES[key])
        refuse(wrong, f"{path}, launch: {key}: {value!r} is not {NOUNS[TYPES[key]]}; correct the value.")
    return recipe


# --- options ----------------------------------------------------------------------------------------------------------


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
    for key, words in SETTINGS.items():
        value = getattr(given, flag_name(key), None)
        if value is None and environ.get(words["variable"]):
            value = environ[words["variable"]]
            value = number(words["variable"], value) if TYPES[key] is int else value
        values[key] = launch.get(key) if value is None else value
    allocated = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES")
    if values["launcher"] == "slurm" and allocated and values["num_nodes"] is None:
        values |= {"num_nodes": number("SLURM_JOB_NUM_NODES", allocated), "hostfile": None}
    several = (values["num_nodes"] or platform.nodes) > 1
    if values["launcher"] != "slurm" and several and Path(DEFAULT_HOSTFILE).is_file():
        values["hostfile"] = values["hostfile"] or DEFAULT_HOSTFILE
    options = Options(platform, **values, node_rank=getattr(given, "node_rank", None))
    if options.processes is None and not options.hosts:
        options.processes = processes
    return options


def options_of(given: argparse.Namespace, launch: dict[str, Any], path: str, environ: Mapping[str, str]) -> Options:
    """Return the options of scripts.launch. Raise UserError where no platform is named, or not that of DS_ACCELERATOR."""
    name = given.platform or launch.get("platform")
    known = ", ".join(load_platforms())
    refuse(name is None, f"{path}, launch: no platform is named; add platform: one of {known}.")
    platform = platform_named(name)
    accelerator = environ.get("DS_ACCELERATOR", "").lower()
    refuse(
        accelerator and accelerator_name(accelerator) != platform.accelerator,
        f"DS_ACCELERATOR={accelerator} is set, but platform {name} ({platform.title}) runs on {platform.accelerator}; unset "
        "it, or choose another recipe or --platform.",
    )
    if name != launch.get("platform"):  # the recipe's numbers are those of its own platform
        launch = {key: value for key, value in launch.items() if key not in ("processes", "num_nodes")}
    return build_options(platform, given, launch, environ, platform.devices)


def accelerator_name(word: str) -> str:
    """Return DeepSpeed's name of a device: it calls a DCU cuda."""
    return {"dcu": "cuda"}.get(word.lower(), word.lower())


def number(name: str, text: str) -> int:
    """Return a whole number out of the environment. Raise UserError for anything else."""
    refuse(not text.isdigit(), f"{name}={text} in the environment is not a whole number; correct or unset it.")
    return int(text)
