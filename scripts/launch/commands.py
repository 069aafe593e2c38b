"""The command and the environment that start a step: one machine or several, by DeepSpeed's launcher, torchrun or Slurm.

Nothing is started or written here. Facts about its launcher: deepspeed/launcher/runner.py and
multinode_runner.py, versions 0.14.2 to 0.19.8.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.launch.hostfile import read_hostfile
from scripts.launch.platforms import ROOT, MachineKind, did_you_mean, variable_reasons
from training.utils.run.environment import free_port

LAUNCHERS = ("pdsh", "openmpi", "torchrun", "slurm")
DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's own
DEFAULT_PORT = 29500  # several nodes must agree on one; a single node takes any that is free
MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
# What the shell has set and other nodes need too. DeepSpeed itself forwards PYTHON*, NCCL* (or ASCEND*, HCCL*), no others.
FORWARDED = re.compile(
    "(NCCL|RCCL|HCCL|GLOO|UCX|ASCEND|HIP|HSA|MIOPEN|ROCM|PYTORCH|TORCH|OMP|HF|TRANSFORMERS|TOKENIZERS|DEEPSPEED|DS|SANBU|CUDA)_"
    "|DTK|LD_LIBRARY_PATH|PATH"
)
NOT_FORWARDED = re.compile(r"TOKEN$|SECRET|PASSWORD|API_KEY|VISIBLE_DEVICES$|^DS_ENV_FILE$")
UNSAFE_IN_EXPORT = re.compile(r"[^\w@%+=:,./-]")  # DeepSpeed puts double quotes around such values, whoever reads them


@dataclass
class Options:
    """Where and how processes are started. ``hosts`` is what the hostfile says, empty where there is none."""

    platform: MachineKind
    processes: int | None = None  # on each node; None: every device
    num_nodes: int | None = None
    hostfile: str | None = None
    launcher: str | None = None
    launcher_args: str = ""
    no_ssh: bool = False
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    ssh_port: int | None = None
    venv_script: str | None = None
    env: dict[str, str] = field(default_factory=dict)  # of the recipe
    hosts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_values()
        if self.hostfile and Path(self.hostfile).is_file():
            self.hosts = read_hostfile(self.hostfile)
            if self.num_nodes and self.num_nodes > len(self.hosts):
                raise UserError(f"--num_nodes {self.num_nodes}, but {self.hostfile} names {len(self.hosts)} hosts; add some.")
            self.hosts = dict(list(self.hosts.items())[: self.num_nodes])
        for host, slots in self.hosts.items():
            if self.processes and self.processes > slots:
                raise UserError(
                    f"{self.processes} processes a node are wanted, but {self.hostfile} gives {host} slots={slots}; give "
                    f"--num_gpus {slots} or correct the line."
                )

    def check_values(self) -> None:
        """Raise UserError for a value that no machine has."""
        if self.launcher is not None and self.launcher not in LAUNCHERS:
            near = did_you_mean(self.launcher, LAUNCHERS)
            known = ", ".join(LAUNCHERS)
            raise UserError(f"--launcher {self.launcher} is unknown{near}; use {known}, or none of them: pdsh for several nodes.")
        for flag, count in (("--num-gpus", self.processes), ("--num-nodes", self.num_nodes)):
            if count is not None and count < 1:
                raise UserError(f"{flag} {count} is not a number of them; give 1 or more.")
        for flag, port in (("--master_port", self.master_port), ("--ssh_port", self.ssh_port)):
            if port is not None and not 0 < port < 65536:
                raise UserError(f"{flag} {port} is no port; give a number from 1 to 65535.")
        try:
            shlex.split(self.launcher_args)
        except ValueError as error:
            reason = str(error).lower()
            raise UserError(f"--launcher_args {self.launcher_args!r} is not read by a shell: {reason}; correct it.") from error

    @property
    def nodes(self) -> int:
        """How many nodes take part."""
        return len(self.hosts) or self.num_nodes or self.platform.nodes

    @property
    def several(self) -> bool:
        """Whether more than one node takes part."""
        return self.nodes > 1

    @property
    def by_ssh(self) -> bool:
        """Whether this machine starts the processes of the other nodes: then their environment travels with the command."""
        return self.several and not self.no_ssh and self.launcher in (None, "pdsh", "openmpi")

    @property
    def is_first_node(self) -> bool:
        """Whether the process with rank 0 runs under this command."""
        return not self.node_rank or self.by_ssh or self.launcher == "slurm"


# --- command ----------------------------------------------------------------------------------------------------------


def build_command(options: Options, module: str, flags: list[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the words that start ``python -m module flags…`` in every process. Raise UserError for options that contradict."""
    if options.launcher in ("torchrun", "slurm"):
        start = torchrun_words if options.launcher == "torchrun" else slurm_words
        return [*start(options, environ), "-m", module, *flags]
    # Through sys.executable, so that it is the DeepSpeed of this environment.
    runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if options.several:
        if options.by_ssh and options.launcher != "openmpi":
            flags = words_for_pdsh(flags)
        return [*runner, *several_nodes_words(options, environ), "--module", module, *flags]
    # The launcher would read a /job/hostfile that lies around, and start on all its hosts.
    words = ["--hostfile", os.devnull, *device_words(options, environ), "--master_port", str(options.master_port or free_port())]
    return [*runner, *words, "--module", module, *flags]


