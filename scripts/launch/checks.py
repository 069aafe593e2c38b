"""Raise UserError before a launch for what would end it at its start: wrong flags, missing data, a machine that does not suit."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from errors import UserError
from scripts.launch.commands import DEFAULT_HOSTFILE, DEFAULT_PORT, Options, master_address
from scripts.launch.hostfile import is_loopback, resolved
from steps import Step


def check_step(step: Step, flags: list[str]) -> Any:
    """Return the arguments of a step, read by its own parser. Raise UserError for wrong flags or data that cannot be read.

    Said here once, in the place of once from each process in half a minute.
    """
    from training.utils.flags.parse import parse

    logger = logging.getLogger("sanbu")
    before, logger.level = logger.level, logging.ERROR  # what replaces a former flag is said by the step itself
    try:
        args = parse(step.arguments_class, flags)
    finally:
        logger.level = before
    for path in (*args.data_path, *getattr(args, "sft_only_data_path", ())):
        check_data(path)
    return args


def check_data(path: str) -> None:
    """Raise UserError for a data file that is missing, empty or broken in its first record. Sets of the hub are not fetched."""
    from training.utils.data.named_sets import find_named_set
    from training.utils.data.readers import looks_local, read_rows

    file, named = Path(path).expanduser(), find_named_set(path)
    if file.is_file():
        if next(read_rows(file), None) is None:
            raise UserError(f"{path}: no records in it.")
    elif not file.exists() and (looks_local(path) or (named and named.files)):
        from training.utils.data.sources import open_source

        open_source(path)  # names what is missing


def check_machine(options: Options) -> None:
    """Raise UserError for what would end the run at its start: too few devices, a taken port, a launcher that is not there."""
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
    """Raise UserError for flags that the installed DeepSpeed's launcher does not know yet (0.14.2 has neither of these)."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        raise UserError(f"DeepSpeed is not installed for {sys.executable}: pip install -r requirements.txt, or set PYTHON.")
    known = (Path(found.origin).parent / "launcher" / "runner.py").read_text(encoding="utf-8")
    for flag, given in (("--no_ssh", options.no_ssh), ("--venv_script", options.venv_script)):
        if given and f'"{flag}"' not in known:
            raise UserError(f"the installed DeepSpeed's launcher has no {flag}; use --launcher torchrun, or a newer DeepSpeed.")


def check_devices(options: Options) -> None:
    """Raise UserError unless the devices of this machine are the platform's kind, and enough."""
    from models.device import detect_platform, device_count

    here, wanted = detect_platform(), options.platform
    if here.torch_device != wanted.accelerator:
        raise UserError(
            f"platform {wanted.name} ({wanted.title}) needs {wanted.accelerator}, but torch finds {here.name} here; check the "
            "driver and the torch build, or choose another recipe or --platform."
        )
    processes, count = options.processes or 1, device_count()
    if processes > count:
        raise UserError(
            f"the recipe wants {processes} devices, this machine shows {count}; give --num_gpus {count} (then raise "
            "--gradient_accumulation_steps, so that the global batch stays), or show more."
        )


def check_address(options: Options) -> None:
    """Raise UserError if the other nodes cannot know the first one by the address they will be given."""
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
            if time.monotonic() >= ends:
                raise UserError(
                    f"--master_addr {address}: {error.strerror} from {socket.gethostname()}, node {options.node_rank}; give the "
                    "address of the first node as this one reaches it (ip route get ADDRESS shows the way)."
                ) from error
        time.sleep(2)


def check_port(options: Options) -> None:
    """Raise UserError if another program listens on the port that was asked for."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", options.master_port))
        except OSError as error:
            raise UserError(
                f"--master_port {options.master_port}: {error.strerror.lower()}; another run may use it, so give another port."
            ) from error
