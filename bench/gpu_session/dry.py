"""Run a section without a GPU: on the stand-in driver, noting each kernel to compile ahead."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from bench.gpu_session.kernels import Kernel, collecting_compiler
from bench.gpu_session.session import Session
from bench.stand_in import CARDS, counting_compiler, stand_in
from bench.stand_in_cuda import without_arithmetic
from flux_kernels.benchmark import ceilings, linears
from flux_kernels.benchmark.step import weights as step_weights
from flux_kernels.formats import BlockFormat, Packed
from flux_kernels.machine import random_rows, tune_jobs
from flux_kernels.torch_backend import low_precision, reference


@contextmanager
def rehearsal(card: str, kernels: list[Kernel]) -> Iterator[None]:
    """Stand in for a card; `kernels` receives what would be compiled."""
    with ExitStack() as stack:
        stack.enter_context(stand_in(CARDS[card], collecting_compiler(kernels, counting_compiler(Counter()))))
        stack.enter_context(without_arithmetic())
        stack.enter_context(mock.patch.dict(ceilings._COPY_BYTES, cuda=1 << 20))
        stack.enter_context(mock.patch.dict(ceilings._SIDES, cuda=(64,)))
        stack.enter_context(mock.patch.object(reference, "decode_rows", _decoded))
        stack.enter_context(mock.patch.object(tune_jobs.Operands, "error", lambda *_, **__: 0.0))
        # Where it is defined, random_weight calls it.
        for user in (step_weights, random_rows):
            stack.enter_context(mock.patch.object(user, "random_rows", _rows))
        yield


def _decoded(weight: Packed) -> Tensor:
    """Stand for decoding in torch: in bfloat16, so that casting to it costs nothing."""
    return torch.empty(weight.n, weight.k, dtype=torch.bfloat16, device=weight.data.device)


def _rows(fmt: BlockFormat, n: int, k: int, planes: bool = False, seed: int = 0) -> Tensor:
    """Stand for random packed rows."""
    return torch.empty(n, fmt.row_bytes(k), dtype=torch.uint8)


def module(name: str, arguments: list[str]) -> None:
    """Run a module as the command line would, in this process; its errors are not looked at."""
    right = mock.patch.object(linears, "relative_errors", lambda *_: (0.0, 0.0))
    with mock.patch.object(sys, "argv", [name, *arguments]), right:
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise RuntimeError(f"{name} ended with {ended.code}") from ended


def tests(session: Session, arguments: list[str]) -> None:
    """Run tests in this process, where nothing that they compare fails them."""
    import pytest

    from tests.gpu import compare

    def twin(x, weight, *_, **__):
        return x.new_empty(x.shape[0], weight.n)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(compare, "fail", lambda message: None))
        for name in ("linear_int8", "linear_fp16_accumulate"):
            stack.enter_context(mock.patch.object(low_precision, name, twin))
        code = pytest.main([*arguments, "-p", "no:xdist", "-q"])
    if code:
        raise RuntimeError(f"pytest ended with {code!r}")
