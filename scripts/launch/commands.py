"""The command and the environment that start a step: one machine or several, by DeepSpeed's launcher, torchrun or Slurm.

Pure functions of the options and of the shell's environment; nothing is started or written here. Facts about DeepSpeed's
launcher: deepspeed/launcher/runner.py and multinode_runner.py, versions 0.14.2 to 0.19.8.
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

from errors import UserError
from scripts.launch.hostfile import read_hostfile
from scripts.launch.platforms import ROOT, Platform, did_you_mean, variable_reasons
from training.utils.run.environment import free_port

LAUNCHERS = ("pdsh", "openmpi", "torchrun", "slurm")
DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's own
DEFAULT_PORT = 29500  # several nodes must agree on one; a single node takes any that is free
MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
# What the shell has set and other nodes need too. DeepSpeed itself forwards PYTHON*, NCCL* (or ASCEND*, HCCL*), no others.
FORWARDED = (
    "NCCL_", "RCCL_", "HCCL_", "GLOO_", "UCX_", "ASCEND_", "HIP_", "HSA_", "MIOPEN_", "ROCM_", "DTK", "PYTORCH_", "TORCH_",
    "OMP_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "DEEPSPEED_", "DS_", "SANBU_", "CUDA_", "LD_LIBRARY_PATH", "PATH",
)  # fmt: skip
NOT_FORWARDED = re.compile(r"TOKEN$|SECRET|PASSWORD|API_KEY|VISIBLE_DEVICES$|^DS_ENV_FILE$")
UNSAFE_IN_EXPORT = re.compile(r"[^\w@%+=:,./-]")  # DeepSpeed puts double quotes around such values, whoever reads them


@dataclass
class Options:
    """Where and how processes are started. ``hosts`` is what the hostfile says, empty where there is none."""

    platform: Platform
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
        if self.launcher is not None and self.launcher not in LAUNCHERS:
            raise UserError(
                f"--launcher {self.launcher} is unknown{did_you_mean(self.launcher, LAUNCHERS)}; use {', '.join(LAUNCHERS)}, "
                "or none of them: pdsh for several nodes."
            )
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
    """The words that start ``python -m module flags…`` in every process. UserError for options that contradict."""
    if options.launcher == "torchrun":
        return torchrun_command(options, module, flags, environ)
    if options.launcher == "slurm":
        return slurm_command(options, module, flags, environ)
    # Through sys.executable, so that it is the DeepSpeed of this environment.
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if not options.several:
        # The launcher would read a /job/hostfile that lies around, and start on all its hosts.
        command += ["--hostfile", os.devnull, *device_flags(options, environ)]
        command += ["--master_port", str(options.master_port or free_port())]
        return [*command, "--module", module, *flags]
    command += ["--hostfile", options.hostfile] if options.hostfile else []
    if options.launcher == "openmpi":
        check_openmpi(options)
        command += ["--launcher", "openmpi", f"--launcher_args={openmpi_arguments(options, environ)}"]
    else:
        command += ["--num_nodes", str(options.num_nodes)] if options.num_nodes else []
        command += ["--num_gpus", str(options.processes)] if options.processes else []
        command += [f"--launcher_args={options.launcher_args}"] if options.launcher_args else []
    if options.no_ssh:
        command += ["--no_ssh", "--node_rank", str(node_rank(options, environ))]
    address = master_address(options, environ)
    command += ["--master_addr", address] if address else []
    command += ["--master_port", str(options.master_port)] if options.master_port else []
    command += ["--ssh_port", str(options.ssh_port)] if options.ssh_port else []
    command += ["--venv_script", options.venv_script] if options.venv_script else []
    if options.by_ssh and options.launcher != "openmpi":
        for name, path in (("working directory", str(Path.cwd())), ("Python", sys.executable)):
            if shlex.quote(path) != path:
                raise UserError(
                    f"the {name} {path} cannot be passed to other nodes through pdsh, which reads blanks and signs in it as a "
                    "shell does; use another path, or --launcher torchrun."
                )
        flags = [for_pdsh(word) for word in flags]
    return [*command, "--module", module, *flags]


def device_flags(options: Options, environ: Mapping[str, str]) -> list[str]:
    """--num_gpus N; or --include with the first N visible devices, because --num_gpus ignores the visible-devices variable.

    build_environment removes that variable then: the ids would be looked up among the devices that it leaves.
    """
    name, visible = visible_devices(options.platform, environ)
    if not visible:
        return [] if options.processes is None else ["--num_gpus", str(options.processes)]
    if not all(part.isdigit() for part in visible):
        raise UserError(
            f"{name}={environ[name]}: DeepSpeed's launcher reads numbers only; give the numbers of the devices, or use "
            "--launcher torchrun, which leaves the variable alone."
        )
    return ["--include", f"localhost:{','.join(visible[: check_count(options, name, visible)])}"]


def visible_devices(platform: Platform, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """The variable that counts here and the devices it shows; "" and [] where none is set, and on a CPU."""
    if platform.accelerator == "cpu":
        return "", []
    # A HIP runtime takes HIP_VISIBLE_DEVICES before CUDA_VISIBLE_DEVICES.
    order = [platform.visible_devices, *(["HIP_VISIBLE_DEVICES", *MASKS] if platform.accelerator == "cuda" else [])]
    for name in order:
        parts = [part.strip() for part in environ.get(name, "").split(",") if part.strip()]
        if parts:
            return name, parts
    return "", []


def check_count(options: Options, name: str, visible: list[str]) -> int:
    """How many of the visible devices are used. UserError if more are wanted."""
    count = options.processes or len(visible)
    if count > len(visible):
        raise UserError(
            f"{name} shows {len(visible)} devices, {count} are wanted; lower --num-gpus or show more."
        )
    return count


def torchrun_command(options: Options, module: str, flags: list[str], environ: Mapping[str, str]) -> list[str]:
    """torchrun on this node; with several nodes it is started on each of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(options.nodes)]
    command += ["--nproc_per_node", str(processes_here(options, environ))]
    if options.several:
        command += ["--node_rank", str(node_rank(options, environ)), "--master_addr", needed_address(options, environ)]
        port = options.master_port or DEFAULT_PORT
    else:
        command += ["--master_addr", "127.0.0.1"]
        port = options.master_port or free_port()
    return [*command, "--master_port", str(port), "-m", module, *flags]


