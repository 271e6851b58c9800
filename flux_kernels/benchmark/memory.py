"""How much memory is free, and how much a call takes at its peak beyond what was there before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, None where the system does not tell."""
    if device.type == "cuda":
        # What torch holds but does not use counts as free.
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def extra_peak(function: Callable[[], object], device: torch.device) -> int | None:
    """Run a function; return the peak of its memory in bytes beyond what was held before, None where it cannot be read.

    On a GPU what torch allocates; on a CPU the process's resident memory, which Linux alone tells.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _CLEAR.write_text("5")  # resets the peak, VmHWM
    except OSError:
        function()
        return None
    before_resident = _kilobytes(_STATUS, "VmRSS")
    function()
    peak = _kilobytes(_STATUS, "VmHWM")
    return None if peak is None or before_resident is None else max(0, peak - before_resident)


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else 1024 * int(found.split()[1])
