"""Decode on the CPU: the bits of the torch reference, several times faster where there is a faster way.

The torch decode is a chain of passes over every weight, with new memory for each. Faster are the format's own unpacking of
8-byte words (`BlockFormat.unpacker`), and libggml's routine where libggml-python is installed, which reads a block once and
writes its weights. Both go by chunks of rows that stay in a core's cache until they are rounded to 16 bits.
docs/decisions/torch-backend-on-cpu.md has the times. Source: ggml-quants.h dequantize_row_*.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import libggml, reference
from .formats import BlockFormat

CHUNK_WEIGHTS = 1 << 19  # a thread's at a time, 2 MiB in float32: a quarter of it takes a third longer, in calls from Python
SPANS_PER_THREAD = 2  # more than one, for balance; few, since handing one to a thread costs tens of microseconds
SPAN_WEIGHTS = 1 << 16  # at least
UNPACK_WEIGHTS = 1 << 20  # the same by unpacking, whose many short operations each wait for the interpreter's lock
KEPT_UNPACKERS = 4  # chunk sizes whose memory a thread keeps: a full and a last chunk of two layer shapes
_local = threading.local()

Routine = Callable[[int, int, int], None]


def serves(data: Tensor, dtype: torch.dtype, planes: bool) -> bool:
    """Tell whether rows can be decoded here: in file order, on the CPU, to a dtype products are computed in."""
    return data.device.type == "cpu" and not planes and dtype in (torch.float32, torch.bfloat16, torch.float16)


def dequantize(data: Tensor, fmt: BlockFormat, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decode packed rows uint8 [N, row bytes] (contiguous, file order) to [N, K] of `dtype`.

    float32 has libggml's bits, a 16-bit type is the float32 value rounded once; a NaN stays one, but of any bits.

    Args:
        out: contiguous [N, K] of `dtype` on the CPU to write to, or None for a new tensor.
    """
    n, k = data.shape[0], fmt.row_weights(data.shape[1])
    out = torch.empty(n, k, dtype=dtype, device="cpu") if out is None else out
    decode = decoder(fmt)
    if decode is not None:
        in_threads(n, k, decode.weights, lambda first, end: decode.rows(data[first:end], out[first:end]))
    else:
        step = max(1, CHUNK_WEIGHTS * torch.get_num_threads() // k)
        for start in range(0, n, step):
            out[start : start + step].copy_(reference.decode_rows(data[start : start + step], fmt))
    return out


class Decoder(NamedTuple):
    """Hold a fast way to decode rows: how many weights at a time, and rows(packed, out)."""

    weights: int
    rows: Callable[[Tensor, Tensor], None]


def decoder(fmt: BlockFormat) -> Decoder | None:
    """Return the fastest decoder of a format that runs on one thread, or None where only the torch reference is there."""
    if fmt.unpacker is not None:
        return Decoder(UNPACK_WEIGHTS, lambda data, out: _by_unpacking(data, fmt, out))
    routine = _routine(fmt)
    return None if routine is None else Decoder(CHUNK_WEIGHTS, lambda data, out: _by_libggml(routine, data, out))


def weight_scratch(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return this thread's scratch as [n, k] of `dtype`: fresh memory for every call costs more than the decode itself."""
    return memory("weight", n * k * dtype.itemsize).view(dtype).view(n, k)


def _by_unpacking(data: Tensor, fmt: BlockFormat, out: Tensor) -> None:
    """Unpack to codes and scales, multiply in float32, round."""
    blocks = data.view(-1, fmt.type_size)
    codes, scales = _unpacker(fmt, blocks.shape[0])(blocks)
    values = (out if out.dtype == torch.float32 else _floats(out.numel())).view(codes.shape).copy_(codes)
    groups = values.view(*scales.shape, -1)
    torch.mul(groups, scales[..., None], out=groups)
    if out.dtype != torch.float32:
        out.copy_(values.view(out.shape))


def _by_libggml(routine: Routine, data: Tensor, out: Tensor) -> None:
    values = out if out.dtype == torch.float32 else _floats(out.numel()).view(out.shape)
    routine(data.data_ptr(), values.data_ptr(), out.numel())
    if values is not out:
        out.copy_(values)


def in_threads(n: int, k: int, weights: int, work: Callable[[int, int], None], multiple: int = 1) -> None:
    """Give spans of n rows to as many threads as torch uses; each does work(first row, end) chunk by chunk of its span.

    Torch's own threads would meet after every operation: where cores are busy with other work, that took up to 100 times as long.

    Args:
        k: weights of a row.
        weights: of a chunk, about and at least a row; chunks of a span are equal.
        multiple: rows of spans and chunks are a multiple of this, but for the last ones.
    """
    threads = torch.get_num_threads()
    span = max(1, n) if threads == 1 else max(1, SPAN_WEIGHTS // k, -(-n // (SPANS_PER_THREAD * threads)))
    span = _up(span, multiple)
    chunks = -(-span // max(multiple, weights // k))
    step = _up(-(-span // chunks), multiple)

    def run(first: int) -> None:
        with torch.inference_mode():  # which may write to tensors made inside and outside of it
            for start in range(first, min(first + span, n), step):
                work(start, min(start + step, first + span, n))

    if span >= n:
        run(0)
    else:
        list(_pool(threads).map(run, range(0, n, span)))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _unpacker(fmt: BlockFormat, blocks: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return this thread's unpacker for so many blocks of a format that has one."""
    kept = _local.__dict__.setdefault("unpackers", {})
    if (fmt.name, blocks) not in kept:
        if len(kept) == KEPT_UNPACKERS:
            kept.clear()
        kept[fmt.name, blocks] = fmt.unpacker(blocks)  # type: ignore[misc]
    return kept[fmt.name, blocks]


def _floats(count: int) -> Tensor:
    return memory("floats", 4 * count).view(torch.float32)


def memory(name: str, size: int) -> Tensor:
    """Return this thread's memory of a name, uint8 [size]: kept from call to call, and grown where it is too small."""
    kept = getattr(_local, name, None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8, device="cpu")
        setattr(_local, name, kept)
    return kept[:size]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Start threads in which torch's operations run on one thread: each decodes a chunk of its own.

    torch.set_num_threads is a setting of the calling thread, and the default of threads that have not computed yet; so the
    default is put back when all have started.
    """
    pool = ThreadPoolExecutor(threads, "flux_kernels decode", initializer=_compute_alone)
    started = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(threads)
    return pool


def _compute_alone() -> None:
    """Let this thread's operations run on it alone.

    The first question or operation of a thread takes over the process's default, so it must come before the setting.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool's object, but none of its threads


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