def flags_of(**values: Any) -> list[str]:
    """Return ``--name value`` for each value that is given."""
    return [word for name, value in values.items() if value for word in (f"--{name}", str(value))]


def several_nodes_words(options: Options, environ: Mapping[str, str]) -> list[str]:
    """Return the words of DeepSpeed's launcher for several nodes."""
    words, launcher_args = flags_of(hostfile=options.hostfile), options.launcher_args
    if options.launcher == "openmpi":
        check_openmpi(options)
        words += flags_of(launcher="openmpi")
        launcher_args = openmpi_arguments(options, environ)
    else:
        words += flags_of(num_nodes=options.num_nodes, num_gpus=options.processes)
    words += [f"--launcher_args={launcher_args}"] if launcher_args else []
    words += ["--no_ssh", "--node_rank", str(node_rank(options, environ))] if options.no_ssh else []
    words += flags_of(master_addr=master_address(options, environ), master_port=options.master_port)
    return words + flags_of(ssh_port=options.ssh_port, venv_script=options.venv_script)


def device_words(options: Options, environ: Mapping[str, str]) -> list[str]:
    """Return --num_gpus N; or --include with the first N visible devices, because --num_gpus ignores the mask.

    build_environment removes that variable then: the ids would be looked up among the devices that it leaves.
    """
    name, visible = visible_devices(options.platform, environ)
    if not visible:
        return [] if options.processes is None else ["--num_gpus", str(options.processes)]
    if not all(device.isdigit() for device in visible):
        raise UserError(
            f"{name}={environ[name]}: DeepSpeed's launcher reads numbers only; give the numbers of the devices, or use "
            "--launcher torchrun, which leaves the variable alone."
        )
    return ["--include", f"localhost:{','.join(visible[: check_count(options, name, visible)])}"]