def slurm_command(options: Options, module: str, flags: list[str], environ: Mapping[str, str]) -> list[str]:
    """srun with one torchrun a node, inside an allocation (sbatch, salloc). Ranks follow the nodes' order, so that each
    finds its own part of a checkpoint again.
    """
    address = options.master_addr or environ.get("MASTER_ADDR") or first_slurm_node(environ)
    command = ["srun", f"--nodes={options.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    command += shlex.split(options.launcher_args)
    # SLURM_NODEID differs by task, so a shell on the node reads it; $0 and $@ are the words that follow.
    command += ["bash", "-c", 'exec "$0" -m torch.distributed.run --node_rank "$SLURM_NODEID" "$@"', sys.executable]
    command += ["--nnodes", str(options.nodes), "--nproc_per_node", str(processes_here(options, environ))]
    command += ["--master_addr", address, "--master_port", str(options.master_port or DEFAULT_PORT)]
    return [*command, "-m", module, *flags]


def first_slurm_node(environ: Mapping[str, str]) -> str:
    """The first host of the allocation, by scontrol. UserError outside one."""
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
    """How many processes torchrun starts on this node; under Slurm on each, which show their devices alike."""
    name, visible = visible_devices(options.platform, environ)
    if visible:
        return check_count(options, name, visible)
    slots = list(options.hosts.values())
    return options.processes or (slots[min(options.node_rank or 0, len(slots) - 1)] if slots else options.platform.devices)


def node_rank(options: Options, environ: Mapping[str, str]) -> int:
    """Which node this is: --node_rank, or what Slurm, Kubeflow or the user has set. UserError if nobody says."""
    names = ("NODE_RANK", "PET_NODE_RANK", "SLURM_NODEID")
    if options.node_rank is None:
        found = [environ[name] for name in names if environ.get(name, "").isdigit()]
        if not found:
            raise UserError(
                f"which of the {options.nodes} nodes is this? Start the same command on each with its own --node_rank, 0 to "
                f"{options.nodes - 1}, on the first one 0."
            )
        options.node_rank = int(found[0])
    if not 0 <= options.node_rank < options.nodes:
        raise UserError(f"--node_rank {options.node_rank} does not exist with {options.nodes} nodes; they count from 0.")
    return options.node_rank


def master_address(options: Options, environ: Mapping[str, str]) -> str | None:
    """Where rank 0 listens: --master_addr, MASTER_ADDR, else the first host of the hostfile; None where nobody says.

    Always given to DeepSpeed, which would take the first address that ``ssh HOST hostname -I`` prints: perhaps docker's.
    """
    return options.master_addr or environ.get("MASTER_ADDR") or next(iter(options.hosts), None)


def check_one_node(
    options: Options, num_nodes: int | None, node_rank: int | None, no_ssh: bool | None, master_addr: str | None
) -> None:
    """UserError for flags of several nodes where there is one: each node would train alone, all of them the same.

    The values are those of the command line; MASTER_ADDR in the environment and a recipe's no_ssh are left alone.
    """
    if options.several or options.launcher == "slurm":
        return
    if num_nodes == 1 or len(options.hosts) == 1:  # said so: a script for any number of nodes may give all its flags
        no_ssh, master_addr, node_rank = None, None, node_rank or None
    here = (None, "127.0.0.1", "::1", "localhost")
    given = [f"--node_rank {node_rank}"] * (node_rank is not None) + ["--no_ssh"] * bool(no_ssh)
    given += [f"--master_addr {master_addr}"] * (master_addr not in here)
    if given:
        raise UserError(
            f"{given[0]} is for several nodes, and this is a run on one; give --num_nodes N or --hostfile FILE, or leave it out."
        )


def needed_address(options: Options, environ: Mapping[str, str]) -> str:
    """master_address, or a UserError."""
    address = master_address(options, environ)
    if not address:
        raise UserError("several nodes need --master_addr, the address of the first one as the others reach it, or --hostfile.")
    return address


def check_openmpi(options: Options) -> None:
    """UserError for what DeepSpeed's OpenMPI runner refuses or ignores."""
    if options.no_ssh:
        raise UserError("--no_ssh and --launcher openmpi contradict: mpirun starts the other nodes itself; drop one of the two.")
    listed = len(read_hostfile(options.hostfile)) if options.hostfile else 0
    if listed > options.nodes:
        raise UserError(
            f"--launcher openmpi starts on every host of {options.hostfile}, and it names {listed}, not the {options.nodes} of "
            f"--num_nodes; leave only the {options.nodes} in it."
        )
    for host, slots in options.hosts.items():
        if options.processes and options.processes != slots:
            raise UserError(
                f"--launcher openmpi starts what the hostfile says, and {options.hostfile} gives {host} slots={slots}, not "
                f"{options.processes}; correct the line or the number."
            )


def openmpi_arguments(options: Options, environ: Mapping[str, str]) -> str:
    """The words for mpirun, its network interface among them: DeepSpeed would say eth0, which most machines do not have."""
    given = options.launcher_args
    if "btl_tcp_if_include" in given:
        return given
    settings = environ | options.env
    interface = settings.get("NCCL_SOCKET_IFNAME") or settings.get("HCCL_SOCKET_IFNAME") or settings.get("GLOO_SOCKET_IFNAME")
    if not interface or interface[0] == "^":
        raise UserError(
            "--launcher openmpi needs the network interface between the nodes: NCCL_SOCKET_IFNAME=ib0 (HCCL_…, GLOO_…), or "
            '--launcher_args "--mca btl_tcp_if_include ib0".'
        )
    return f"--mca btl_tcp_if_include {interface.lstrip('=')} {given}".strip()


def for_pdsh(word: str) -> str:
    """A word of the command as it must be handed to DeepSpeed's pdsh runner for the shell of the other node to read it back.

    The runner puts double quotes around words with blanks and joins all of them unquoted.
    """
    if "\n" in word:
        raise UserError(f"{word!r}: a line break cannot be passed to other nodes through pdsh; use --launcher torchrun.")
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)  # the quotation marks are escaped by the runner
    return shlex.quote(word)


