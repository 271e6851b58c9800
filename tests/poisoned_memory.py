"""torch.empty as a kernel should fear it: full of NaN, with guard bytes on both sides.

Nobody may write the guards.
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
def poisoned() -> Iterator[None]:
    """Make torch.empty return poisoned, guarded memory in the block.

    Raises AssertionError where a guard was written.
    """
    plain, made = torch.empty, []

    def empty(*size, dtype=None, device=None, **options):
        dtype = dtype or torch.get_default_dtype()
        if options or torch.device(device or "cpu").type == "meta":
            return plain(*size, dtype=dtype, device=device, **options)
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        nbytes = shape.numel() * dtype.itemsize
        memory = plain(nbytes + 2 * GUARD, dtype=torch.uint8, device=device).fill_(POISON)
        if not memory.is_meta:  # in a block of torch.device("meta")
            made.append((memory, shape, dtype))
        return memory[GUARD : GUARD + nbytes].view(dtype).view(shape)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "empty", empty)
        yield
    for memory, shape, dtype in made:
        for side, guard in (("before", memory[:GUARD]), ("after", memory[-GUARD:])):
            assert bool((guard == POISON).all()), f"bytes {side} a tensor {list(shape)} of {dtype} were written"