def visible_devices(platform: MachineKind, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the variable that counts here and the devices it shows; "" and [] where none is set, and on a CPU."""
    if platform.accelerator == "cpu":
        return "", []
    # A HIP runtime takes HIP_VISIBLE_DEVICES before CUDA_VISIBLE_DEVICES.
    for name in [platform.visible_devices, *(["HIP_VISIBLE_DEVICES", *MASKS] if platform.accelerator == "cuda" else [])]:
        devices = [device.strip() for device in environ.get(name, "").split(",") if device.strip()]
        if devices:
            return name, devices
    return "", []


def check_count(options: Options, name: str, visible: list[str]) -> int:
    """Return how many of the visible devices are used. Raise UserError if more are wanted."""
    count = options.processes or len(visible)
    if count > len(visible):
        raise UserError(f"{name} shows {len(visible)} devices, {count} are wanted; lower --num-gpus or show more.")
    return count


def torchrun_words(options: Options, environ: Mapping[str, str]) -> list[str]:
    """Return the words of torchrun on this node; with several nodes it is started on each of them."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(options.nodes)]
    words += ["--nproc_per_node", str(processes_here(options, environ))]
    if options.several:
        words += ["--node_rank", str(node_rank(options, environ)), "--master_addr", needed_address(options, environ)]
        return [*words, "--master_port", str(options.master_port or DEFAULT_PORT)]
    return [*words, "--master_addr", "127.0.0.1", "--master_port", str(options.master_port or free_port())]


def slurm_words(options: Options, environ: Mapping[str, str]) -> list[str]:
    """Return the words of srun with one torchrun a node, inside an allocation (sbatch, salloc). Ranks follow the nodes'
    order, so that each node finds its own files of a checkpoint again.
    """
    address = options.master_addr or environ.get("MASTER_ADDR") or first_slurm_node(environ)
    words = ["srun", f"--nodes={options.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    words += shlex.split(options.launcher_args)
    # SLURM_NODEID differs by task, so a shell on the node reads it; $0 and $@ are the words that follow.
    words += ["bash", "-c", 'exec "$0" -m torch.distributed.run --node_rank "$SLURM_NODEID" "$@"', sys.executable]
    words += ["--nnodes", str(options.nodes), "--nproc_per_node", str(processes_here(options, environ))]
    return [*words, "--master_addr", address, "--master_port", str(options.master_port or DEFAULT_PORT)]


def first_slurm_node(environ: Mapping[str, str]) -> str:
    """Return the first host of the allocation, by scontrol. Raise UserError outside one."""
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not nodes:
        raise UserError(
            "--launcher slurm works inside an allocation (sbatch, salloc), and SLURM_JOB_NODELIST is not set; to see the "
            "command from outside, give --master_addr and --num_nodes."
        )
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"scontrol cannot name the hosts of {nodes} ({error}); give --master_addr.") from error
    return listed.stdout.split()[0]


def processes_here(options: Options, environ: Mapping[str, str]) -> int:
    """Return how many processes torchrun starts on this node; under Slurm on each, which show their devices alike."""
    name, visible = visible_devices(options.platform, environ)
    if visible:
        return check_count(options, name, visible)
    slots = list(options.hosts.values())
    return options.processes or (slots[min(options.node_rank or 0, len(slots) - 1)] if slots else options.platform.devices)


def node_rank(options: Options, environ: Mapping[str, str]) -> int:
    """Return this node's number: --node_rank, or what Slurm, Kubeflow or the user has set. Raise UserError if nobody says."""
    if options.node_rank is None:
        names = ("NODE_RANK", "PET_NODE_RANK", "SLURM_NODEID")
        ranks = [int(environ[name]) for name in names if environ.get(name, "").isdigit()]
        if not ranks:
            raise UserError(
                f"which of the {options.nodes} nodes is this? Start the same command on each with its own --node_rank, 0 to "
                f"{options.nodes - 1}, on the first one 0."
            )
        options.node_rank = ranks[0]
    if not 0 <= options.node_rank < options.nodes:
        raise UserError(f"--node_rank {options.node_rank} does not exist with {options.nodes} nodes; they count from 0.")
    return options.node_rank


def master_address(options: Options, environ: Mapping[str, str]) -> str | None:
    """Return where rank 0 listens: --master_addr, MASTER_ADDR, else the first host of the hostfile; None where nobody says.

    Always given to DeepSpeed, which would take the first address that ``ssh HOST hostname -I`` prints: perhaps docker's.
    """
    return options.master_addr or environ.get("MASTER_ADDR") or next(iter(options.hosts), None)


def needed_address(options: Options, environ: Mapping[str, str]) -> str:
    """Return master_address, or raise UserError."""
    address = master_address(options, environ)
    if not address:
        raise UserError("several nodes need --master_addr, the address of the first one as the others reach it, or --hostfile.")
    return address


def check_openmpi(options: Options) -> None:
    """Raise UserError for what DeepSpeed's OpenMPI runner refuses or ignores."""
    if options.no_ssh:
        raise UserError("--no_ssh and --launcher openmpi contradict: mpirun starts the other nodes itself; drop one of the two.")
    listed, file, nodes = len(read_hostfile(options.hostfile)) if options.hostfile else 0, options.hostfile, options.nodes
    if listed > nodes:
        raise UserError(
            f"--launcher openmpi starts on every host of {file}, and it names {listed}, not the {nodes} of --num_nodes; leave only "
            f"the {nodes} in it."
        )
    for host, slots in options.hosts.items():
        if options.processes and options.processes != slots:
            raise UserError(
                f"--launcher openmpi starts what the hostfile says, and {file} gives {host} slots={slots}, not "
                f"{options.processes}; correct the line or the number."
            )


def openmpi_arguments(options: Options, environ: Mapping[str, str]) -> str:
    """Return the words for mpirun, its network interface among them: DeepSpeed would say eth0, which most machines lack."""
    given = options.launcher_args
    if "btl_tcp_if_include" in given:
        return given
    settings = environ | options.env
    named = (settings.get(f"{library}_SOCKET_IFNAME") for library in ("NCCL", "HCCL", "GLOO"))
    interface = next(filter(None, named), "^")
    if interface[0] == "^":
        raise UserError(
            "--launcher openmpi needs the network interface between the nodes: NCCL_SOCKET_IFNAME=ib0 (HCCL_…, GLOO_…), or "
            '--launcher_args "--mca btl_tcp_if_include ib0".'
        )
    return f"--mca btl_tcp_if_include {interface.lstrip('=')} {given}".strip()


def words_for_pdsh(words: list[str]) -> list[str]:
    """Return the words as DeepSpeed's pdsh runner needs them for the shell of the other node to read them back.

    The runner puts double quotes around words with blanks, escapes quotation marks and joins all of them unquoted. Raise
    UserError for what cannot be passed so.
    """
    for name, path in (("working directory", str(Path.cwd())), ("Python", sys.executable)):
        if shlex.quote(path) != path:
            raise UserError(
                f"the {name} {path} cannot be passed to other nodes through pdsh, which reads blanks and signs in it as a "
                "shell does; use another path, or --launcher torchrun."
            )
    for word in words:
        if "\n" in word:
            raise UserError(f"{word!r}: a line break cannot be passed to other nodes through pdsh; use --launcher torchrun.")
    return [re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word) for word in words]


