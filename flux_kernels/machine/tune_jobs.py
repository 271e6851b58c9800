"""What is tuned: the calls of a step, and for each the operands to time it with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compute import mode_of_call
from ..formats import FORMATS
from ..kernels.candidates import Candidate
from ..kernels.launching import device_of
from ..kernels.modes import MODES
from ..kernels.problem import Choice
from ..models.calls import Call
from ..torch_backend import reference
from .random_rows import random_weight

BRANCH_RANK = 16
# Of y, against float64.
_CHECKED_ROWS, _CHECKED_COLUMNS = 64, 256


@dataclass(frozen=True)
class Job:
    """Name one call to tune: x [M, K] times w [N, K] of a ggml type in a compute mode."""

    compute: str
    format: str
    m: int
    n: int
    k: int


def step_jobs(calls: Iterable[Call], modes: Iterable[str], formats: Iterable[str]) -> list[Job]:
    """List what to tune for the calls of a step, each once, those that take most of it first.

    Calls of so few rows that every mode runs them as "exact" are left out of the other modes.

    Args:
        calls: of `step_calls`.
        modes: compute modes.
        formats: ggml types of the weight.
    """
    heaviest = sorted(calls, key=lambda call: -call.flops * call.calls)
    jobs = [
        Job(mode, name, call.m, call.n, call.k)
        for mode in modes
        for name in formats
        for call in heaviest
        if mode == mode_of_call(mode, call.m)
    ]
    return list(dict.fromkeys(jobs))


class Operands:
    """Hold the tensors of one call, and the right values of some of its outputs."""

    def __init__(self, job: Job, device: torch.device, dtype: torch.dtype):
        self.job, self.device, self.dtype, self.fmt = job, device, dtype, FORMATS[job.format]
        self.weight = random_weight(self.fmt, job.n, job.k, device=device)
        self.x, self.bias, hidden, up = (
            torch.randn(shape, device=device).to(dtype)
            for shape in ((job.m, job.k), (job.n,), (job.m, BRANCH_RANK), (job.n, BRANCH_RANK))
        )
        self.branch = hidden, up
        self._rows = torch.linspace(0, job.m - 1, min(_CHECKED_ROWS, job.m)).long().to(device)
        self._columns = slice(0, _CHECKED_COLUMNS)
        weight = reference.dequantize(self.weight.rows(self._columns), torch.float32).double()
        self._right = self.x[self._rows].double() @ weight.T + self.bias[self._columns].double()

    def runner(self, candidate: Candidate, branch: bool = False) -> Callable[[], Tensor]:
        """Return what computes the call in one way."""
        mode, chosen = MODES[self.job.compute], Choice(candidate.algorithm, candidate.tile, "", candidate.rows)
        added = self.branch if branch else None
        weight = self.weight
        # A layer computes them once and keeps them.
        if find := mode.row_scales.get(candidate.algorithm):
            weight = weight._replace(row_scale=find(weight))

        def run() -> Tensor:
            y = torch.empty(self.job.m, self.job.n, dtype=self.dtype, device=self.device)
            with device_of(y):
                mode.linear(self.x, weight, self.bias, y, added, choice=chosen)
            return y

        return run

    def error(self, y: Tensor, branch: bool = False) -> float:
        """Return the relative error of y against float64."""
        right = self._right
        if branch:
            hidden, up = self.branch
            right = right + hidden[self._rows].double() @ up[self._columns].double().T
        return ((y[self._rows, self._columns].double() - right).norm() / right.norm()).item()
