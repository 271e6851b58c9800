"""What every launch needs.

A kernel with all that stays the same from call to call, aligned rows, and the device guard.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._triton import interpreting
from ..compute import WIDEST_LOAD, Branch
from ..formats import Packed

_HERE = nullcontext()


class Launch:
    """Launch one kernel again and again on tensors of the same dtypes.

    Grid, integers and constants stay the same.

    Triton's own launch finds the compiled kernel anew from all arguments and options each time, 8 us of Python. What serves
    16-byte aligned tensors is kept here and launched directly, 3 us; other tensors take Triton's way, which compiles for them.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], integers: tuple[int, ...], constants: dict, options: dict | None = None
    ):
        """Prepare a launch.

        Args:
            kernel: JIT function whose parameters are pointers, then integers, then constexprs.
            grid: number of programs along each axis.
            integers: the values of its integer parameters.
            constants: its constexprs by name.
            options: num_warps, num_stages.
        """
        self.kernel, self.integers, self.constants, self.options = kernel, integers, constants, options or {}
        self.grid = (*grid, 1, 1)[:3]
        self._tail: tuple = ()
        self._launch_compiled: Any = None

    def __call__(self, aligned: bool, *pointers: Tensor | None) -> None:
        """Launch on the current stream of the current device.

        `aligned` tells that every tensor starts at a 16-byte address.
        """
        if aligned and self._launch_compiled is not None:
            self._launch_compiled(*pointers, *self._tail)
            return
        compiled = self.kernel[self.grid](*pointers, *self.integers, **self.constants, **self.options)
        if aligned and compiled is not None and not interpreting():  # the compile-time report launches nothing
            names = self.kernel.arg_names[len(pointers) + len(self.integers) :]
            self._tail = (*self.integers, *(self.constants[name] for name in names))
            self._launch_compiled = compiled[self.grid]


def all_aligned(*tensors: Tensor | None) -> bool:
    """Tell whether every tensor starts at an address that the widest load can take."""
    for tensor in tensors:  # a generator would take twice as long
        if tensor is not None and tensor.data_ptr() % WIDEST_LOAD:
            return False
    return True


def aligned(weight: Packed) -> Packed:
    """Return packed rows that start at a 16-byte address.

    Themselves, or for odd slices of a tensor a copy.

    Decoders read words where a block's own size allows it, which assumes that the first row is aligned; GPUs fault otherwise.
    """
    return weight if weight.data.data_ptr() % WIDEST_LOAD == 0 else weight._replace(data=weight.data.clone())


def table_of(weight: Packed) -> Tensor:
    """Return the format's lookup table where the rows are, or the rows as a pointer that no kernel reads."""
    return weight.fmt.table_on(weight.data.device) if weight.fmt.table is not None else weight.data


def pointers(branch: Branch | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the hidden [M, r] and up [N, r] of a branch, contiguous; (None, None) for no branch."""
    if branch is None:
        return None, None
    hidden, up = branch
    return hidden.contiguous(), up.contiguous()


@cache
def processors_of(device: torch.device) -> int | None:
    """Return how many multiprocessors a card has, or None on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's device current during a launch: Triton launches on the current device."""
    device = tensor.device
    if device.type == "cpu":  # Triton's interpreter
        return _HERE
    module = torch.get_device_module(device)
    return _HERE if module.current_device() == device.index else module.device(device)
