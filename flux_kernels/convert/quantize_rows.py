"""Make one tensor of the file: read, decode, check and quantize rows in slabs, by several threads."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats import PLAIN_TYPES, BlockFormat, block_format, get_format
from ..mixed.low_rank_fit import corrected
from ..ops import dequantize
from ..packing import Engine, quantize
from ..source.source import SourceTensor
from .choose_types import Choice

# Weights a thread has in work: float32, source and scratch are about 12 bytes.
SLAB_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 25}


@dataclass(frozen=True)
class Work:
    """Say how tensors are made: threads, device, engine, and what is called with source bytes done."""

    threads: ThreadPoolExecutor
    device: torch.device
    engine: Engine
    done: Callable[[int], None]


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Start threads that run torch one-threaded: slabs of rows scale better than single operations."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="quantize", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def make_tensor(source: SourceTensor, type_name: str, importance: Tensor | None, work: Work) -> Tensor:
    """Return a tensor as the file holds it, on the CPU.

    Raises:
        FormatError: where weights are NaN, infinite, or beyond a 16-bit type; the tensor is named.
    """
    fmt = block_format(type_name)
    rows, width = source.rows, prod(source.shape[1:])
    if fmt is None:
        result = _empty(tuple(source.shape), PLAIN_TYPES[type_name].dtype)
    else:
        result = _empty((*source.shape[:-1], fmt.row_bytes(source.shape[-1], source.name)), torch.uint8)
    step = max(1, SLAB_WEIGHTS.get(work.device.type, SLAB_WEIGHTS["cuda"]) // max(1, width))
    if len(source.shape) < 2:
        # Blocks of a vector span its rows.
        step = max(1, rows)

    def slab(start: int, stop: int) -> int:
        rows = _slab(source, type_name, fmt, importance, start, stop, work)
        if source.shape:
            (result if len(source.shape) < 2 else result[start:stop]).copy_(rows)
        else:
            result.copy_(rows.reshape(()))
        return stop - start

    jobs = [work.threads.submit(slab, start, min(start + step, rows)) for start in range(0, rows, step)]
    try:
        reported, finished = 0, 0
        for job in as_completed(jobs):
            finished += job.result()
            work.done(source.nbytes * finished // rows - reported)
            reported = source.nbytes * finished // rows
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    return result


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Make a tensor in pages of its own, which go back when it is freed.

    malloc keeps what was freed, up to twice the largest piece: with tensors of any size among it the peak was 90 to 200 MB, by
    chance.
    """
    nbytes = prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype)


def make_corrected(
    source: SourceTensor, choice: Choice, importance: Tensor | None, seen: Tensor | None, work: Work
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Quantize a matrix with its low-rank correction as `measure` does: the whole matrix in float32.

    Args:
        seen: the inputs' covariance [K, K] or importance [K], which the correction is fitted to.

    Returns:
        The packed rows, and down [r, K] and up [N, r] in 16 bit.
    """
    weight = source.read(0, source.rows, work.device)
    _check_finite(source, weight, 0)
    fmt = get_format(choice.types[source.name])
    weighted = None if importance is None else importance.to(work.device)
    # Decoded and packed of every turn.
    tried: list[tuple[Tensor, Tensor]] = []

    def round_trip(part: Tensor) -> Tensor:
        packed = quantize(part, fmt, weighted, name=source.name, engine=work.engine)
        tried.append((dequantize(packed, fmt), packed))
        return tried[-1][0]

    decoded, down, up = corrected(weight.float(), round_trip, choice.ranks[source.name], seen)
    (packed,) = (packed for candidate, packed in tried if candidate is decoded)
    work.done(source.nbytes)
    return packed.cpu(), (down.cpu(), up.cpu())


def _slab(
    source: SourceTensor, type_name: str, fmt: BlockFormat | None, importance: Tensor | None, start: int, stop: int, work: Work
) -> Tensor:
    # Nothing to convert: the bytes move.
    if source.type == type_name:
        rows = source.raw(start, stop)
        if fmt is None:
            _check_finite(source, rows, start)
        return rows
    weights = source.read(start, stop, work.device)
    _check_finite(source, weights, start)
    if fmt is None:
        return _narrowed(source, weights, type_name, start).cpu()
    weight = None if importance is None else importance.to(work.device)
    return quantize(weights, fmt, weight, name=source.name, engine=work.engine).cpu()


def _narrowed(source: SourceTensor, weights: Tensor, type_name: str, start: int) -> Tensor:
    narrowed = weights.to(PLAIN_TYPES[type_name].dtype)
    lost = ~torch.isfinite(narrowed)
    if lost.any():
        raise FormatError(
            f"{source.name} holds {float(weights[lost][0]):g} in row {_row(lost, start)}, which {type_name} cannot. Use "
            '--rule new, which stores such tensors in F32 or BF16, or --tensor-type "NAME=F32".'
        )
    return narrowed


def _check_finite(source: SourceTensor, weights: Tensor, start: int) -> None:
    bad = ~torch.isfinite(weights)
    if bad.any():
        raise FormatError(
            f"{source.name} holds {int(bad.sum())} values that are NaN or infinite (first in row {_row(bad, start)}). The source "
            "is damaged or a failed merge: get it again."
        )


def _row(bad: Tensor, start: int) -> int:
    return start + int(bad.reshape(bad.shape[0] if bad.dim() else 1, -1).any(1).nonzero()[0])
