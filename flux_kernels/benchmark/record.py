"""Record results: tidy CSV files whose rows have device, driver, versions, commit and date."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from .._triton import TRITON_VERSION
from ..files import written_whole
from ..report.amounts import counted
from ..torch_backend import libggml
from ..version import installed_version

CHECKOUT = Path(__file__).parents[2]
ORIGIN = ("device", "capability", "driver", "torch", "triton", "libggml", "commit", "date")  # columns of every row
_NONE = "none"


def origin(device: torch.device) -> dict[str, str]:
    """Return the origin columns of every result row."""
    on_gpu = device.type == "cuda"
    return dict(
        device=torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        capability=".".join(map(str, torch.cuda.get_device_capability(device))) if on_gpu else "",
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        torch=torch.__version__,
        triton=TRITON_VERSION or "",
        libggml="" if on_gpu else _libggml(),
        commit=commit(),
        date=datetime.date.today().isoformat(),
    )


def origin_text(row: Mapping[str, object]) -> str:
    """Write a row's origin as one line: device, versions, commit and date, as far as columns are filled."""
    named = ("driver", "torch", "triton", "libggml", "commit")
    parts = [str(row[key]) if key not in named else f"{key} {row[key]}" for key in ("device", *named, "date") if row.get(key)]
    return ", ".join(parts).replace(f"libggml {_NONE}", "no libggml")


def commit() -> str:
    """Return $FLUX_KERNELS_COMMIT, else the checkout's commit, with "+" where files differ from it.

    Where this is an installed package, or git is missing, it is the version.
    """
    named = os.environ.get("FLUX_KERNELS_COMMIT")
    if named or not (CHECKOUT / ".git").exists() or shutil.which("git") is None:
        from ..version import own_version

        return named or f"version {own_version()}"
    changed = _output("git", "-C", str(CHECKOUT), "status", "--porcelain", "--untracked-files=no", "--", "flux_kernels")
    return _output("git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD") + ("+" if changed else "")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a result file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(rows: list[dict], path: Path) -> None:
    """Write rows of equal keys to a CSV file, which appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_csv(row: dict, path: Path) -> None:
    """Add a row to a CSV file of the same columns, or begin the file.

    Raises:
        ValueError: where the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            there = next(csv.reader(file), [])
        if there != list(row):
            raise ValueError(f"{path} has other columns than this version writes. Move it away or name another file.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"{os.cpu_count()}-core CPU {platform.machine()}, {counted(threads, 'thread')}"


def _libggml() -> str:
    """Return the version of what decodes most types on a CPU, where it is installed."""
    if not libggml.available():
        return _NONE
    return installed_version("libggml-python") or "of unknown version"


def _output(*command: str) -> str:
    """Return a command's first line of output, or "" where it cannot run (a GPU machine may have no git)."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
