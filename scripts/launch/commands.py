"""The command and the environment that start a step: one machine or several, by DeepSpeed's launcher, torchrun or Slurm.

Nothing is started or written here. Facts about its launcher: deepspeed/launcher/runner.py and
multinode_runner.py, versions 0.14.2 to 0.19.8.
"""

import getpass
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError, refuse
from scripts.launch.hostfile import read_hostfile
from scripts.launch.options import DEFAULT_PORT, Options, accelerator_name
from scripts.launch.platforms import ROOT, variable_reasons
from training.utils.run.environment import free_port
from training.utils.run.ranks import first_slurm_node as first_host

MASKS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
# What the shell has set and other nodes need too. DeepSpeed itself forwards PYTHON*, NCCL* (or ASCEND*, HCCL*), no others.
FORWARDED = re.compile(
    "(NCCL|RCCL|HCCL|GLOO|UCX|ASCEND|HIP|HSA|MIOPEN|ROCM|PYTORCH|TORCH|OMP|HF|TRANSFORMERS|TOKENIZERS|DEEPSPEED|DS|SANBU|CUDA)_"
    "|DTK|LD_LIBRARY_PATH|PATH"
)
SECRET = re.compile(r"TOKEN$|SECRET|PASSWORD|API_KEY")
NOT_FORWARDED = re.compile(SECRET.pattern + r"|VISIBLE_DEVICES$|^DS_ENV_FILE$")
# DeepSpeed puts double quotes around such values, whoever reads them.
UNREADABLE = {"openmpi": re.compile(r"[^\w@%+=:,./-]"), "pdsh": re.compile(r"[\"$`\\\n]")}
TORCHRUN = "torch.distributed.run"


# --- command ----------------------------------------------------------------------------------------------------------