# --- environment ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """What a step finds in its environment, and why."""

    variables: dict[str, str]  # set for this run
    reasons: dict[str, str]
    removed: tuple[str, ...]  # taken out of what the shell has set
    forwarded: dict[str, str]  # to other nodes, through the file that DS_ENV_FILE names; empty without them

    def over(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The shell's environment with these changes."""
        return {name: value for name, value in environ.items() if name not in self.removed} | self.variables


def build_environment(options: Options, environ: Mapping[str, str] = os.environ) -> Environment:
    """The platform's variables unless the shell has set them, the recipe's always; and what other nodes are told."""
    why = variable_reasons()
    platform = dict(options.platform.env) | (options.platform.env_several_nodes if options.several else {})
    user = environ.get("USER") or getpass.getuser()
    variables = {name: value.replace("${USER}", user) for name, value in platform.items()}
    reasons = {name: why.get(name, "of the platform") for name in variables}
    for name in variables.keys() & environ.keys():
        if name != "DS_ACCELERATOR" and environ[name] != variables[name]:
            reasons[name] = f"set in the shell; the platform has {variables[name]}"
            variables[name] = environ[name]
    if environ.get("DS_ACCELERATOR"):
        variables["DS_ACCELERATOR"] = {"dcu": "cuda"}.get(environ["DS_ACCELERATOR"].lower(), environ["DS_ACCELERATOR"].lower())
    own = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [_without_root(environ.get("PYTHONPATH", ""))])]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    variables |= own
    reasons |= {name: why[name] for name in own}
    files = user_env_files(environ) if options.by_ssh else {}
    for path, lines in files.items():
        variables |= lines
        reasons |= dict.fromkeys(lines, f"from {path}")
    variables |= options.env
    if variables["PYTHONPATH"] != own["PYTHONPATH"]:  # the user's file or the recipe has one, and the project stays first
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), _without_root(variables["PYTHONPATH"])]).rstrip(os.pathsep)
    reasons |= {name: f"{why[name]} (from the recipe)" if name in why else "from the recipe" for name in options.env}
    name, visible = visible_devices(options.platform, environ)
    by_deepspeed = options.launcher not in ("torchrun", "slurm")  # which alone names the devices in --include
    removed = MASKS if visible and not options.several and by_deepspeed else ()
    removed = tuple(mask for mask in removed if mask in environ and mask not in options.env)
    return Environment(variables, reasons, removed, forwarded(options, variables, environ) if options.by_ssh else {})


