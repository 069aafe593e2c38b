"""Raise UserError before a launch for what would end it at its start: wrong flags, missing data, a machine that does not suit."""

import errno
import logging
import os
import shutil
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

from errors import UserError, refuse
from scripts.launch.commands import master_address
from scripts.launch.hostfile import is_loopback, is_this_machine, resolved
from scripts.launch.options import DEFAULT_HOSTFILE, DEFAULT_PORT, Options
from steps import Step
from training.utils.run.environment import data_paths

AS_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
TOOLS = {"openmpi": ("mpirun", "ompi_info"), "slurm": ("srun",), "pdsh": ("pdsh", "ssh")}


def step_arguments(step: Step, flags: list[str]) -> Any:
    """Return the arguments of a step, read by its own parser. Raise UserError for wrong flags.

    Said here once, in the place of once from each process in half a minute.
    """
    from training.utils.flags.parse import parse

    logger = logging.getLogger("sanbu")
    before, logger.level = logger.level, logging.ERROR  # what replaces a former flag is said by the step itself
    try:
        return parse(step.arguments_class, flags)
    finally:
        logger.level = before


def check_inputs(args: Any) -> None:
    """Raise UserError for a model or data that are not there. Of a model on the hub the config alone is fetched: weights are
    fetched where the step runs.
    """
    from models.checkpoint_folder import find_folder, may_be_on_hub
    from training.utils.run.inputs import check_models

    for path in filter(may_be_on_hub, args.models.values()):
        find_folder(path, only=["config.json"])
    check_models(args, ask_hub=False)
    check_data(args)


def check_data(args: Any) -> None:
    """Raise UserError for a data file that is missing, empty or broken in its first record. Sets of the hub are not looked up."""
    from training.utils.data.paths import check_sources

    check_sources(data_paths(args), args.column_map, ask_hub=False)


def check_pairs(args: Any) -> None:
    """Raise UserError for a data file without any pair; step 2 and DPO train on pairs. Reads up to the first pair."""
    from training.utils.data.named_sets import find_named_set
    from training.utils.data.readers import read_rows
    from training.utils.data.records import table_records
    from training.utils.data.rows import Reading
    from training.utils.data.sources import Table

    for path in args.data_path:
        if (file := Path(path).expanduser()).is_file():
            table = Table(path, partial(read_rows, file), "")
            records = table_records(table, find_named_set(path), args.column_map, Reading())
            refuse(
                not any(record["rejected"] is not None for record in records),
                f'{path}: no record has a "rejected" answer. Step 2 trains on pairs; take the set out of --data-path, and give '
                f'it to step 1 alone: --sft-flags "--sft_only_data_path {path}".',
            )


def check_several(options: Options, given: Any) -> None:
    """Raise UserError for a hostfile that is not there, and for flags of several nodes where there is one.

    Each node would train alone then, all of them the same. MASTER_ADDR in the environment and a recipe's no_ssh are left
    alone. given: the flags as argparse read them.
    """
    missing = options.hostfile and not Path(options.hostfile).is_file()
    refuse(missing, f"--hostfile {options.hostfile}: no such file; write one line HOST slots=N for each node.")
    if options.several or options.launcher == "slurm":
        return
    told_one = given.num_nodes == 1 or len(options.hosts) == 1  # a script for any number of nodes may give all its flags
    remote = given.master_addr not in (None, "127.0.0.1", "::1", "localhost")
    words = {f"--node_rank {given.node_rank}": given.node_rank if told_one else given.node_rank is not None}
    words |= {"--no_ssh": given.no_ssh and not told_one, f"--master_addr {given.master_addr}": remote and not told_one}
    for word, wrong in words.items():
        refuse(
            wrong,
            f"{word} is for several nodes, and this is a run on one; give --num_nodes N or --hostfile FILE, or leave it out.",
        )


def check_machine(options: Options) -> None:
    """Raise UserError for what would end the run at its start: too few devices, a taken port, a launcher that is not there."""
    if options.by_ssh or options.launcher == "slurm":
        for tool in TOOLS[options.launcher or "pdsh"]:
            missing = shutil.which(tool) is None
            refuse(missing, f"{tool} is not installed here; install it, or use --launcher torchrun or --no_ssh.")
    unnamed = options.several and options.no_ssh and not options.hosts
    refuse(unnamed, "--no_ssh needs --hostfile, with a line NAME slots=N for each node; the names need not be reachable.")
    unnamed = options.by_ssh and not options.hosts
    refuse(unnamed, f"several nodes need --hostfile with lines HOST slots=N; there is no {DEFAULT_HOSTFILE}.")
    if options.launcher != "slurm" and options.platform.accelerator != "cpu" and not options.by_ssh:
        check_devices(options)
    if options.by_ssh:
        check_address(options)
    elif not options.is_first_node:
        check_first_node(options)
    port = options.master_port or (DEFAULT_PORT if options.several or options.launcher == "slurm" else 0)  # one node: any
    here = options.is_first_node and not options.elsewhere
    if port and here and is_this_machine(master_address(options, os.environ) or "localhost"):
        check_port(port)
    lacking = [name for name in AS_ROOT if not os.environ.get(name)]
    refuse(
        options.by_ssh and options.launcher == "openmpi" and os.geteuid() == 0 and lacking,
        f"mpirun does not run as root unless {' and '.join(f'{name}=1' for name in AS_ROOT)} are set; set them, as usual in a "
        "container, or start as another user.",
    )


def check_devices(options: Options) -> None:
    """Raise UserError unless the devices of this machine are the platform's kind, and enough."""
    from models.device import detect_platform, device_count

    here, wanted, processes = detect_platform(), options.platform, options.processes or 1
    refuse(
        here.torch_device != wanted.accelerator,
        f"platform {wanted.name} ({wanted.title}) needs {wanted.accelerator}, but torch finds {here.name} here; check the "
        "driver and the torch build, or choose another recipe or --platform.",
    )
    count = device_count()
    refuse(
        processes > count,
        f"the recipe wants {processes} devices, this machine shows {count}; give --num_gpus {count} (then raise "
        "--gradient_accumulation_steps, so that the global batch stays), or show more.",
    )


def check_address(options: Options) -> None:
    """Raise UserError if the other nodes cannot know the first one by the address they will be given."""
    address = options.master_addr or next(iter(options.hosts))
    try:
        number = resolved(address)[1]
    except OSError as error:
        raise UserError(f"the address of the first node, {address}, does not resolve; give --master_addr with its IP.") from error
    refuse(
        is_loopback(number) and not options.master_addr,
        f"{address} resolves to {number} here, which the other nodes cannot reach; give --master_addr with the IP they see.",
    )


def check_first_node(options: Options, patience: float = 60.0) -> None:
    """Raise UserError if there is no way to the first node: its name means nothing, or no route leads there.

    Nobody needs to listen yet. patience: seconds in which a cluster may still make the name known.
    """
    address, port = master_address(options, os.environ), options.master_port or DEFAULT_PORT
    ends = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if not isinstance(error, socket.gaierror) and error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                return
            refuse(
                time.monotonic() >= ends,
                f"--master_addr {address}: {error.strerror} from {socket.gethostname()}, node {options.node_rank}; give the "
                "address of the first node as this one reaches it (ip route get ADDRESS shows the way).",
            )
        time.sleep(2)


def check_port(port: int) -> None:
    """Raise UserError if another program listens on the port that was asked for."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = error.strerror.lower()
            raise UserError(f"--master_port {port}: {reason}; another run may use it, so give another port.") from error
