"""Memory that the container allows, which the host's free memory says nothing about."""

import math
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# Of cgroup version 2 and 1: the limit, what is taken, statistics, and how their keys begin.
VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
)


def container_limit(root: Path = CGROUPS) -> float | None:
    """Return the bytes that the container may take; None without a limit."""
    for name, *_ in VERSIONS:
        path = root / name
        if path.is_file() and (text := path.read_text().strip()).isdigit() and int(text) < 2**60:
            return float(text)
    return None


def container_free(root: Path = CGROUPS) -> float:
    """Return the bytes that the container may still take; infinite without a limit. Cached files count as free."""
    limit = container_limit(root)
    if limit is None:
        return math.inf
    for _, taken, statistics, prefix in VERSIONS:
        try:
            used = float((root / taken).read_text())
            stat = dict(line.split() for line in (root / statistics).read_text().splitlines())
        except (OSError, ValueError):  # the other version's, or a kernel that does not say
            continue
        cached = sum(float(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        return max(limit - used + cached, 0.0)
    return limit
