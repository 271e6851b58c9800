"""What every launch needs: the constants a kernel takes from a format's row, and the device guard."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ..formats import BlockFormat
from ..low_rank import Branch

_WIDEST_LOAD = 16  # bytes


def aligned(data: Tensor) -> Tensor:
    """Return packed rows that start at a 16-byte address: themselves, or for odd slices of a tensor a copy.

    Decoders read words where a block's own size allows it, which assumes that the first row is aligned; GPUs fault otherwise.
    """
    return data if data.data_ptr() % _WIDEST_LOAD == 0 else data.clone()


def table_of(fmt: BlockFormat, data: Tensor) -> Tensor:
    """Return the format's lookup table on data's device, or `data` itself as the pointer nobody reads."""
    return fmt.table_on(data.device) if fmt.table is not None else data


def format_constants(fmt: BlockFormat, row_bytes: int, planes: bool) -> dict:
    """Return the constexprs of packed rows of `row_bytes` bytes."""
    num_blocks = row_bytes // fmt.type_size
    k = num_blocks * fmt.block_size
    return dict(K=k, DECODE=fmt.decode_tile, NUM_BLOCKS=num_blocks, ROW_BYTES=row_bytes, PLANES=planes)


def pointers(branch: Branch | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Return the hidden [M, r] and up [N, r] of a branch, contiguous, and r; (None, None, 0) without one."""
    if branch is None:
        return None, None, 0
    hidden, up = branch
    return hidden.contiguous(), up.contiguous(), hidden.shape[1]


@cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return an NVIDIA card's compute capability, or None on other devices."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


@cache
def processors_of(device: torch.device) -> int | None:
    """Return how many multiprocessors a card has, or None on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the tensor's device current during a launch: Triton launches on the current device."""
    if tensor.device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
