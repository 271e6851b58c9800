"""Run what the library compiles for another card on this GPU: the driver translates the PTX.

    with compiled_for(CARDS["RTX 3090"]):
        y = fk.linear(x, data, "Q4_K", compute="int8")      # sm_86's choices, tiles and code, on a Hopper

It shows whether that code is right; its speed says nothing about the other card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from bench.stand_in import Card, forget


@contextmanager
def compiled_for(card: Card) -> Iterator[None]:
    """Let the library choose and compile for `card`, of at most the GPU's capability, in the context."""
    real, compile_for_real = triton.runtime.driver.active, triton.compiler.compile
    forget()
    triton.runtime.driver.set_active(_Translating(real, card))
    try:
        with (
            mock.patch.object(triton.compiler, "compile", _keeping_ptx(compile_for_real)),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: card.capability),
            mock.patch.object(torch.cuda, "get_device_name", lambda device=None: card.name),
            mock.patch.object(torch.cuda, "get_device_properties", card.properties),
        ):
            yield
    finally:
        triton.runtime.driver.set_active(real)
        forget()


def _keeping_ptx(compile: Callable) -> Callable:
    """Return a compiler whose kernels are loaded from their PTX."""

    def compile_to_ptx(*args, **kwargs):
        kernel = compile(*args, **kwargs)
        if "ptx" in getattr(kernel, "asm", ()):
            kernel.kernel = kernel.asm["ptx"].encode() + b"\0"
        return kernel

    return compile_to_ptx


class _Passing:
    """Pass on to something real what is not answered here."""

    def __init__(self, real, card: Card):
        self._real, self._card = real, card

    def __getattr__(self, name: str):
        return getattr(self._real, name)


class _Translating(_Passing):
    """Be the real driver, but for the target and the limits."""

    def __init__(self, real, card: Card):
        super().__init__(real, card)
        self.utils = _Utils(real.utils, card)

    def get_current_target(self) -> GPUTarget:
        return self._card.target


class _Utils(_Passing):
    """Be the real driver's functions, but for the limits."""

    def get_device_properties(self, device: int) -> dict:
        return dict(self._real.get_device_properties(device)) | self._card.limits
