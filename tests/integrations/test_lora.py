"""Fusing LoRA adapters into packed layers: exact, removable, re-quantized on request, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import flux_kernels as fk

from ..swap.lora import lora_config, lora_state_dict, pipeline
from ..swap.twins import CLOSE, assert_same, packed_layers, run, twin

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def model(swapped_flux):
    return swapped_flux


def load(model, *, second: bool = True):
    """Load one or two adapters through a pipeline."""
    pipe = pipeline(model)
    pipe.load_lora_weights(lora_state_dict(1), adapter_name="one")
    if second:
        pipe.load_lora_weights(lora_state_dict(2, "to_k"), adapter_name="two")
        pipe.load_lora_weights(lora_state_dict(3), adapter_name="three")
        pipe.set_adapters(["one", "two", "three"], adapter_weights=[0.7, 0.3, -0.4])
    return pipe


def small_model(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers)))
    fk.swap_linear(model, "torch", format="Q4_K")
    return model


def snapshot(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_states(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_fused_equals_unfused_and_comes_out_bit_for_bit(model, expected_output):
    pipe = load(model)
    before, unfused = snapshot(model), run(model)
    pipe.fuse_lora()
    layer = model.transformer_blocks[0].attn.to_q.base_layer
    assert layer.rank == 8, "two adapters of rank 4 meet here and their ranks add up"
    torch.testing.assert_close(run(model), unfused, **CLOSE)
    pipe.unfuse_lora()
    assert_equal_states(model, before)
    assert torch.equal(run(model), unfused)
    pipe.unload_lora_weights()
    assert_same(model, expected_output)


@pytest.fixture(scope="module")
def expected_output(_swapped_flux):
    return run(twin(_swapped_flux))


@pytest.mark.parametrize("options", [{"lora_scale": 0.5}, {"adapter_names": ["two"]}, {"safe_fusing": True}], ids=str)
def test_fusing_does_what_it_does_to_the_plain_model(model, options):
    plain, outputs = twin(model), []
    for each in (plain, model):
        pipe = load(each)
        pipe.fuse_lora(**options)
        steps = [run(each), set(pipe.fused_loras)]
        pipe.unfuse_lora()
        steps.append(run(each))
        outputs.append(steps)
    for want, got in zip(*outputs):
        assert got == want if isinstance(want, set) else torch.allclose(got, want, **CLOSE)


def test_unloading_after_fusing_keeps_what_was_fused(model):
    """As in diffusers: load, fuse, unload leaves a model without adapters that draws with them."""
    pipe = load(model, second=False)
    unfused = run(model)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(run(model), unfused, **CLOSE)
    assert sum(layer.rank for layer in packed_layers(model)) == 4 * 4
    clone = copy.deepcopy(model).dequantize()
    torch.testing.assert_close(run(clone), unfused, **CLOSE)


def test_peft_merges_unmerges_and_unloads(packed):
    model = small_model()
    x = torch.randn(5, 256)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    unfused = wrapped(x)
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(x), unfused, **CLOSE)
    wrapped.unmerge_adapter()
    assert torch.equal(wrapped(x), unfused)
    merged = wrapped.merge_and_unload()
    assert isinstance(merged[0], fk.GGUFLinear) and merged[0].rank == 4 and merged[1].rank == 0
    torch.testing.assert_close(merged(x), unfused, **CLOSE)


def test_fused_adapters_cost_one_low_rank_product_and_no_decode(packed, monkeypatch):
    """k adapters cost one product with the packed rows, one down projection and no decode of W."""
    from flux_kernels.layers.lazy_weight import LazyWeight

    monkeypatch.setattr(LazyWeight, "decode", lambda self: pytest.fail("decoded"))
    model = small_model(1)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    for name in ("b", "c", "d"):
        wrapped.add_adapter(name, config)
    wrapped.base_model.set_adapter(["default", "b", "c", "d"])
    wrapped.merge_adapter()
    with torch.no_grad(), torch.profiler.profile() as profile:
        wrapped(torch.randn(5, 256))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["flux_kernels::linear"] == 1 and "flux_kernels::dequantize" not in counts
    assert counts["aten::linear"] == 2, "x @ down.T, and the product itself with the branch as further columns"


def test_biases_of_adapters_are_fused_too(packed):
    model, x = small_model(1), torch.randn(5, 256)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_bias=True)
    wrapped = peft.get_peft_model(model, config)
    nn.init.normal_(wrapped.base_model.model[0].lora_B["default"].bias)
    before, unfused = model[0].base_layer.bias.clone(), wrapped(x)
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(x), unfused, **CLOSE)
    wrapped.unmerge_adapter()
    assert torch.equal(model[0].base_layer.bias, before)


def test_a_branch_that_was_there_stays(packed):
    model, x = small_model(1), torch.randn(5, 256)
    model[0].set_low_rank(torch.randn(3, 256), torch.randn(256, 3))
    before = snapshot(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    unfused = wrapped(x)
    wrapped.merge_adapter()
    assert model[0].base_layer.rank == 7
    torch.testing.assert_close(wrapped(x), unfused, rtol=1e-4, atol=1e-3)
    wrapped.unmerge_adapter()
    assert_equal_states(wrapped.unload(), before)


def test_requantizing_reports_the_added_error(model):
    """No branch is left; the report's error is that of the weights, which every format's bound limits."""
    load(model, second=False)
    targets = {name: module for name, module in model.named_modules() if name.endswith("to_q")}
    merged = {name: (layer.base_layer.weight + layer.get_delta_weight("one")) for name, layer in targets.items()}
    report = fk.fuse_lora(model, requantize=True)
    rows = {row.layer: row for row in report.rows}
    assert set(rows) == set(targets)
    for name, layer in targets.items():
        base = layer.base_layer
        error = ((base.weight - merged[name]).norm() / merged[name].norm()).item()
        assert base.rank == rows[name].rank == 0 and base.format == rows[name].format
        assert rows[name].added_error == pytest.approx(error, rel=1e-3)
        assert 0 < error < 1.5 * fk.FORMATS[base.format].relative_rms
    assert "added error" in str(report)
    with pytest.raises(fk.FormatError, match="re-quantized .* Load the model again"):
        fk.unfuse_lora(model)


def test_our_own_calls_report_and_undo(model):
    load(model)
    before, unfused = snapshot(model), run(model)
    report = fk.fuse_lora(model)
    assert {row.rank for row in report.rows} == {4, 8} and all(row.added_error == 0 for row in report.rows)
    torch.testing.assert_close(run(model), unfused, **CLOSE)
    fk.unfuse_lora(model)
    assert_equal_states(model, before)
    with pytest.raises(fk.FormatError, match="load_lora_weights"):
        fk.fuse_lora(small_model())


# refusals: nothing is touched


@pytest.mark.parametrize("call", ["diffusers", "peft", "flux_kernels"])
def test_dora_refuses_before_anything_is_touched(model, call):
    model.add_adapter(lora_config(use_dora=True, init_lora_weights=False))
    before, unfused = snapshot(model), run(model)
    calls = {
        "diffusers": lambda: model.fuse_lora(lora_scale=0.5),
        "peft": lambda: next(m for m in model.modules() if hasattr(m, "lora_A")).merge(),
        "flux_kernels": lambda: fk.fuse_lora(model, scale=0.5),
    }
    with pytest.raises(fk.FormatError, match=r"the Dora adapter 'default', .* without fusing, or call model.dequantize\(\)"):
        calls[call]()
    assert_equal_states(model, before)
    assert torch.equal(run(model), unfused)


def test_a_dora_among_plain_adapters_leaves_all_layers_alone(packed):
    model = small_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    wrapped.add_adapter("dora", peft.LoraConfig(r=4, target_modules=["2"], use_dora=True))
    wrapped.base_model.set_adapter(["default", "dora"])
    with pytest.raises(fk.FormatError, match="Dora"):
        wrapped.merge_adapter()
    assert not model[0].merged and model[0].base_layer.rank == 0


def test_safe_fusing_finds_nan_before_anything_is_touched(model):
    pipe = load(model, second=False)
    before = snapshot(model)
    last = model.single_transformer_blocks[1].attn.to_q
    last.lora_B["one"].weight.data[0, 0] = float("nan")
    before[next(key for key in before if key.endswith("single_transformer_blocks.1.attn.to_q.lora_B.one.weight"))][0, 0] = 7
    with pytest.raises(ValueError, match="adapter one seems to be broken"):
        pipe.fuse_lora(safe_fusing=True)
    assert all(layer.rank == 0 for layer in packed_layers(model))


# life with a fused model


def test_a_fused_model_can_be_swapped_to_another_mode(model):
    pipe = load(model, second=False)
    pipe.fuse_lora()
    fk.swap_linear(model, "torch", "int8")
    layer = model.transformer_blocks[0].attn.to_q.base_layer
    assert layer.compute == "int8" and layer.rank == 4


def test_a_fused_model_offloads_and_unfuses(model):
    """Sequential offload after fusing moves the branch; fusing under it brings each layer in and out."""
    pipe = load(model, second=False)
    unfused = run(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    pipe.fuse_lora()
    layer = model.transformer_blocks[0].attn.to_q.base_layer
    assert layer.rank == 4 and layer.low_rank_down.is_meta
    torch.testing.assert_close(run(model), unfused, **CLOSE)
    pipe.unfuse_lora()
    assert torch.equal(run(model), unfused)
    pipe.fuse_lora()
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not layer.low_rank_down.is_meta
    torch.testing.assert_close(run(model), unfused, **CLOSE)


def test_a_fused_model_compiles(model):
    load(model, second=False).fuse_lora()
    want = run(model)
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), want, **CLOSE)


def fused(model):
    fk.swap_linear(model, "torch", format={"*attn.to_*": "Q4_K"})
    assert fk.fuse_projections(model).fused
    return model


def test_adapters_on_fused_projections_fuse_too(tiny_flux):
    """Parts of a fused layer take a branch of their own, and are bit for bit as before afterwards."""
    model = fused(tiny_flux)
    load(model)
    unfused = run(model)
    report = fk.fuse_lora(model)
    assert {row.rank for row in report.rows} == {4, 8}
    torch.testing.assert_close(run(model), unfused, **CLOSE)
    fk.unfuse_lora(model)
    assert torch.equal(run(model), unfused)


def test_requantizing_a_part_of_a_fused_layer_refuses_whole(tiny_flux):
    model = fused(tiny_flux)
    load(model)
    before = snapshot(model)
    with pytest.raises(fk.FormatError, match="unfuse_projections"):
        fk.fuse_lora(model, requantize=True)
    assert_equal_states(model, before)