def build_command(options: Options, module: str, flags: list[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the words that start ``python -m module flags…`` in every process. Raise UserError for options that contradict."""
    if options.launcher in ("torchrun", "slurm"):
        start = torchrun_words if options.launcher == "torchrun" else slurm_words
        return [*start(options, environ), "-m", module, *flags]
    if not options.several:
        # The launcher would read a /job/hostfile that lies around, and start on all its hosts.
        words = ["--hostfile", os.devnull, *device_words(options, environ)]
        words += ["--master_port", str(options.master_port or free_port())]
    elif options.launcher == "openmpi":
        words = openmpi_words(options, environ)
    else:
        words = flags_of(hostfile=options.hostfile, num_nodes=options.num_nodes, num_gpus=options.processes)
        words += [f"--launcher_args={options.launcher_args}"] if options.launcher_args else []
        words += ["--no_ssh", "--node_rank", str(node_rank(options, environ))] if options.no_ssh else []
        flags = flags if options.no_ssh else words_for_pdsh(flags)
    words += ["--force_multi"] if options.elsewhere else []  # DeepSpeed would start a single host's processes here
    if options.several:
        words += flags_of(master_addr=master_address(options, environ), master_port=options.master_port)
        words += flags_of(ssh_port=options.ssh_port, venv_script=options.venv_script)
    # Through sys.executable, so that it is the DeepSpeed of this environment.
    return [sys.executable, "-m", "deepspeed.launcher.runner", *words, "--module", module, *flags]


def flags_of(**values: Any) -> list[str]:
    """Return ``--name value`` for each value that is given."""
    return [word for name, value in values.items() if value not in (None, "") for word in (f"--{name}", str(value))]


def device_words(options: Options, environ: Mapping[str, str]) -> list[str]:
    """Return --num_gpus N; or --include with the first N visible devices, because --num_gpus ignores the mask.

    build_environment removes that variable then: the ids would be looked up among the devices that it leaves.
    """
    name, devices = chosen_devices(options, environ)
    if not devices:
        return flags_of(num_gpus=options.processes)
    refuse(
        not all(device.isdigit() for device in devices),
        f"{name}={environ.get(name)}: DeepSpeed's launcher reads numbers only; give the numbers of the devices, or use "
        "--launcher torchrun, which leaves the variable alone.",
    )
    return ["--include", f"localhost:{','.join(devices)}"]


def chosen_devices(options: Options, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the variable that counts here and the first N devices that it shows; "" and [] without one, and on a CPU.

    Raise UserError if more are wanted than it shows.
    """
    platform = options.platform
    names = [platform.visible_devices] if platform.accelerator != "cpu" else []
    if platform.accelerator == "cuda":  # a HIP runtime takes HIP_VISIBLE_DEVICES before CUDA_VISIBLE_DEVICES
        names += ["HIP_VISIBLE_DEVICES", *MASKS]
    for name in names:
        if visible := [device.strip() for device in environ.get(name, "").split(",") if device.strip()]:
            count, shown = options.processes or len(visible), len(visible)
            refuse(count > shown, f"{name} shows {shown} devices, {count} are wanted; lower --num-gpus or show more.")
            return name, visible[:count]
    return "", []


def torchrun_words(options: Options, environ: Mapping[str, str]) -> list[str]:
    """Return the words of torchrun on this node; with several nodes it is started on each of them."""
    words, address, port = [sys.executable, "-m", TORCHRUN, *size_words(options, environ)], "127.0.0.1", options.master_port
    if options.several:
        words += ["--node_rank", str(node_rank(options, environ))]
        address, port = master_address(options, environ, needed=True), port or DEFAULT_PORT
    return [*words, "--master_addr", address, "--master_port", str(port or free_port())]


def slurm_words(options: Options, environ: Mapping[str, str]) -> list[str]:
    """Return the words of srun with one torchrun a node, inside an allocation (sbatch, salloc). Ranks follow the nodes'
    order, so that each node finds its own files of a checkpoint again.
    """
    words = ["srun", f"--nodes={options.nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    words += shlex.split(options.launcher_args or "")
    # SLURM_NODEID differs by task, so a shell on the node reads it; $0 and $@ are the words that follow.
    words += ["bash", "-c", f'exec "$0" -m {TORCHRUN} --node_rank "$SLURM_NODEID" "$@"', sys.executable]
    words += [*size_words(options, environ), "--master_addr", master_address(options, environ)]
    return [*words, "--master_port", str(options.master_port or DEFAULT_PORT)]


def size_words(options: Options, environ: Mapping[str, str]) -> list[str]:
    """Return how many nodes there are, and processes on this one; under Slurm on each, which show their devices alike."""
    _, devices = chosen_devices(options, environ)
    slots = list(options.hosts.values()) or [options.platform.devices]
    processes = len(devices) or options.processes or slots[min(options.node_rank or 0, len(slots) - 1)]
    return ["--nnodes", str(options.nodes), "--nproc_per_node", str(processes)]


def first_slurm_node(environ: Mapping[str, str]) -> str:
    """Return the first host of the allocation, by scontrol. Raise UserError outside one."""
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST") or ""
    refuse(
        not nodes,
        "--launcher slurm works inside an allocation (sbatch, salloc), and SLURM_JOB_NODELIST is not set; to see the "
        "command from outside, give --master_addr and --num_nodes.",
    )
    return first_host(nodes)


def node_rank(options: Options, environ: Mapping[str, str]) -> int:
    """Return this node's number: --node_rank, or what Slurm, Kubeflow or the user has set. Raise UserError if nobody says."""
    last = options.nodes - 1
    if options.node_rank is None:
        words = [environ.get(name, "") for name in ("NODE_RANK", "PET_NODE_RANK", "SLURM_NODEID")]
        options.node_rank = next((int(word) for word in words if word.isdigit()), None)
    refuse(
        options.node_rank is None,
        f"which of the {options.nodes} nodes is this? Start the same command on each with its own --node_rank, 0 to {last}, "
        "on the first one 0.",
    )
    wrong = options.node_rank not in range(options.nodes)
    refuse(wrong, f"--node_rank {options.node_rank} does not exist with {options.nodes} nodes; they count from 0.")
    return options.node_rank


def master_address(options: Options, environ: Mapping[str, str], needed: bool = False) -> str | None:
    """Return where rank 0 listens: --master_addr, MASTER_ADDR, else the first host of the allocation or the hostfile, or None.

    Always given to DeepSpeed, which would take the first address that ``ssh HOST hostname -I`` prints: perhaps docker's.
    needed: raise UserError where nobody says.
    """
    address = options.master_addr or environ.get("MASTER_ADDR")
    address = address or (first_slurm_node(environ) if options.launcher == "slurm" else next(iter(options.hosts), None))
    unknown = needed and not address
    refuse(unknown, "several nodes need --master_addr, the address of the first one as the others reach it, or --hostfile.")
    return address


def openmpi_words(options: Options, environ: Mapping[str, str]) -> list[str]:
    """Return the words for DeepSpeed's OpenMPI runner. Raise UserError for what it refuses or ignores.

    mpirun gets its network interface: DeepSpeed would say eth0, which most machines lack.
    """
    file, nodes, wanted = options.hostfile, options.nodes, options.processes
    refuse(
        options.no_ssh,
        "--no_ssh and --launcher openmpi contradict: mpirun starts the other nodes itself; drop one of the two.",
    )
    listed = len(read_hostfile(file)) if file else 0
    refuse(
        listed > nodes,
        f"--launcher openmpi starts on every host of {file}, and it names {listed}, not the {nodes} of --num_nodes; leave "
        f"only the {nodes} in it.",
    )
    for host, slots in options.hosts.items():
        refuse(
            wanted not in (None, slots),
            f"--launcher openmpi starts what the hostfile says, and {file} gives {host} slots={slots}, not {wanted}; correct "
            "the line or the number.",
        )
    more, settings = options.launcher_args or "", environ | options.env
    if "btl_tcp_if_include" not in more:
        named = (settings.get(f"{library}_SOCKET_IFNAME") for library in ("NCCL", "HCCL", "GLOO"))
        interface = next(filter(None, named), "^")
        refuse(
            interface[0] == "^",
            "--launcher openmpi needs the network interface between the nodes: NCCL_SOCKET_IFNAME=ib0 (HCCL_…, GLOO_…), or "
            '--launcher_args "--mca btl_tcp_if_include ib0".',
        )
        more = f"--mca btl_tcp_if_include {interface.lstrip('=')} {more}".strip()
    return [*flags_of(hostfile=file, launcher="openmpi"), f"--launcher_args={more}"]


def words_for_pdsh(words: list[str]) -> list[str]:
    """Return the words as DeepSpeed's pdsh runner needs them for the shell of the other node to read them back.

    The runner puts double quotes around words with blanks, escapes quotation marks and joins all of them unquoted. Raise
    UserError for what cannot be passed so.
    """
    for name, path in (("working directory", str(Path.cwd())), ("Python", sys.executable)):
        refuse(
            shlex.quote(path) != path,
            f"the {name} {path} cannot be passed to other nodes through pdsh, which reads blanks and signs in it as a "
            "shell does; use another path, or --launcher torchrun.",
        )
    for word in words:
        broken = "\n" in word
        refuse(broken, f"{word!r}: a line break cannot be passed to other nodes through pdsh; use --launcher torchrun.")
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


def build_environment(options: Options, environ: Mapping[str, str] = os.environ) -> Environment:
    """Return the platform's variables unless the shell has set them, the recipe's always, and what other nodes are told."""
    why, platform = variable_reasons(), options.platform
    user = environ.get("USER") or getpass.getuser()
    settings: dict[str, tuple[str, str]] = {}  # name -> value and reason
    for name, value in (platform.env | (platform.env_several_nodes if options.several else {})).items():
        ours = value.replace("${USER}", user)
        settings[name] = (ours, why[name])
        if environ.get(name, ours) != ours:
            settings[name] = (environ[name], f"set in the shell; the platform has {ours}")
    if chosen := environ.get("DS_ACCELERATOR"):
        settings["DS_ACCELERATOR"] = (accelerator_name(chosen), why["DS_ACCELERATOR"])
    own = {"PYTHONPATH": environ.get("PYTHONPATH", ""), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    settings |= {name: (value, why[name]) for name, value in own.items()}
    settings |= user_settings(environ) if options.by_ssh else {}
    for name, value in options.env.items():
        settings[name] = (value, f"{why[name]} (from the recipe)" if name in why else "from the recipe")
    variables = {name: value for name, (value, _) in settings.items()}
    others = [folder for folder in variables["PYTHONPATH"].split(os.pathsep) if folder and Path(folder) != ROOT]
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])  # the project stays first
    # DeepSpeed's launcher alone names the devices, in --include; torchrun's processes read the mask.
    masked = not options.several and options.launcher not in ("torchrun", "slurm") and chosen_devices(options, environ)[1]
    return Environment(
        variables,
        reasons={name: reason for name, (_, reason) in settings.items()},
        removed=tuple(mask for mask in MASKS if masked and mask in environ and mask not in options.env),
        forwarded=forwarded(options, variables, environ) if options.by_ssh else {},
    )


def user_settings(environ: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return name -> value and reason of the user's own .deepspeed_env, in the home and the working directory, as DeepSpeed does.

    DS_ENV_FILE names another file. Ours takes its place for the run, with these lines in it. DeepSpeed ends with a
    ValueError at a blank line or a comment; here they are skipped.
    """
    name, settings = environ.get("DS_ENV_FILE", ".deepspeed_env"), {}
    for path in dict.fromkeys(folder / name for folder in (Path(environ.get("HOME", "~")).expanduser(), Path())):
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a UTF-8 text file; write lines NAME=VALUE.") from error
        for number, line in enumerate(map(str.strip, lines), 1):
            match = re.fullmatch(r"(\w+)\s*=\s*(.*)", line)
            if match:
                settings[match[1]] = (match[2], f"from {path}")
            wrong = line and not match and line[0] != "#"
            refuse(wrong, f"{path}, line {number}: {line!r} is not NAME=VALUE; correct or remove it.")
    return settings


def forwarded(options: Options, variables: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return what the other nodes are told: our variables, and those of the shell about devices, network and libraries.

    Secrets stay here: the values are seen in the process list of every node. Raise UserError for a value of ours that
    DeepSpeed cannot pass on; one of the shell's is left out.
    """
    sent, launcher = {}, options.launcher or "pdsh"
    if launcher == "openmpi":  # whose processes are told their rank by mpirun, and no address
        sent["MASTER_ADDR"] = master_address(options, environ, needed=True)
        sent["MASTER_PORT"] = str(options.master_port or DEFAULT_PORT)
    for name, value in environ.items():
        wanted = FORWARDED.match(name) and not NOT_FORWARDED.search(name) and name not in variables
        if value and wanted and not UNREADABLE[launcher].search(value):
            sent[name] = value
    for name, value in variables.items():
        match = UNREADABLE[launcher].search(value)
        refuse(
            match,
            f"{name}={value!r} cannot be sent to the other nodes: DeepSpeed's {launcher} runner does not pass on "
            f"{match and match[0]!r}; change the value, or start each node by --launcher torchrun or --no_ssh.",
        )
    return sent | variables
