"""Which checkpoints are whole: the list of their files, with sizes and checksums, is written last. Imports no torch."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from errors import UserError

logger = logging.getLogger("sanbu")

MANIFEST = "checkpoint.json"


def step_name(step: int) -> str:
    """Return the name of a checkpoint's folder; names sort as the steps do."""
    return f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Return the folders named as checkpoints are, oldest first; a copy such as step-00000002.bak is none of them."""
    return sorted(found for found in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", found.name))


def whole_checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the checkpoint folders that have a manifest whose files are all there in full size, newest first."""
    for candidate in reversed(step_folders(folder)):
        try:
            read_manifest(candidate)
        except UserError as error:
            logger.warning("Passed over: %s", error)
        else:
            yield candidate


def write_manifest(folder: Path, step: int, written: dict[str, tuple[int, str]], **more: Any) -> None:
    """List the files of a folder, with sizes and checksums, in its manifest; bring it and the folder to the disk."""
    sizes = {name: size for name, (size, _) in written.items()}
    manifest = {"step": step, **more, "files": sizes, "checksums": {name: checksum for name, (_, checksum) in written.items()}}
    manifest["checksum"] = own_checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (folder / MANIFEST, *(one for one in folder.rglob("*") if one.is_dir()), folder):
        flush(path)


def sizes_to_resume(args: Any) -> dict[str, int]:
    """Return the sizes of batches of the run that --resume continues, by name, and its step; {} where none is noted."""
    if not args.resume:
        return {}
    newest = reversed(step_folders(Path(args.output_dir) / "checkpoints"))
    for folder in newest if args.resume == "auto" else [Path(args.resume)]:
        try:
            manifest = read_manifest(folder)
        except UserError:  # is told when the checkpoint is chosen
            continue
        return {"step": manifest["step"], **manifest["sizes"]} if "sizes" in manifest else {}
    return {}


def settle(folder: Path, paths: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Bring files to the disk while the next ones are written. Returns size and checksum of each by its name in the folder."""
    with ThreadPoolExecutor() as pool:  # hashes and fsync let go of the interpreter
        pending = [(path, pool.submit(file_checksum, path), pool.submit(flush, path)) for path in paths]
        for _, _, flushed in pending:
            flushed.result()
        return {str(path.relative_to(folder)): (path.stat().st_size, checksum.result()) for path, checksum, _ in pending}


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_checksum(path: Path, kind: Callable[[], Any] = xxhash.xxh3_128) -> str:
    """Return the checksum of a file: XXH3 of 128 bits, at 7 GB/s a core where SHA-256 makes 1.3 with SHA instructions.

    It finds damage, not forgery; load_data keeps foreign files from running code.
    """
    state, block = kind(), bytearray(1 << 20)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            state.update(view[:size])
    return state.hexdigest()


def own_checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own checksum."""
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all there in full size. Raises UserError otherwise."""
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder; name one under output_dir/checkpoints, or use --resume alone.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    kinds = {"step": int, "marks": dict, "files": dict}
    if not isinstance(manifest, dict) or any(not isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{folder} is not a whole checkpoint ({MANIFEST} is missing or damaged); resume from an older one.")
    if "checksums" in manifest and manifest.get("checksum") != own_checksum(manifest):
        raise UserError(f"{folder} is damaged: {MANIFEST} does not match its own checksum; resume from an older one.")
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{folder} is half-written: {name} is missing or has another size; resume from an older one.")
    return manifest


def check_content(folder: Path) -> None:
    """Read every file of a checkpoint. Raises UserError for one whose bytes are not those that were written."""
    expected = read_manifest(folder).get("checksums", {})  # the oldest checkpoints have none

    def found(name: str) -> str:
        older = len(expected[name]) == 64
        return file_checksum(folder / name, hashlib.sha256 if older else xxhash.xxh3_128)

    try:
        with ThreadPoolExecutor() as pool:  # hashes let go of the interpreter
            damaged = [name for name, one in zip(expected, pool.map(found, expected), strict=True) if one != expected[name]]
    except OSError as error:
        raise UserError(f"{folder}: {error.filename} cannot be read ({error.strerror}); resume from an older one.") from error
    if damaged:
        raise UserError(f"{folder} is damaged: {damaged[0]} does not match its checksum; resume from an older one.")
