"""Costs: equal to a plain run of the whole model with the weights quantized."""

from __future__ import annotations

import pytest
import torch

import flux_kernels as fk
from flux_kernels.errors import FormatError
from flux_kernels.generation.base_pipeline import one_thread
from flux_kernels.measure.measured_model import find_source, open_transformer
from flux_kernels.measure.measurer import Measurer, bootstrap
from flux_kernels.measure.stages import Stages
from flux_kernels.mixed.option import Option

from ..mixed.captured import embedded_pipeline, states
from .measured import CLOSE, LINEAR1, QKV, measurer

PARTS = {
    QKV: [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    LINEAR1: [f"single_transformer_blocks.1.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
}


@pytest.fixture(scope="module", autouse=True)
def same_thread_count():
    """Compute on one thread here as `in_process` does in a fork.

    The last bits of costs depend on the number of threads.
    """
    with one_thread():
        yield


def plain_run(types: dict[str, str]) -> tuple[float, float]:
    """Return (cost, MixedQuantFlux's metric) by the definition: the whole model, no stages, no caches."""
    model = embedded_pipeline().transformer
    last = []
    hook = model.single_transformer_blocks[-1].register_forward_hook(lambda _m, _i, out: last.append(torch.cat(out, 1)))
    own = {part: model.get_submodule(part).weight.data for tensor in types for part in PARTS[tensor]}
    try:
        with torch.no_grad():
            expected = [model(**state.inputs).sample for state in states()]
            for tensor, kind in types.items():
                whole = torch.cat([own[part] for part in PARTS[tensor]])
                packed = fk.quantize(whole, kind, measurer().channel_weights(tensor))
                rows = fk.dequantize(packed, kind).split([own[part].shape[0] for part in PARTS[tensor]])
                for part, weight in zip(PARTS[tensor], rows, strict=True):
                    model.get_submodule(part).weight.data = weight
            got = [model(**state.inputs).sample for state in states()]
    finally:
        hook.remove()
        for part, weight in own.items():
            model.get_submodule(part).weight.data = weight
    weights = [state.dsigma**2 for state in states()]
    error = sum(w * (a - b).double().square().mean() for w, a, b in zip(weights, got, expected, strict=True))
    signal = sum(w * b.double().square().mean() for w, b in zip(weights, expected, strict=True))
    half = len(expected)
    stack = sum((a - b).double().square().mean() for a, b in zip(last[half:], last[:half], strict=True)) / half
    return (error / signal).item(), stack.item()


@pytest.mark.parametrize(("tensor", "kind"), [(QKV, "Q4_K"), (QKV, "Q8_0"), (LINEAR1, "Q2_K")])
def test_a_cost_is_that_of_a_plain_run(tensor, kind):
    row = measurer().measure_one(tensor, Option(kind))
    cost, mfq_cost = plain_run({tensor: kind})
    assert row.cost == pytest.approx(cost, rel=CLOSE) and row.mfq_cost == pytest.approx(mfq_cost, rel=CLOSE)
    assert row.bytes == measurer().tensors[tensor].shape[0] * fk.FORMATS[kind].row_bytes(256)
    weight = torch.cat([embedded_pipeline().transformer.get_submodule(part).weight for part in PARTS[tensor]]).detach()
    packed = fk.quantize(weight, kind, measurer().channel_weights(tensor))
    rms = (fk.dequantize(packed, kind) - weight).norm() / weight.norm()
    assert row.error_weight_rms == pytest.approx(rms.item(), rel=1e-5)


def test_a_plan_is_measured_as_a_whole():
    types = {QKV: "Q3_K", LINEAR1: "Q4_K"}
    options = {name: Option(kind) for name, kind in types.items()}
    row = measurer().measure_joint(options)
    cost, mfq_cost = plain_run(types)
    assert row.cost == pytest.approx(cost, rel=CLOSE) and row.mfq_cost == pytest.approx(mfq_cost, rel=CLOSE)
    assert row.cost_low <= row.cost <= row.cost_high
    alone = measurer().measure_one(QKV, Option("Q3_K"))
    assert measurer().measure_joint({QKV: Option("Q3_K")}).cost == alone.cost
    assert Measurer(embedded_pipeline().transformer, states()).measure_joint(options).cost == row.cost
    assert measurer().measure_joint({**options, "single_blocks.0.linear2.weight": Option("BF16")}).cost == row.cost


def test_order_does_not_matter():
    """Kept hidden states are those of the unquantized model, wherever the measurement before began."""
    fresh = Measurer(embedded_pipeline().transformer, states())
    late, early = (fresh.measure_one(name, Option("Q4_K")) for name in (LINEAR1, QKV))
    assert (early, late) == tuple(measurer().measure_one(name, Option("Q4_K")) for name in (QKV, LINEAR1))


def test_stages_are_the_forward_pass():
    model = embedded_pipeline().transformer
    stages = Stages(model)
    assert stages.last == 4
    assert [stages.stage_of(name) for name in ("x_embedder", "transformer_blocks.0.ff.net.2", "proj_out")] == [0, 1, 0]
    assert stages.stage_of("single_transformer_blocks.1.proj_mlp.weight") == 3
    with torch.no_grad():
        for state in states()[:2]:
            hidden = stages.embed(state.inputs)
            for stage in range(1, stages.last):
                hidden = stages.block(stage, hidden)
            assert torch.equal(stages.velocity(hidden), model(**state.inputs).sample)


def test_stages_of_a_model_without_guidance():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = dict(in_channels=16, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48, pooled_projection_dim=24)
    model = FluxTransformer2DModel(num_layers=2, num_single_layers=1, axes_dims_rope=(8, 12, 12), **sizes).eval()
    inputs = dict(
        hidden_states=torch.randn(2, 6, 16),
        encoder_hidden_states=torch.randn(2, 5, 48),
        pooled_projections=torch.randn(2, 24),
        timestep=torch.tensor([0.3, 0.9]),
        img_ids=torch.tensor([[0, row, column] for row in range(2) for column in range(3)]).float(),
        txt_ids=torch.zeros(5, 3),
    )
    stages = Stages(model)
    with torch.no_grad():
        hidden = stages.embed(inputs)
        for stage in range(1, stages.last):
            hidden = stages.block(stage, hidden)
        assert stages.last == 4 and torch.equal(stages.velocity(hidden), model(**inputs).sample)


def test_importance_is_the_sum_of_squares_of_the_inputs():
    model = embedded_pipeline().transformer
    seen = []
    hook = model.get_submodule(PARTS[QKV][2]).register_forward_pre_hook(lambda _m, given: seen.append(given[0].flatten(0, 1)))
    try:
        with torch.no_grad():
            for state in states():
                model(**state.inputs)
    finally:
        hook.remove()
    sums, count = measurer().importance[QKV]
    x = torch.cat(seen).double()
    assert count == x.shape[0] == sum(state.inputs["hidden_states"].shape[1] for state in states())
    torch.testing.assert_close(sums.double(), x.square().sum(0), rtol=1e-5, atol=0)
    assert measurer().importance.keys() == measurer().tensors.keys()
    assert Measurer(model, states()[:1], importance=None).channel_weights(QKV) is None


def test_the_model_stays_as_it_was():
    model = embedded_pipeline().transformer
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fresh = Measurer(model, states())
    fresh.measure_joint({QKV: Option("Q2_K"), LINEAR1: Option("Q2_K")})
    with pytest.raises(RuntimeError):
        fresh.changed({f"{PARTS[QKV][0]}.weight": torch.ones(3, 3)})
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_what_cannot_be_measured_is_refused():
    packed = open_transformer(find_source(), torch.device("cpu"), torch.float32)[0]
    fk.swap_linear(packed, "torch", format="Q8_0", include="*transformer_blocks.*")
    with pytest.raises(FormatError, match="quantized already"):
        Measurer(packed, states())
    other = open_transformer(find_source(), torch.device("cpu"), torch.float32)[0]
    other.proj_out.weight.data *= 1.5
    with pytest.raises(FormatError, match="captured with another model: its velocities differ by"):
        Measurer(other, states())
    with pytest.raises(FormatError, match="no matrix 'nothing' to measure"):
        measurer().measure_one("nothing", Option("Q4_K"))


def test_bootstrap_covers_the_mean_of_equal_states_and_widens():
    ones = torch.ones(64, dtype=torch.float64)
    assert bootstrap(ones, ones, ones) == (1.0, 1.0)
    spread = torch.linspace(0, 2, 64, dtype=torch.float64)
    low, high = bootstrap(spread, ones, ones)
    # 1 +- 1.96 * 0.586 / 8, within the noise of 2000 resamples
    assert low == pytest.approx(0.856, abs=0.02) and high == pytest.approx(1.144, abs=0.02)
