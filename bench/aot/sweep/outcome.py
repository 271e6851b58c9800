"""Run one case from beginning to end and say how it went."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass

import numpy as np
import torch
import triton

from ..ptx import Fault
from ..ptx.driver import absent_card
from .cases import Case
from .checks import check
from .inputs import make


@dataclass(frozen=True)
class Outcome:
    """Hold a case's result: the worst error over its bound, what it was, and what went wrong."""

    kernel: str
    format: str
    dtype: str
    capability: int
    triton: str
    ratio: float
    what: str
    problem: str
    launches: str
    opcodes: tuple[str, ...]
    instructions: int
    seconds: float


def run_case(case: Case, warps: bool = False, seed: int = 0, unfenced_copies: bool = False) -> Outcome:
    """Compile and run one case; `warps` runs a block's warps in turn, in an order from `seed`.

    `unfenced_copies` lets wgmma read what cp.async wrote without a proxy fence: Triton 3.6 leaves the fence out.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    order = np.random.default_rng(seed) if warps else None
    ratio, what, problem = float("inf"), "", ""
    inputs = make(case)
    with absent_card(case.capability, order) as card:
        card.copies_need_fence = not unfenced_copies
        try:
            worst = max(check(case, inputs, card), key=lambda compared: compared.ratio)
            ratio, what = worst.ratio, worst.what
            problem = "" if ratio <= 1 else f"{worst.what}: error {worst.error:.3g} is {ratio:.3g} of its bound"
        except Fault as fault:
            problem = f"fault: {fault}"
        except Exception as error:  # noqa: BLE001  (a compiler that fails is a finding about this case, and the others go on)
            problem = f"{type(error).__name__}: {str(error).strip()[:400]}"
    opcodes = {opcode for _, counts in card.launches for opcode in counts.opcodes}
    executed = sum(sum(counts.opcodes.values()) for _, counts in card.launches)
    launches, seconds = " ".join(name for name, _ in card.launches), round(time.perf_counter() - began, 2)
    result = (triton.__version__, ratio, what, problem, launches, tuple(sorted(opcodes)), executed, seconds)
    return Outcome(*astuple(case), *result)