# --- environment ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """The changes to a step's environment, and the reason of each."""

    variables: dict[str, str]  # set for this run
    reasons: dict[str, str]
    removed: tuple[str, ...]  # taken out of what the shell has set
    forwarded: dict[str, str]  # to other nodes, through the file that DS_ENV_FILE names; empty without them

    def over(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the shell's environment with these changes."""
        return {name: value for name, value in environ.items() if name not in self.removed} | self.variables


def accelerator_name(word: str) -> str:
    """Return DeepSpeed's name of a device: it calls a DCU cuda."""
    return {"dcu": "cuda"}.get(word.lower(), word.lower())


def build_environment(options: Options, environ: Mapping[str, str] = os.environ) -> Environment:
    """Return the platform's variables unless the shell has set them, the recipe's always, and what other nodes are told."""
    why = variable_reasons()
    user = environ.get("USER") or getpass.getuser()
    settings: dict[str, tuple[str, str]] = {}  # name -> value and reason
    for name, value in (options.platform.env | (options.platform.env_several_nodes if options.several else {})).items():
        ours = value.replace("${USER}", user)
        settings[name] = (ours, why.get(name, "of the platform"))
        if environ.get(name, ours) != ours:
            settings[name] = (environ[name], f"set in the shell; the platform has {ours}")
    if chosen := environ.get("DS_ACCELERATOR"):
        settings["DS_ACCELERATOR"] = (accelerator_name(chosen), why["DS_ACCELERATOR"])
    own = {"PYTHONPATH": environ.get("PYTHONPATH", ""), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    settings |= {name: (value, why[name]) for name, value in own.items()}
    for path, lines in user_env_files(environ).items() if options.by_ssh else ():
        settings |= {name: (value, f"from {path}") for name, value in lines.items()}
    for name, value in options.env.items():
        settings[name] = (value, f"{why[name]} (from the recipe)" if name in why else "from the recipe")
    variables = {name: value for name, (value, _) in settings.items()}
    others = [folder for folder in variables["PYTHONPATH"].split(os.pathsep) if folder and Path(folder) != ROOT]
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])  # the project stays first
    _, visible = visible_devices(options.platform, environ)
    by_deepspeed = options.launcher not in ("torchrun", "slurm")  # which alone names the devices in --include
    masks = MASKS if visible and not options.several and by_deepspeed else ()
    return Environment(
        variables,
        reasons={name: reason for name, (_, reason) in settings.items()},
        removed=tuple(mask for mask in masks if mask in environ and mask not in options.env),
        forwarded=forwarded(options, variables, environ) if options.by_ssh else {},
    )


def user_env_files(environ: Mapping[str, str]) -> dict[Path, dict[str, str]]:
    """Return the variables of the user's own .deepspeed_env, in the home and the working directory, where DeepSpeed looks.

    DS_ENV_FILE names another file. Ours takes its place for the run, with these lines in it. DeepSpeed ends with a
    ValueError at a blank line or a comment; here they are skipped.
    """
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = dict.fromkeys(folder / name for folder in (Path(environ.get("HOME", "~")).expanduser(), Path()))
    files: dict[Path, dict[str, str]] = {path: {} for path in paths if path.is_file()}
    for path, variables in files.items():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.strip().startswith("#"):
                continue
            match = re.fullmatch(r"(\w+)\s*=(.*)", line.strip())
            if not match:
                raise UserError(f"{path}, line {number}: {line.strip()!r} is not NAME=VALUE; correct or remove it.")
            variables[match[1]] = match[2].strip()
    return files


def forwarded(options: Options, variables: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return what the other nodes are told: our variables, and those of the shell about devices, network and libraries.

    Secrets stay here: the values are seen in the process list of every node. Raise UserError for a value of ours that
    DeepSpeed cannot pass on; one of the shell's is left out.
    """
    sent = {}
    if options.launcher == "openmpi":  # whose processes are told their rank by mpirun, and no address
        sent = {"MASTER_ADDR": needed_address(options, environ), "MASTER_PORT": str(options.master_port or DEFAULT_PORT)}
    unreadable = UNSAFE_IN_EXPORT if options.launcher == "openmpi" else re.compile(r"[\"$`\\\n]")
    for name, value in environ.items():
        wanted = FORWARDED.match(name) and not NOT_FORWARDED.search(name) and name not in variables
        if value and wanted and not unreadable.search(value):
            sent[name] = value
    for name, value in variables.items():
        if match := unreadable.search(value):
            raise UserError(
                f"{name}={value!r} cannot be sent to the other nodes: DeepSpeed's {options.launcher or 'pdsh'} runner does not "
                f"pass on {match[0]!r}; change the value, or start each node by --launcher torchrun or --no_ssh."
            )
    return sent | variables
