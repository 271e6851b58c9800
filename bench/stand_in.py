"""Let the library launch kernels without a GPU: a driver that compiles for real and launches nothing.

    with stand_in(CARDS["H100"]) as card:
        y = layer(x.to("cuda"))             # the library's own path: choice, grid, compilation, launch
    print(card.launches)                    # Counter({'fused_gemm_Q4_K': 1})

Every tensor is the CPU's and says that it is on "cuda:0"; results hold whatever was in memory. It serves three customers: the cost
of a launch in Python (bench.launch_cost), compiling ahead for a machine that has the GPU, and dry runs of what needs a GPU.
What it refuses is what a driver refuses: too much shared memory, grids past the limits, loading a kernel during a graph capture.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.aot.cards import CARDS as LIMITS
from bench.aot.cards import LANES
from bench.stand_in_cuda import Cuda, patched

_GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, technical specifications per compute capability
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Card:
    """Hold what a driver tells of a card: name, capability, multiprocessors, and bytes of its memories."""

    name: str
    capability: tuple[int, int]
    processors: int
    l2_bytes: int
    memory_bytes: int

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory that one program may have."""
        return LIMITS[self.target.arch].shared_per_block

    @property
    def target(self) -> GPUTarget:
        """Return what Triton compiles for."""
        major, minor = self.capability
        return GPUTarget("cuda", 10 * major + minor, LANES)

    @property
    def limits(self) -> dict[str, int]:
        """Return what Triton asks a driver for before it loads a kernel."""
        return dict(max_shared_mem=self.shared_bytes, multiprocessor_count=self.processors, warpSize=LANES)

    def properties(self, device=None) -> SimpleNamespace:
        """Return what `torch.cuda.get_device_properties` tells of the card."""
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name,
            major=major,
            minor=minor,
            total_memory=self.memory_bytes,
            multi_processor_count=self.processors,
            L2_cache_size=self.l2_bytes,
            shared_memory_per_block_optin=self.shared_bytes,
            warp_size=LANES,
        )


# Vendors' data sheets; the H100's and H200's as their drivers said.
CARDS = {
    "RTX 3060": Card("NVIDIA GeForce RTX 3060", (8, 6), 28, 3 << 20, 12 << 30),
    "RTX 3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 6 << 20, 24 << 30),
    "RTX 4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 72 << 20, 24 << 30),
    "RTX 5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 170, 96 << 20, 32 << 30),
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 << 20, 80 << 30),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20, 80 << 30),
    "H200": Card("NVIDIA H200", (9, 0), 132, 60 << 20, 141 << 30),
}


@dataclass
class StandIn:
    """Hold what happened: launches by kernel, the kernels loaded in order, and the code of each name."""

    card: Card
    cuda: Cuda
    launches: Counter[str] = field(default_factory=Counter)
    loaded: list[str] = field(default_factory=list)
    code: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def stand_in(card: Card, compiler: Callable | None = None) -> Iterator[StandIn]:
    """Put the card in place until the context ends; one card at a time.

    Args:
        card: what the driver says it is.
        compiler: called instead of `triton.compile` with the same arguments, such as `counting_compiler` returns.
    """
    cuda = Cuda(card)
    state = StandIn(card, cuda)
    before, compile_before = triton.runtime.driver._active, triton.compiler.compile
    forget()
    triton.runtime.driver.set_active(_Driver(state))
    if compiler is not None:
        triton.compiler.compile = compiler
    try:
        with patched(cuda):
            yield state
    finally:
        triton.runtime.driver._active, triton.compiler.compile = before, compile_before
        forget()


def forget() -> None:
    """Make kernels and the library forget the card they saw last: what they keep holds for one card."""
    triton.compiler.compiler.max_shared_mem.cache_clear()
    for module in list(sys.modules.values()):
        for value in list(getattr(module, "__dict__", {}).values()):
            if issubclass(type(value), JITFunction):
                value.device_caches.clear()
    forget_choices()


def forget_choices() -> None:
    """Empty the library's caches: a choice or a prepared launch of one card must not meet another."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "flux_kernels":
            for value in list(vars(module).values()):
                if not issubclass(type(value), JITFunction) and callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


class _Driver:
    """Be the driver that Triton asks for the target, the card's limits, and a way to launch."""

    def __init__(self, state: StandIn):
        self.state = state
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=lambda device: state.card.limits)
        self.launcher_cls = lambda source, metadata: _Launcher(state, metadata.name)
        self._target = state.card.target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self):
        return self.state.cuda.device

    def get_benchmarker(self):
        raise NotImplementedError("there is nothing to time on a stand-in")

    def _load(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        """Return module, function, registers (unknown here), spills and threads, as the driver does."""
        self.state.cuda.refuse_while_capturing(f"loading {name}")
        self.state.loaded.append(name)
        self.state.code[name] = kernel
        return object(), object(), 0, 0, _MOST_THREADS


class _Launcher:
    """Count launches of one kernel, after the checks that the driver makes."""

    def __init__(self, state: StandIn, name: str):
        self.launches, self.name = state.launches, name

    def __call__(self, x: int, y: int, z: int, *arguments) -> None:
        # Triton's own launcher skips such a grid.
        if x * y * z == 0:
            return
        if x > _GRID_LIMITS[0] or y > _GRID_LIMITS[1] or z > _GRID_LIMITS[2]:
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument (grid {x, y, z} of {self.name})")
        self.launches[self.name] += 1


def counting_compiler(names: Counter[str]) -> Callable:
    """Return a compiler that compiles nothing and counts each distinct kernel in `names`, by name.

    What it returns can be launched. Whether shared memory suffices is not known then.
    """

    def compile(source, target=None, options=None, **_):
        name = source.fn._fn_name.rpartition(".")[2] if hasattr(source.fn, "_fn_name") else source.fn.__name__
        names[name] += 1
        return _Uncompiled(name)

    return compile


class _Uncompiled:
    """Stand for a compiled kernel."""

    function = packed_metadata = None
    n_regs = n_spills = 0

    def __init__(self, name: str):
        self.name = name
        self.run = triton.runtime.driver.active.launcher_cls(None, self)

    @property
    def metadata(self):
        return self

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable:
        return lambda *arguments, stream=None: self.run(*grid, stream, None, None, None, None, None, *arguments)
