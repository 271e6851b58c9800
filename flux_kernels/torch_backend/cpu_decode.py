"""Decode on the CPU with the bits of the torch reference, several times faster.

The torch decode is a chain of passes over every weight, with new memory for each. Faster are the format's own unpacking of
8-byte words (`BlockFormat.unpacker`), and libggml's routine where libggml-python is installed, which reads a block once and
writes its weights. Both go by chunks of rows that stay in a core's cache until they are rounded to 16 bits.
docs/decisions/torch-backend-on-cpu.md has the times. Source: ggml-quants.h dequantize_row_*.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import BlockFormat, Packed
from . import libggml, reference
from .cpu_threads import Scratch, share_rows

# What a thread decodes at a time, 2 MiB in float32: a quarter of it takes a third longer, in calls from Python.
CHUNK_WEIGHTS = 1 << 19
# What a thread unpacks at a time: its many short operations each wait for the interpreter's lock.
UNPACK_WEIGHTS = 1 << 20

Routine = Callable[[int, int, int], None]


def serves(weight: Packed, dtype: torch.dtype) -> bool:
    """Tell whether rows can be decoded here.

    They have to be in file order, on the CPU, and decoded to a dtype products are computed in.
    """
    on_cpu = weight.data.device.type == "cpu"
    return on_cpu and not weight.planes and dtype in (torch.float32, torch.bfloat16, torch.float16)


def dequantize(weight: Packed, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decode a weight, contiguous in file order, to [N, K] of `dtype`.

    float32 has libggml's bits, a 16-bit type is the float32 value rounded once; a NaN stays a NaN, but of any bits.

    Args:
        out: contiguous [N, K] of `dtype` on the CPU to write to, or None for a new tensor.
    """
    data, n, k = weight.data, weight.n, weight.k
    out = torch.empty(n, k, dtype=dtype, device="cpu") if out is None else out
    decode = decoder(weight.fmt)
    if decode is not None:
        share_rows(n, k, decode.weights, lambda first, end, scratch: decode.rows(data[first:end], out[first:end], scratch))
    else:
        step = max(1, CHUNK_WEIGHTS * torch.get_num_threads() // k)
        for start in range(0, n, step):
            out[start : start + step].copy_(reference.decode_rows(weight.rows(slice(start, start + step))))
    return out


class Decoder(NamedTuple):
    """Hold a fast way to decode rows: how many weights at a time, and rows(packed, out, scratch)."""

    weights: int
    rows: Callable[[Tensor, Tensor, Scratch], None]


def decoder(fmt: BlockFormat) -> Decoder | None:
    """Return the fastest decoder of a format that runs on one thread.

    None where only the torch reference is there.
    """
    if fmt.unpacker is not None:
        return Decoder(UNPACK_WEIGHTS, lambda data, out, scratch: _by_unpacking(data, fmt, out, scratch))
    routine = _routine(fmt)
    if routine is None:
        return None
    return Decoder(CHUNK_WEIGHTS, lambda data, out, scratch: _by_libggml(routine, data, out, scratch))


def _by_unpacking(data: Tensor, fmt: BlockFormat, out: Tensor, scratch: Scratch) -> None:
    """Unpack to codes and scales, multiply in float32, round."""
    blocks = data.view(-1, fmt.type_size)
    codes, scales = scratch.unpacker(fmt, blocks.shape[0])(blocks)
    values = _values(out, scratch).view(codes.shape).copy_(codes)
    groups = values.view(*scales.shape, -1)
    torch.mul(groups, scales[..., None], out=groups)
    if out.dtype != torch.float32:
        out.copy_(values.view(out.shape))


def _by_libggml(routine: Routine, data: Tensor, out: Tensor, scratch: Scratch) -> None:
    values = _values(out, scratch)
    routine(data.data_ptr(), values.data_ptr(), out.numel())
    if values is not out:
        out.copy_(values)


def _values(out: Tensor, scratch: Scratch) -> Tensor:
    """Return where float32 values go before they are rounded: to `out` itself if they are not."""
    return out if out.dtype == torch.float32 else scratch.tensor("values", torch.float32, *out.shape)


@cache
def _routine(fmt: BlockFormat) -> Routine | None:
    """Return libggml's row function of a format (source, target, count), or None where there is none."""
    if not libggml.available():
        return None
    routine = getattr(libggml.library(), f"dequantize_row_{fmt.name.lower().replace('_k', '_K')}", None)
    if routine is not None:
        routine.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        routine.restype = None
    return routine
