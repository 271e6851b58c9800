"""torch.empty as a kernel should fear it: full of NaN, and on the CPU with guard bytes on both sides.

Nobody may write the guards. In tests on a GPU there are none: a tensor inside a larger one would have other storage than a CUDA
graph's pool, an allocator's statistics or an offloading hook expect, and keeping all of them until a test ends could fill a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._device import _device_constructors

# Kept by torch from its first call on: it must not be of the torch.empty below
_device_constructors()

# Bytes on either side; a multiple of every alignment that kernels assume
GUARD = 64
POISON = 0xFF  # of every byte: NaN in all floating dtypes, -1 in signed integers


@contextmanager
def poisoned(guarded: tuple[str, ...] = ("cpu",)) -> Iterator[None]:
    """Make torch.empty return poisoned memory in the block, guarded on some types of device.

    Compilers, fake tensors, the meta device and calls with further options get torch's own.

    Raises AssertionError where a guard was written.
    """
    plain, made = torch.empty, []

    def empty(*size, dtype=None, device=None, **options):
        if options or torch.compiler.is_compiling():
            return plain(*size, dtype=dtype, device=device, **options)
        # Of no elements: what a default device or a mode makes of the arguments.
        like = plain(0, dtype=dtype, device=device)
        if type(like) is not torch.Tensor or like.is_meta:
            return plain(*size, dtype=dtype, device=device)
        if like.device.type not in guarded:
            result = plain(*size, dtype=dtype, device=device)
            if result.numel():
                result.view(-1).view(torch.uint8).fill_(POISON)
            return result
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        nbytes = shape.numel() * like.dtype.itemsize
        memory = plain(nbytes + 2 * GUARD, dtype=torch.uint8, device=device).fill_(POISON)
        made.append((memory, shape, like.dtype))
        return memory[GUARD : GUARD + nbytes].view(like.dtype).view(shape)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "empty", empty)
        yield
    for memory, shape, dtype in made:
        for side, guard in (("before", memory[:GUARD]), ("after", memory[-GUARD:])):
            assert bool((guard == POISON).all()), f"bytes {side} a tensor {list(shape)} of {dtype} were written"
