"""Compare results of a GPU, in one place.

A dry run without one replaces `fail`, and then runs everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fail(message: str) -> None:
    """Fail the test."""
    raise AssertionError(message)


def right(condition: bool, message: str) -> None:
    """Fail where the condition does not hold."""
    if not condition:
        fail(message)


def same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Fail where tensors differ in a value."""
    right(torch.equal(got, expected), f"{what}: {int((got != expected).sum())} of {got.numel()} values differ")


def error(got: Tensor, oracle: Tensor) -> float:
    """Return the norm of the difference from a float64 result."""
    return (got.double() - oracle).norm().item()


def within(got: Tensor, oracle: Tensor, allowed: float, what: str = "") -> None:
    """Fail where the error against float64 exceeds `allowed` plus half a rounding of the output.

    NaN fails.
    """
    slack = torch.finfo(got.dtype).eps * oracle.norm().item() / 2
    found = error(got, oracle)
    right(
        found <= allowed + slack, f"{what}: error {found:.4g}, allowed {allowed:.4g} and {slack:.4g} for the output's rounding"
    )
