"""Small kernels in PTX, written by hand: the tests of the interpreter need no compiler."""

from __future__ import annotations

import numpy as np

from bench.aot.ptx import Buffer, Executable, launch, parse

_HEAD = """
.version 8.7
.target sm_89
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry tiny(
{parameters}
)
.reqntid {threads}
{{
{body}
	ret;
}}
"""


def kernel(body: str, parameters: int = 0, threads: int = 32) -> Executable:
    """Decode a kernel of a body of PTX with so many pointer parameters, tiny_param_0 and up."""
    names = ",\n".join(f"\t.param .u64 .ptr .global .align 1 tiny_param_{i}" for i in range(parameters))
    return Executable(parse(_HEAD.format(parameters=names, threads=threads, body=body)))


def run(body: str, *arrays: np.ndarray | Buffer, threads: int = 32, shared: int = 0, grid=(1,), **options):
    """Run a body whose pointers are in %rd0 and up, and 4 * tid in %rd100; return what ran."""
    loads = [f"\tld.param.b64 %rd{i}, [tiny_param_{i}];" for i in range(len(arrays))]
    begin = ["\tmov.u32 %r100, %tid.x;", "\tmul.wide.u32 %rd100, %r100, 4;", *loads]
    code = kernel("\n".join([*begin, body]), len(arrays), threads)
    buffers = [one if isinstance(one, Buffer) else Buffer(one) for one in arrays]
    return launch(code, grid, buffers, shared, **options)


def each_thread(instruction: str, *operands: np.ndarray) -> np.ndarray:
    """Run one instruction: sources %r1, %r2, ... of `operands` uint32 [threads], result %r0."""
    threads = len(operands[0])
    out = Buffer.empty(threads, np.uint32)
    lines = []
    for i in range(len(operands) + 1):
        lines.append(f"\tadd.s64 %rd{i + 20}, %rd{i}, %rd100;")
    lines += [f"\tld.global.b32 %r{i}, [%rd{i + 20}];" for i in range(1, len(operands) + 1)]
    lines += [f"\t{instruction}", "\tst.global.b32 [%rd20], %r0;"]
    run("\n".join(lines), out, *[np.ascontiguousarray(one, np.uint32) for one in operands], threads=threads)
    return out.result()
