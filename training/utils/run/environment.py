"""Ports, the output folder, and what a run is made of. Imports no torch."""

import fcntl
import logging
import os
import socket
import uuid
from pathlib import Path
from typing import IO, Any

from errors import UserError
from training.utils.data.digest import file_digest, sampled_digest, weight_files

logger = logging.getLogger("sanbu")

ROOT = Path(__file__).resolve().parents[3]
DONE = "sanbu_done.json"  # written into the output folder by a step that came to its end


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_writable(folder: Path, flag: str = "--output_dir") -> None:
    """Raise UserError that names the flag unless files can be written under the folder, which is made if it is absent."""
    probe = folder / f".writable-{uuid.uuid4().hex}"   # process numbers are the same in many containers
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{flag} {folder} cannot be written ({error.strerror}); name a folder where you may create files."
        ) from error


def hold_folder(folder: Path) -> IO[str] | None:
    """Lock the output folder for this process, until it ends or closes what is returned. None on file systems without locks.

    Raises UserError if another run holds it. The lock is the process's own (POSIX): the kernel frees it after kill -9, and
    no child that was forked keeps it, as it would keep a lock of flock().
    """
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows either
        file.seek(0)
        raise UserError(
            f"--output_dir {folder} is in use by another run ({file.read().strip() or 'just starting'}); wait for its end, stop "
            "it, or name another folder."
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked (%s): start no second run in it.", folder, error.strerror)
        return None
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
    file.flush()
    return file


def data_paths(args: Any) -> list[str]:
    """Return all data that the flags of a step name."""
    return [*args.data_path, *getattr(args, "sft_only_data_path", ())]


def describe_inputs(args: Any) -> dict[str, Any]:
    """Return what a run is made of besides its flags, as hashes of content: its data, in the order of data_paths, the weights
    of its models by role, and the program. Goes into DONE, for train.py to compare. A set or a model of the hub has None: its
    name alone tells it apart.
    """
    data = []
    for local in (Path(path).expanduser() for path in data_paths(args)):
        files = sorted(one for one in local.rglob("*") if one.is_file()) if local.is_dir() else [local] * local.is_file()
        data.append(file_digest(*files) if files else None)
    models = {}
    for role, folder in args.models.items():
        weights = weight_files(Path(folder).expanduser())
        models[role] = sampled_digest(*weights) if weights else None
    code = [file for room in ("models", "inference", "training") for file in sorted((ROOT / room).rglob("*.py"))]
    return {"data": data, "models": models, "code": file_digest(*code)}
