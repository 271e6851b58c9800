"""Be an absent card's driver: the library's own launches compile for it and run in the interpreter.

Triton asks its driver for the target, hands it the compiled code and launches through it. This one names the target it was made for,
takes PTX in place of machine code (ptxas is left out, which halves the time) and executes it on the CPU tensors of the call. So
specialization, argument order, grids, tiles, shared-memory limits and every buffer in between are the library's own.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from bench.stand_in import forget_choices

from ..cards import CARDS
from .allocations import Allocations
from .block import Executable
from .launch import launch
from .parse import parse
from .threads import Counts

_STAGES_KEY = "ptx in place of machine code"
_WARP = 32


class AbsentCard:
    """Answer Triton's questions for a card of one capability, and run what it launches.

    Attributes:
        order: draws the order of warps between barriers; None runs the threads of a block in step.
        division_error: units in the last place by which div.full.f32 is off.
        count_banks, copies_need_fence: see `launch`.
        launches: (kernel name, Counts) of every launch so far.
        allocations: the tensors that kernels saw; `allocations.check(y)` faults where y holds what nobody wrote.
    """

    def __init__(self, capability: int, order: np.random.Generator | None = None, division_error: int = 0):
        self.capability = capability
        self.order = order
        self.division_error = division_error
        self.count_banks = False
        self.copies_need_fence = True
        self.launches: list[tuple[str, Counts]] = []
        self.allocations = Allocations()
        self.launcher_cls = _Launcher
        properties = {"max_shared_mem": CARDS[capability].shared_per_block, "warpSize": _WARP, "multiprocessor_count": 1}
        self.utils = SimpleNamespace(load_binary=_load, get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self.capability, _WARP)

    def get_current_device(self) -> int:
        """Return a number that tells cards apart: Triton keeps what it compiled by it."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Return the only stream there is."""
        return 0

    def run(self, name: str, code: Executable, grid: tuple, arguments: list, shared_bytes: int) -> None:
        """Execute one launch on CPU tensors and integers."""
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        pointers = self.allocations.pointers(tensors)
        places = iter(pointers)
        bound = [next(places) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        options = dict(count_banks=self.count_banks, copies_need_fence=self.copies_need_fence)
        counts = launch(code, grid, bound, shared_bytes, self.order, self.division_error, **options)
        self.launches.append((name, counts))
        self.allocations.after_launch(pointers)


class _Launcher:
    """Stand for Triton's C launcher: called with the grid, the loaded code and all arguments."""

    def __init__(self, source, metadata):
        self._runtime = [position for position, kind in enumerate(source.signature.values()) if kind != "constexpr"]
        self._shared_bytes = metadata.shared
        self._name = metadata.name

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments) -> None:
        values = [arguments[position] for position in self._runtime]
        triton.runtime.driver.active.run(self._name, function, (x, y, z), values, self._shared_bytes)


def _load(name: str, code: bytes, shared: int, device: int) -> tuple:
    """Return (module, function, registers, spills, most threads), as a driver does."""
    return name, _executable(code), 0, 0, 1024


@cache
def _executable(code: bytes) -> Executable:
    return Executable(parse(code.decode()))


def _ptx_alone(backend=None, stages=None, options=None, language=None, capability=None):
    """Replace ptxas among Triton's stages; without arguments, return what tells its cache entries apart."""
    if stages is None:
        return _STAGES_KEY, hashlib.sha256(_STAGES_KEY.encode()).hexdigest()
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


@contextmanager
def absent_card(capability: int, order: np.random.Generator | None = None, division_error: int = 0) -> Iterator[AbsentCard]:
    """Launch kernels as on a card of `capability` (such as 89), in the interpreter.

    Kernels must have been decorated to be compiled, not for Triton's own interpreter (TRITON_INTERPRET=0).
    """
    from flux_kernels import compute

    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels were decorated for Triton's interpreter; start the process with TRITON_INTERPRET=0")
    card, driver, empty = AbsentCard(capability, order, division_error), triton.runtime.driver, torch.empty
    own_capability = compute.capability_of
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("flux_kernels")]
    replaced = [module for module in modules if getattr(module, "capability_of", None) is own_capability]
    before = driver._active
    hook = triton.knobs.runtime.add_stages_inspection_hook
    try:
        driver.set_active(card)
        triton.knobs.runtime.add_stages_inspection_hook = _ptx_alone
        torch.empty = card.allocations.recording(empty)
        for module in replaced:
            module.capability_of = lambda device: divmod(capability, 10)
        forget_choices()
        yield card
    finally:
        driver._active = before
        triton.knobs.runtime.add_stages_inspection_hook = hook
        torch.empty = empty
        for module in replaced:
            module.capability_of = own_capability
        forget_choices()
