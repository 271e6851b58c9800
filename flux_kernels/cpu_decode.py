"""Decode on the CPU with libggml's own routines where libggml-python is installed: the same bits, several times faster.

ggml reads a block once and writes its weights; the torch decode is a chain of elementwise passes over every weight. On one
core 3072 x 3072 of Q4_K to bfloat16 take 3 ms instead of 14 (docs/decisions/torch-backend-on-cpu.md). Row chunks go to as many
threads as torch uses; each converts a chunk that is still in its cache. Source: ggml-quants.h dequantize_row_*, ggml.h
ggml_fp32_to_bf16_row and ggml_fp32_to_fp16_row.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from . import libggml
from .formats import BlockFormat

CHUNK_WEIGHTS = 1 << 16  # 256 KiB in float32: stays in a core's cache until it is converted
_CONVERTERS = {torch.bfloat16: "ggml_fp32_to_bf16_row", torch.float16: "ggml_fp32_to_fp16_row", torch.float32: None}
_local = threading.local()


def serves(data: Tensor, fmt: BlockFormat, dtype: torch.dtype, planes: bool) -> bool:
    """Tell whether rows can be decoded here: in file order, on the CPU, of a type and to a dtype that libggml has."""
    return data.device.type == "cpu" and not planes and dtype in _CONVERTERS and _routine(fmt) is not None


def dequantize(data: Tensor, fmt: BlockFormat, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Decode packed rows uint8 [N, row bytes] (contiguous, file order) to [N, K] of `dtype`.

    Args:
        out: contiguous [N, K] of `dtype` on the CPU to write to, or None for a new tensor.
    """
    n, k = data.shape[0], fmt.row_weights(data.shape[1])
    out = torch.empty(n, k, dtype=dtype) if out is None else out
    step = max(1, CHUNK_WEIGHTS // k)
    starts = range(0, n, step)
    source, target = data.data_ptr(), out.data_ptr()
    row_bytes, out_bytes = data.shape[1], k * out.element_size()
    routine, convert = _routine(fmt), _function(_CONVERTERS[dtype])

    def decode(start: int) -> None:
        weights = min(step, n - start) * k
        to = target + start * out_bytes
        if convert is None:
            routine(source + start * row_bytes, to, weights)
        else:
            buffer = _buffer(step * k)
            routine(source + start * row_bytes, buffer, weights)
            convert(buffer, to, weights)

    threads = torch.get_num_threads()
    if threads == 1 or len(starts) < 2:
        for start in starts:
            decode(start)
    else:
        list(_pool(threads).map(decode, starts))
    return out


def weight_scratch(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Return this thread's scratch as [n, k] of `dtype`: fresh memory for every call costs more than the decode itself."""
    size = n * k * dtype.itemsize
    scratch = getattr(_local, "scratch", None)
    if scratch is None or scratch.numel() < size:
        scratch = _local.scratch = torch.empty(size, dtype=torch.uint8)
    return scratch[:size].view(dtype).view(n, k)


def _buffer(weights: int) -> int:
    """Return the address of this thread's float32 buffer."""
    if getattr(_local, "size", 0) < weights:
        _local.buffer, _local.size = torch.empty(weights), weights
    return _local.buffer.data_ptr()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="flux_kernels decode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool's object, but none of its threads


@cache
def _routine(fmt: BlockFormat) -> Callable[[int, int, int], None] | None:
    if not libggml.available():
        return None
    return _function(f"dequantize_row_{fmt.name.lower().replace('_k', '_K')}")


@cache
def _function(name: str | None) -> Callable[[int, int, int], None] | None:
    """Return one of libggml's row functions (source, target, count), or None where this libggml lacks it."""
    function = getattr(libggml.library(), name, None) if name else None
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
    return function
