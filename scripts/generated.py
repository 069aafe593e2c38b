"""Files that a command writes and the repository keeps: write them, or compare them with what is there."""

from collections.abc import Iterable
from pathlib import Path

from scripts.launch.platforms import ROOT


def write_files(wanted: dict[Path, str], existing: Iterable[Path], compare: bool, mode: int = 0o644) -> int:
    """Write the files that differ, or with ``compare`` only name them. Name those of ``existing`` that are not wanted.

    Returns 1 if ``compare`` finds a difference, else 0.
    """
    different = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    extra = sorted(set(existing) - wanted.keys())
    for path in different:
        word = "written"
        if compare:
            word = "differs" if path.is_file() else "missing"
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            path.chmod(mode)
        print(f"{path.relative_to(ROOT)}: {word}")
    for path in extra:
        print(f"{path.relative_to(ROOT)}: nothing makes it; remove it")
    print(f"{len(wanted)} files, {len(different)} {'differ or are missing' if compare else 'written'}")
    return int(compare and bool(different or extra))
