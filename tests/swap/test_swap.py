"""swap_linear: what it takes, what it leaves, that it is all or nothing, and the report."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import flux_kernels as fk
from flux_kernels import swap
from flux_kernels.layers.takeover import quantize_layer
from flux_kernels.swap import plan as swap_plan

K = 256


class Model(nn.Module):
    """A model with numbered layers, a shared layer and one whose K no K-quant divides."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(K, K) for _ in range(3))
        self.embedder = nn.Linear(64, K)
        self.norm = nn.LayerNorm(K)
        self.alias = self.blocks[1]

    def forward(self, x):
        for block in self.blocks:
            x = block(self.norm(x))
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def kinds(model) -> list[type]:
    return [type(module) for module in model.modules()]


def test_without_a_format_plain_layers_stay(model):
    report = fk.swap_linear(model)
    assert fk.GGUFLinear not in kinds(model) and not report.swapped
    assert all("format=" in row.detail for row in report)


def test_quantizes_by_name_and_by_pattern(model):
    report = fk.swap_linear(model, format={"blocks.0": "Q4_K", "blocks.*": "Q8_0"})
    assert [block.format for block in model.blocks] == ["Q4_K", "Q8_0", "Q8_0"]
    assert type(model.embedder) is nn.Linear
    assert {row.name: row.action for row in report}["embedder"] == "skipped"
    assert model(torch.randn(2, K)).isfinite().all()


def test_a_shared_layer_is_swapped_once_and_stays_shared(model):
    report = fk.swap_linear(model, format="Q8_0")
    assert model.alias is model.blocks[1] and isinstance(model.alias, fk.GGUFLinear)
    assert len([row for row in report if row.name in ("alias", "blocks.1")]) == 1


def test_layers_that_share_a_weight_share_its_bytes(model):
    model.blocks[2].weight = model.blocks[0].weight
    fk.swap_linear(model, format="Q8_0")
    assert model.blocks[2].qweight is model.blocks[0].qweight
    assert model.blocks[1].qweight is not model.blocks[0].qweight


def test_include_and_exclude(model):
    report = fk.swap_linear(model, format="Q8_0", include="blocks.*", exclude=["blocks.2", "nothing.*"])
    assert [isinstance(block, fk.GGUFLinear) for block in model.blocks] == [True, True, False]
    details = {row.name: row.detail for row in report}
    assert details["embedder"] == "not in include=" and details["blocks.2"] == 'exclude="blocks.2"'
    assert report.unmatched == ["nothing.*"]


@pytest.mark.parametrize("broken", ["k", "nan", "offloaded"])
def test_a_layer_that_cannot_be_swapped_changes_nothing(model, broken):
    exclude = "embedder"
    if broken == "k":
        exclude, error, message = None, fk.FormatError, r'got K=64 \(embedder\). Leave the layer out with exclude="embedder"'
    elif broken == "nan":
        model.blocks[2].weight.data[0, 0] = torch.nan
        error, message = fk.FormatError, r'blocks.2 holds NaN .*exclude="blocks.2"'
    else:
        model.blocks[2]._diffusers_hook = object()
        error, message = ValueError, "blocks.2 is under offloading .* Call swap_linear first"
    before = dict(model.named_modules())
    with pytest.raises(error, match=message):
        fk.swap_linear(model, format="Q4_K", exclude=exclude)
    after = dict(model.named_modules())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


def test_a_backend_that_cannot_run_here_is_refused_before_anything_changes(model, monkeypatch):
    def refuse(backend, compute, device, fmt, k):
        raise fk.BackendUnavailable("no such card")

    monkeypatch.setattr(swap_plan, "check_runnable", refuse)
    with pytest.raises(fk.BackendUnavailable):
        fk.swap_linear(model, "triton", format="Q8_0")
    assert fk.GGUFLinear not in kinds(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "cuda"}, fk.BackendUnavailable, "Known: auto, triton, torch"),
        ({"compute": {"blocks.*": "fp4"}}, fk.BackendUnavailable, "Unknown compute mode 'fp4'"),
        ({"format": "Q4_X"}, fk.FormatError, "Unknown block format 'Q4_X'"),
        ({"format": {"blocks.*": "Q4_X"}}, fk.FormatError, "Unknown block format 'Q4_X'"),
    ],
)
def test_unknown_names_are_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        fk.swap_linear(model, **arguments)