def _without_root(path: str) -> str:
    return os.pathsep.join(part for part in path.split(os.pathsep) if part and Path(part) != ROOT)


def user_env_files(environ: Mapping[str, str]) -> dict[Path, dict[str, str]]:
    """The variables of the user's own .deepspeed_env, in the home and the working directory, where DeepSpeed looks for it.

    DS_ENV_FILE names another file. Ours takes its place for the run, with these lines in it. DeepSpeed ends with a
    ValueError at a blank line or a comment; here they are skipped.
    """
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[Path, dict[str, str]] = {}
    for folder in (Path(environ.get("HOME", "~")).expanduser(), Path()):
        path = folder / name
        if not path.is_file() or path in found:
            continue
        found[path] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            text = line.strip()
            if text and not text.startswith("#"):
                key, sign, value = text.partition("=")
                if not sign or not re.fullmatch(r"\w+", key.strip()):
                    raise UserError(f"{path}, line {number}: {text!r} is not NAME=VALUE; correct or remove it.")
                found[path][key.strip()] = value.strip()
    return found


def forwarded(options: Options, variables: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """What the other nodes are told: our variables, and those of the shell that concern devices, network and libraries.

    Secrets stay here: the values are seen in the process list of every node. UserError for a value of ours that DeepSpeed
    cannot pass on; one of the shell's is left out.
    """
    told = {}
    if options.launcher == "openmpi":  # whose processes are told their rank by mpirun, and no address
        address = needed_address(options, environ)
        told = {"MASTER_ADDR": address, "MASTER_PORT": str(options.master_port or DEFAULT_PORT)}
    shell = {
        name: value for name, value in environ.items()
        if value and name.startswith(FORWARDED) and not NOT_FORWARDED.search(name) and name not in variables
    }  # fmt: skip
    unreadable = UNSAFE_IN_EXPORT if options.launcher == "openmpi" else re.compile(r"[\"$`\\\n]")
    told |= {name: value for name, value in shell.items() if not unreadable.search(value)}
    for name, value in variables.items():
        if match := unreadable.search(value):
            raise UserError(
                f"{name}={value!r} cannot be sent to the other nodes: DeepSpeed's {options.launcher or 'pdsh'} runner does not "
                f"pass on {match[0]!r}; change the value, or start each node by --launcher torchrun or --no_ssh."
            )
        told[name] = value
    return told
