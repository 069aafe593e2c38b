"""A checkpoint's folder changes all at once, or as near to it as files allow: written in a draft, moved when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.prefix import PREFIX_FILE


@contextmanager
def new_draft(folder: Path) -> Iterator[Path]:
    """An empty hidden folder in ``folder`` for what publish moves; what a save that was killed left there is removed. Of one
    that fails inside nothing stays.

    In the folder, not beside it: the folder may be "." or on a disk of its own, and its parent may be another user's.
    """
    draft, made = folder / ".draft", not folder.exists()
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(folder if made else draft, ignore_errors=True)
        raise


def publish(draft: Path, folder: Path) -> None:
    """Move the files of ``draft`` into ``folder``, which may hold other things (metrics, checkpoints of the run);
    config.json goes last. All files get its permissions: safetensors makes files that only their owner may read.
    """
    mode = (draft / "config.json").stat().st_mode
    for file in (path for path in draft.rglob("*") if path.is_file()):
        file.chmod(mode)
    (folder / "config.json").unlink(missing_ok=True)  # from here on the old checkpoint does not count
    for old in [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*"), *folder.glob("adapter_*")]:
        old.unlink()
    (folder / PREFIX_FILE).unlink(missing_ok=True)
    for file in sorted(draft.iterdir(), key=lambda file: file.name == "config.json"):
        target = folder / file.name
        if target.is_dir():
            shutil.rmtree(target)
        file.replace(target)
    draft.rmdir()