def test_what_is_not_a_model_of_layers_is_refused():
    with pytest.raises(TypeError, match="pipe.transformer"):
        fk.swap_linear("flux.gguf")
    with pytest.raises(TypeError, match="from_linear"):
        fk.swap_linear(nn.Linear(K, K))


def test_swapping_again_changes_backend_and_compute(model):
    fk.swap_linear(model, format="Q8_0")
    layer, data = model.blocks[0], model.blocks[0].qweight.data_ptr()
    report = fk.swap_linear(model, "torch", {"blocks.*": "exact"})
    assert model.blocks[0] is layer and layer.backend == "torch" and layer.qweight.data_ptr() == data
    assert {row.detail for row in report} == {"already packed"}


def test_a_type_that_packed_layers_do_not_take_is_said(model):
    fk.swap_linear(model, format={"blocks.0": "Q6_K", "blocks.*": "Q8_0"})
    report = fk.swap_linear(model, format={"blocks.*": "Q8_0"})
    assert [block.format for block in model.blocks] == ["Q6_K", "Q8_0", "Q8_0"]
    assert "1 layer was packed already and stayed Q6_K, format= asked for Q8_0: it quantizes plain layers only." in str(report)
    assert "already packed, not Q8_0" in str(report) and "stayed Q8_0" not in str(report)


def test_modes_and_backends_that_a_call_sets_back_are_said(model):
    fk.swap_linear(model, "torch", "int8", format={"blocks.*": "Q8_0"})
    report = str(fk.swap_linear(model, compute="int8"))
    assert "3 layers were torch and went back to auto, the default of backend=; backend='torch' keeps them." in report
    assert "default of compute" not in report
    report = str(fk.swap_linear(model))
    assert {block.compute for block in model.blocks} == {"exact"}
    assert "3 layers were int8 and went back to exact, the default of compute=; compute='int8' keeps them." in report
    assert "went back" not in str(fk.swap_linear(model))


def test_hooks_flags_and_foreign_attributes_are_kept(model):
    calls, old = [], model.blocks[0]
    old.register_forward_hook(lambda *args: calls.append("after"))
    old.register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True)
    old._tp_packed_row_blocks = 3
    old.train()
    old.bias.requires_grad_(False)
    fk.swap_linear(model, format="Q8_0")
    new = model.blocks[0]
    assert new is not old and new.training and not model.blocks[1].training
    assert new._tp_packed_row_blocks == 3 and new.bias is old.bias
    model(torch.randn(1, K))
    assert calls == ["before", "after"]


def test_accelerate_hooks_are_kept(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    accelerate.hooks.add_hook_to_module(model.blocks[0], accelerate.hooks.AlignDevicesHook("cpu"))
    hook = model.blocks[0]._hf_hook
    fk.swap_linear(model, format="Q8_0")
    assert model.blocks[0]._hf_hook is hook and isinstance(model.blocks[0].forward, functools.partial)
    assert model(torch.randn(1, K)).shape == (1, K)


def test_subclasses_of_linear_are_left_alone(model):
    class Special(nn.Linear):
        pass

    model.blocks[0] = Special(K, K)
    report = fk.swap_linear(model, format="Q8_0")
    assert type(model.blocks[0]) is Special
    assert "Special, not a plain nn.Linear" in next(row.detail for row in report if row.name == "blocks.0")


def test_adapters_are_left_alone_and_their_base_layers_swapped(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False), model)
    x = torch.randn(2, K)
    model.blocks[2].merge()
    report = fk.swap_linear(model, format={"blocks.*": "Q8_0"})
    details = {row.name: row.detail for row in report}
    assert isinstance(model.blocks[0].base_layer, fk.GGUFLinear) and type(model.blocks[0].lora_A["default"]) is nn.Linear
    assert details["blocks.0"] == "quantized" and details["blocks.0.lora_A.default"] == "weights of an adapter"
    assert details["blocks.2"] == "an adapter is merged into it"
    assert model(x).isfinite().all()


def test_planes_follow_the_backend(model, monkeypatch):
    monkeypatch.setattr(swap_plan, "check_runnable", lambda *arguments: None)
    fk.swap_linear(model, "torch", format="Q8_0")
    file_bytes = model.blocks[0].qweight.clone()
    fk.swap_linear(model, "triton")
    assert model.blocks[0].planes and not torch.equal(model.blocks[0].qweight, file_bytes)
    assert torch.equal(model.blocks[0].file_bytes(), file_bytes)
    fk.swap_linear(model, "torch")
    assert not model.blocks[0].planes and torch.equal(model.blocks[0].qweight, file_bytes)


