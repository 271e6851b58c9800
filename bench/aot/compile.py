"""Compile a kernel for an absent card, with the constants and alignment of a real launch."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .cards import LANES
from .launches import Launch
from .sass import MachineCode, read


@dataclass(frozen=True)
class Compiled:
    """Hold one compiled kernel: its machine code, shared memory in bytes, threads per program, and PTX."""

    code: MachineCode
    shared: int
    threads: int
    ptx: str


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile a launch for a card: pointers 16-byte aligned, integers multiples of 16, as Flux's shapes."""
    kernel, names = launch.kernel, launch.kernel.arg_names
    types = dict.fromkeys(names, "constexpr") | dict(launch.signature)
    constexprs = {(names.index(name),): value for name, value in launch.constants}
    aligned = [name for name, _ in launch.signature if name not in launch.unspecialized]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, constexprs=constexprs, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, LANES), options=dict(launch.options))
    return Compiled(read(built.asm["cubin"]), built.metadata.shared, LANES * built.metadata.num_warps, built.asm["ptx"])
