"""Measure the free memory of a GPU, or of the computer within this process's control groups.

Source: the kernel's documentation, proc.rst (MemAvailable), cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class _Hierarchy(NamedTuple):
    """Name the files of a hierarchy of control groups.

    Attributes:
        folder: of the hierarchy.
        limit: file with the bytes that may be used.
        usage: file with those in use.
        pages: keys of memory.stat that count pages of files, which are given back on demand.
    """

    folder: str
    limit: str
    usage: str
    pages: tuple[str, ...]


_V2 = _Hierarchy("", "memory.max", "memory.current", ("active_file", "inactive_file"))
_V1 = _Hierarchy("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, None where the system does not say.

    Args:
        device: a GPU, whose unused share of what torch holds counts as free, or the CPU.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    system = _meminfo("MemAvailable")
    if system is None:
        return _elsewhere("available")
    return max(0, min([system, *(limit - used for limit, used in _limits())]))


def total_bytes() -> int | None:
    """Return the bytes of memory that this process may ever have, None where the system does not say."""
    system = _meminfo("MemTotal")
    return _elsewhere("total") if system is None else min([system, *(limit for limit, _ in _limits())])


def _meminfo(key: str) -> int | None:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    # Not Linux.
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def _elsewhere(what: str) -> int | None:
    """Ask psutil, which accelerate brings."""
    try:
        import psutil
    except ImportError:
        return None
    return getattr(psutil.virtual_memory(), what)


def _limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use) of this process's control groups and those around them.

    Bytes that are given back on demand are not in use.
    """
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        hierarchy = _V1 if controllers else _V2
        root = _CGROUPS / hierarchy.folder
        group = root / path.lstrip("/")
        # A container may see its own group as the root, whatever the path says.
        for place in (group, *group.parents):
            if not place.is_relative_to(root):
                break
            limit = _limit(place, hierarchy)
            if limit is not None:
                yield limit


def _limit(group: Path, hierarchy: _Hierarchy) -> tuple[int, int] | None:
    """Return (limit, bytes in use without pages of files) of a group, None where it has no limit."""
    try:
        most = (group / hierarchy.limit).read_text().strip()
        used = int((group / hierarchy.usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if most == "max":
        return None
    return int(most), max(0, used - sum(int(stat.get(name, 0)) for name in hierarchy.pages))
