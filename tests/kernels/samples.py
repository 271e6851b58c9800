"""Packed rows for kernel tests, from golden bytes: nothing here goes through the library's own layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    """Load a type's golden vectors as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def finite_rows(name: str, n: int, repeats: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n packed rows of K = 512 * repeats weights and their float32 values, libggml's.

    All are finite and moderate.
    """
    vectors = golden(name)
    # Gaussian, Student-t, half zero, all positive, outliers; not the tiny and the huge row
    rows = [0, 1, 3, 4, 5]
    picks = torch.arange(n * repeats) * 7 % len(rows)
    order = torch.tensor(rows)[picks].view(n, repeats)
    return vectors["q"][order].flatten(1), vectors["y"][order].flatten(1)
