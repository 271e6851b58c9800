"""Recorded results: what a number needs beside it (device, driver, versions, commit, date), and tidy CSV files."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from pathlib import Path

import torch

from flux_kernels._triton import TRITON_VERSION


def origin(device: torch.device) -> dict[str, str]:
    """Return the origin columns of every result row."""
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        capability=".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else "",
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device.type == "cuda" else "",
        torch=torch.__version__,
        triton=TRITON_VERSION or "",
        commit=_output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        date=datetime.date.today().isoformat(),
    )


def write_csv(rows: list[dict], path: Path) -> None:
    """Write rows of equal keys to a CSV file, beside it first and then renamed."""
    beside = path.with_suffix(".tmp")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)


def _output(*command: str) -> str:
    """Return a command's first line of output, or "" where it cannot run (a GPU machine may have no git)."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().partition("\n")[0]
