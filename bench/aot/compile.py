"""Compile a kernel for a card that is not here, with the constants and alignment a real launch would have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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
    """Compile one kernel of `launches` for a card."""
    constants, options = dict(launch.constants), dict(launch.options)
    return compile_kernel(launch.kernel, dict(launch.signature), constants, capability, options)


def compile_kernel(kernel: JITFunction, signature: dict, constants: dict, capability: int, options: dict) -> Compiled:
    """Compile `kernel` with 16-byte aligned pointers and integers that are multiples of 16, as Flux's shapes give.

    Args:
        signature: argument -> "*bf16", "i32" and so on.
        constants: argument -> constexpr.
        options: num_warps and num_stages, where they are not Triton's own.
    """
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, constexprs=constexprs, attrs=_aligned(kernel, signature))
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(read(built.asm["cubin"]), built.metadata.shared, 32 * built.metadata.num_warps, built.asm["ptx"])


def _aligned(kernel: JITFunction, signature: Iterable[str]) -> dict:
    free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    return {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in signature if name not in free}
