"""Measure the rates of the instructions that decoders are made of, and the bandwidth of L2.

The compile-time model counts instructions against such rates (bench/aot/cards.py has them from the vendor's tables). A kernel of CUDA C++
runs one PTX instruction in eight independent chains on all of a multiprocessor's schedulers; torch compiles it with NVRTC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from bench.aot.cards import CARDS
from bench.gpu_session.session import Session
from flux_kernels.machine.gpu_clock import GpuClock
from flux_kernels.machine.tune_compile import one_line

KEY = ("what",)
_THREADS, _CHAINS, _TURNS = 1024, 8, 512
_ROUNDS = 5
_L2_BYTES, _L2_TURNS = 16 << 20, 40  # a part of L2 that each of its halves could hold

_KERNEL = """
extern "C" __global__ void rate(const int* in, int* out, long long* clocks, int turns) {
    const int CHAINS = %(chains)d;
    int words[CHAINS];
    for (int i = 0; i < CHAINS; ++i) words[i] = in[threadIdx.x + i];
    __syncthreads();
    long long start = clock64();
    for (int turn = 0; turn < turns; ++turn)
        #pragma unroll
        for (int i = 0; i < CHAINS; ++i) asm volatile("%(asm)s" : "+r"(words[i]) : "r"(turns));
    __syncthreads();
    long long took = clock64() - start;
    int sum = 0;
    for (int i = 0; i < CHAINS; ++i) sum ^= words[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    if (threadIdx.x == 0) clocks[blockIdx.x] = took;
}
"""
_L2 = """
extern "C" __global__ void l2(const int4* in, int* out, int count, int turns) {
    int4 sum = {0, 0, 0, 0};
    for (int turn = 0; turn < turns; ++turn)
        #pragma unroll 8
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
            int4 v;
            asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(in + i));
            sum.x ^= v.x; sum.y ^= v.y; sum.z ^= v.z; sum.w ^= v.w;
        }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum.x ^ sum.y ^ sum.z ^ sum.w;
}
"""


@dataclass(frozen=True)
class Instruction:
    """Name a PTX instruction on the 32-bit registers %0 and %1, and its expected rate on a Hopper."""

    asm: str
    expected: int


def instructions() -> dict[str, Instruction]:
    """Return what is measured; expected rates are those that an H200 had, as far as it was asked."""
    card = CARDS[90]
    return {
        "I2F s32": Instruction("cvt.rn.f32.s32 %0, %0;", 64),
        "I2F u8": Instruction("{.reg .b16 t; cvt.u16.u32 t, %0; cvt.rn.f32.u8 %0, t;}", 16),
        "I2F f16 s16": Instruction("{.reg .b16 t; cvt.u16.u32 t, %0; cvt.rn.f16.s16 t, t; cvt.u32.u16 %0, t;}", 16),
        "I2F u16": Instruction("{.reg .b16 t; cvt.u16.u32 t, %0; cvt.rn.f32.u16 %0, t;}", 16),
        "I2F s16": Instruction("{.reg .b16 t; cvt.u16.u32 t, %0; cvt.rn.f32.s16 %0, t;}", 16),
        "I2F s8": Instruction("{.reg .b16 t; cvt.u16.u32 t, %0; cvt.rn.f32.s8 %0, t;}", 16),
        "F2I s32": Instruction("cvt.rni.s32.f32 %0, %0;", 16),
        "F2F bf16x2": Instruction("cvt.rn.bf16x2.f32 %0, %0, %0;", 64),
        "F2F f16x2": Instruction("cvt.rn.f16x2.f32 %0, %0, %0;", 64),
        "FFMA": Instruction("fma.rn.f32 %0, %0, %0, %0;", card.fp32_rate),
        "HFMA2 f16x2": Instruction("fma.rn.f16x2 %0, %0, %0, %0;", card.fp32_rate),
        "HFMA2 bf16x2": Instruction("fma.rn.bf16x2 %0, %0, %0, %0;", card.fp32_rate),
        "LOP3": Instruction("lop3.b32 %0, %0, %1, 0x0f0f0f0f, 0x6a;", card.int_rate),
        "PRMT": Instruction("prmt.b32 %0, %0, %1, 0x5410;", card.int_rate),
        "SHF": Instruction("shf.r.wrap.b32 %0, %0, %1, 7;", card.int_rate),
        "IMAD": Instruction("mad.lo.s32 %0, %0, %1, %0;", card.int_rate),
        "DP4A": Instruction("dp4a.s32.s32 %0, %0, %1, %0;", card.int_rate),
    }


def source(asm: str) -> str:
    """Return the kernel that runs an instruction."""
    return _KERNEL % dict(chains=_CHAINS, asm=asm)


def run(session: Session) -> None:
    """Write rates.csv."""
    if session.dry:
        print("rates are measured on a GPU alone")
        return
    table = session.table("rates", KEY)
    for name, instruction in instructions().items():
        if not table.has(dict(what=name)):
            table.add(_row(name, lambda asm=instruction.asm: _rate(session.device, asm), instruction.expected))
    if not table.has(dict(what="L2 GB/s")):
        table.add(_row("L2 GB/s", lambda: _l2(session.device), 5500))


def _row(name: str, measure, expected: float) -> dict:
    try:
        rate, milliseconds, note = *measure(), ""
    except RuntimeError as problem:
        rate, milliseconds, note = None, "", one_line(problem)
    return dict(
        what=name,
        rate="" if rate is None else f"{rate:.1f}",
        expected=expected,
        p50_ms=milliseconds,
        measured_over_predicted="" if rate is None else f"{rate / expected:.2f}",
        note=note,
    )


def _rate(device: torch.device, asm: str) -> tuple[float, str]:
    """Return results a clock and multiprocessor, and the milliseconds of a launch."""
    kernel = torch.cuda._compile_kernel(source(asm), "rate")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    words = torch.randint(1, 1 << 30, (_THREADS + _CHAINS,), dtype=torch.int32, device=device)
    out = torch.empty(processors * _THREADS, dtype=torch.int32, device=device)
    clocks = torch.empty(processors, dtype=torch.int64, device=device)
    milliseconds = _timed(device, lambda: kernel((processors, 1, 1), (_THREADS, 1, 1), (words, out, clocks, _TURNS)))
    return _THREADS * _CHAINS * _TURNS / clocks.double().median().item(), milliseconds


def _l2(device: torch.device) -> tuple[float, str]:
    """Return GB/s of reading a buffer that stays in L2, past L1, and the milliseconds of a launch."""
    kernel = torch.cuda._compile_kernel(_L2, "l2")
    processors, threads = torch.cuda.get_device_properties(device).multi_processor_count, _THREADS
    buffer = torch.zeros(_L2_BYTES, dtype=torch.uint8, device=device).view(torch.int32)
    out: Tensor = torch.empty(2 * processors * threads, dtype=torch.int32, device=device)
    arguments = (buffer, out, _L2_BYTES // 16, _L2_TURNS)
    milliseconds = _timed(device, lambda: kernel((2 * processors, 1, 1), (threads, 1, 1), arguments))
    return _L2_BYTES * _L2_TURNS / float(milliseconds) / 1e6, milliseconds


def _timed(device: torch.device, launch: Callable[[], object]) -> str:
    clock = GpuClock(device)
    return f"{median(clock.milliseconds(launch) for _ in range(_ROUNDS)):.5f}"
