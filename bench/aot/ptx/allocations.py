"""Treat tensors as a GPU's memory: each storage is a buffer, of which a kernel may touch its parts.

What `torch.empty` returned counts as never written until a kernel or torch writes it, through all launches of a call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .faults import Fault
from .launch import Buffer, Pointer
from .memory import POISON


class Allocations:
    """Keep a Buffer for every storage that kernels saw or that `torch.empty` made."""

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Buffer, torch.UntypedStorage]] = {}
        self._seen: dict[int, np.ndarray] = {}  # bytes after the last launch, to notice what torch wrote in between

    def recording(self, empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a torch.empty whose tensors are poisoned and count as never written."""

        def poisoned(*sizes, **options) -> Tensor:
            tensor = empty(*sizes, **options)
            if tensor.device.type == "cpu" and tensor.numel():
                buffer = self._buffer(tensor)
                buffer.raw[:] = POISON
                buffer.written = np.zeros(buffer.raw.size, bool)
                self._seen[_key(tensor)] = buffer.raw.copy()
            return tensor

        return poisoned

    def pointers(self, tensors: list[Tensor]) -> list[Pointer]:
        """Return where each tensor begins; their storages may be touched where any of them has elements."""
        allowed: dict[int, np.ndarray] = {}
        pointers = []
        for tensor in tensors:
            buffer = self._buffer(tensor)
            self._notice_torch(tensor, buffer)
            elements = _elements(tensor, buffer.raw.size)
            buffer.allowed = allowed[_key(tensor)] = allowed.get(_key(tensor), False) | elements
            pointers.append(Pointer(buffer, tensor.storage_offset() * tensor.element_size()))
        return pointers

    def after_launch(self, pointers: list[Pointer]) -> None:
        """Remember the bytes of buffers that still have unwritten parts."""
        for key, (buffer, _) in self._buffers.items():
            if buffer.written is not None and any(pointer.buffer is buffer for pointer in pointers):
                self._seen[key] = buffer.raw.copy()

    def check(self, tensor: Tensor) -> Tensor:
        """Return the tensor; raise Fault where an element of it was never written."""
        buffer = self._buffer(tensor)
        self._notice_torch(tensor, buffer)
        if buffer.written is not None:
            missing = int((_elements(tensor, buffer.raw.size) & ~buffer.written).sum()) // tensor.element_size()
            if missing:
                raise Fault(f"{missing} of {tensor.numel()} elements of an output were never written")
        return tensor

    def _buffer(self, tensor: Tensor) -> Buffer:
        storage = tensor.untyped_storage()
        known = self._buffers.get(storage.data_ptr())
        if known is None or known[0].raw.size != storage.nbytes():
            known = self._buffers[storage.data_ptr()] = (Buffer(_bytes(storage)), storage)
        return known[0]

    def _notice_torch(self, tensor: Tensor, buffer: Buffer) -> None:
        """Count a buffer as written throughout where its bytes changed outside a kernel."""
        if buffer.written is not None and not np.array_equal(buffer.raw, self._seen[_key(tensor)]):
            buffer.written = None


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()


def _elements(tensor: Tensor, size: int) -> np.ndarray:
    """Return one bool per byte of the tensor's storage: whether it belongs to an element of the tensor."""
    each = tensor.element_size()
    flags = torch.zeros(size // each, dtype=torch.uint8)
    flags.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(1)
    return flags.numpy().astype(bool).repeat(each)