def test_a_model_on_the_meta_device_can_be_swapped(model):
    fk.swap_linear(model.to("meta"), format="Q8_0")
    assert model.blocks[0].qweight.device.type == "meta" and model(torch.randn(2, K, device="meta")).shape == (2, K)


def test_the_report_as_table_and_json(model):
    report = fk.swap_linear(model, format={"blocks.*": "Q8_0"})
    table = str(report)
    assert "blocks.*" in table and "256 x 256" in table and "3 layers swapped" in table and "1 skipped" in table
    data = json.loads(report.to_json())
    assert data["totals"]["bytes"] == 3 * K * K * 34 // 32 and data["totals"]["bytes_16bit"] == 3 * K * K * 2
    assert data["rows"][0]["format"] == "Q8_0"


def test_memory_footprint(model):
    fk.swap_linear(model, format={"blocks.*": "Q8_0"})
    footprint = fk.memory_footprint(model)
    assert footprint["Q8_0"] == 3 * K * K * 34 // 32
    assert footprint["total"] == footprint["Q8_0"] + footprint["float32"]


# from diffusers


def test_diffusers_layers_are_taken_over_without_a_copy(stock_flux):
    stock = {name: module for name, module in stock_flux.named_modules() if type(module).__name__ == "GGUFLinear"}
    addresses = {name: module.weight.data_ptr() for name, module in stock.items()}
    report = swap.swap_linear(stock_flux)
    assert len(report.swapped) == len(stock) == 40
    for name, address in addresses.items():
        layer = stock_flux.get_submodule(name)
        assert type(layer) is fk.GGUFLinear and layer.qweight.data_ptr() == address
        assert layer.compute_dtype == torch.float32


def test_one_sided_names_can_be_left_to_diffusers(stock_flux):
    report = fk.swap_linear(stock_flux, exclude="single_transformer_blocks.*")
    assert type(stock_flux.single_transformer_blocks[0].proj_mlp).__module__.startswith("diffusers.")
    assert all(row.format in fk.FORMATS for row in report.skipped if row.name.startswith("single"))


@pytest.mark.parametrize("type_name", ["BF16", "Q8_0"])
def test_weights_and_biases_that_diffusers_cannot_compute_with(type_name, packed):
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    number = gguf.GGMLQuantizationType[type_name]
    if type_name == "BF16":
        plain = torch.randn(32, K + 1)[:, 1:].bfloat16()
        weight, bias = plain.contiguous().view(torch.uint8), plain[:, 0].contiguous().view(torch.uint8)
        want = plain.float(), plain[:, 0].float()
    else:
        weight, bias = packed("Q8_0", 32, K), packed("Q8_0", 1, 32)[0]
        want = fk.dequantize(weight, "Q8_0"), fk.dequantize(bias, "Q8_0")
    layer = utils.GGUFLinear(K, 32, bias=True, compute_dtype=torch.float32)
    layer.weight = utils.GGUFParameter(weight, quant_type=number)
    layer.bias = utils.GGUFParameter(bias, quant_type=number)
    model = nn.Sequential(layer)
    fk.swap_linear(model)
    assert type(model[0]) is (nn.Linear if type_name == "BF16" else fk.GGUFLinear)
    x = torch.randn(2, K)
    torch.testing.assert_close(model(x), nn.functional.linear(x, *want))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "pruning"])
def test_a_weight_that_a_hook_computes_is_left_alone(how):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    if how == "weight_norm":
        torch.nn.utils.weight_norm(model[0])
    else:
        prune.l1_unstructured(model[0], "weight", 0.5)
    rows = fk.swap_linear(model, format="Q8_0").rows
    assert [row.action for row in rows] == ["skipped", "swapped"] and "computed" in rows[0].detail
    model(torch.randn(2, 64))


def test_what_takes_a_layers_place_is_ready_for_it():
    """Rows as the backend wants them, hooks, flag and foreign attributes: from one call."""
    name = next(name for name, fmt in fk.FORMATS.items() if fmt.planes and fmt.quantize is not None)
    old, seen = nn.Linear(512, 64).eval(), []
    old.register_forward_hook(lambda *call: seen.append(call))
    old.note = "kept"
    new = quantize_layer(old, name, "triton", "exact")
    assert new.planes and not new.training and new.note == "kept"
    assert list(new._forward_hooks) == list(old._forward_hooks)
    expected = fk.GGUFLinear.from_linear(old, name)
    assert torch.equal(new.file_bytes(), expected.file_bytes())
