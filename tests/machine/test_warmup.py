"""warmup launches each call that a model needs once, and leaves the model untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flux_kernels as fk
from flux_kernels.machine.doctor import planned_calls
from flux_kernels.machine.warmup import warmup
from flux_kernels.swap.runs import runs_as

from ..conftest import TINY_FLUX


def small_model(backend: str, compute: str = "exact") -> nn.Module:
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(256, 64), nn.Linear(64, 32, bias=False)).half()
    fk.swap_linear(model, backend, {"*": compute}, format={"2": "Q8_0", "*": "Q4_K"})
    return model


def test_each_distinct_call_is_launched_once():
    seen = []
    done = warmup(small_model("triton"), rows=(1, 20), device="cpu", on_compiled=lambda *call: seen.append(call[:2]))
    shapes = [(call.signature.format, call.signature.m, call.signature.n) for call in done]
    assert shapes == [("Q4_K", 1, 64), ("Q4_K", 20, 64), ("Q8_0", 1, 32), ("Q8_0", 20, 32)]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [call.choice.algorithm for call in done] == ["small_m", "fused", "small_m", "fused"]


def test_a_model_of_meta_tensors_can_be_warmed_up():
    """Only shapes and types are read: nothing of the model is needed in memory."""
    model = small_model("triton", "int8").to("meta")
    assert [call.choice.algorithm for call in warmup(model, rows=[20], device="cpu")] == ["two_stage", "two_stage"]


@pytest.mark.parametrize(("rows", "algorithm"), [(4, "small_m"), (12, "fused"), (20, "two_stage")])
def test_few_rows_are_named_for_the_exact_kernel_that_runs(rows, algorithm):
    """Up to 16 rows int8 runs as exact: what is named is what was compiled."""
    done = warmup(small_model("triton", "int8"), rows=[rows], device="cpu")
    assert [call.choice.algorithm for call in done] == [algorithm, algorithm]


def test_the_rows_of_a_flux_follow_the_picture():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**TINY_FLUX)
    fk.swap_linear(model, "triton", format="Q8_0", include="*transformer_blocks.0.ff.net.2")
    done = warmup(model, [(64, 96)], batch=2, text_tokens=8, device="cpu", dtype=torch.float16)
    assert [call.signature.m for call in done] == [2, 16, 48, 64]


def test_nothing_is_compiled_for_the_torch_backend():
    assert warmup(small_model("torch"), rows=[1]) == []


def test_a_model_without_packed_layers_is_refused():
    with pytest.raises(ValueError, match="swap_linear"):
        warmup(nn.Sequential(nn.Linear(8, 8)))


def test_reports_say_what_runs():
    """`runs_as` and SwapReport name backend, device, and each algorithm with the rows it begins at."""
    model = small_model("triton")
    assert runs_as(model[0]).startswith("triton on cpu: small_m 8x32x256 warps 1 stages 3 at M=1, fused ")
    report = fk.swap_linear(model, "torch")
    assert {row.runs for row in report} == {"torch on cpu"}
    assert "exact, torch on cpu" in str(report)


def test_the_planned_calls_are_those_of_a_step():
    calls = planned_calls("Q8_0", "int8", capability=(8, 9))
    # 504 with the ten of embedders and final layer.
    assert sum(call.calls for call in calls) == 494
    assert {call.algorithm for call in calls} == {"two_stage", "small_m"}
    assert {call.algorithm for call in planned_calls("Q8_0", "exact", capability=(9, 0))} == {"two_stage", "small_m"}
