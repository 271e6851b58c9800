"""FusedLinear and FusedPart at work, in every mode.

Adapters, branches and outliers on parts, and what int8 quantizes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import flux_kernels as fk
from flux_kernels.layers.fused_linear import FusedLinear
from flux_kernels.torch_backend import low_precision

from ..conftest import flux_inputs
from .conftest import KINDS, run
from .test_fuse import CLOSE, assert_same

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


# adapters


def adapter(targets=("to_q", "to_v", "proj_mlp", "add_k_proj")):
    return peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)


@pytest.mark.parametrize("order", ["adapter on fused", "fuse around adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_work_on_parts(model, packed_model, expected, kind, order):
    plain = copy.deepcopy(packed_model)
    torch.manual_seed(3)
    plain.add_adapter(adapter())
    want = run(plain)
    assert not torch.allclose(want, expected, **CLOSE)
    torch.manual_seed(3)
    if order == "adapter on fused":
        fk.fuse_projections(model, kind)
        model.add_adapter(adapter())
    else:
        model.add_adapter(adapter())
        assert not fk.fuse_projections(model, kind).left
    assert_same(model, want)
    fk.unfuse_projections(model)
    torch.testing.assert_close(run(model), want, **CLOSE)


@pytest.mark.parametrize("offload", ["sequential", "leaf_level"])
def test_adapters_work_on_parts_of_an_offloaded_model(fused, packed_model, offload):
    plain, cpu = copy.deepcopy(packed_model), torch.device("cpu")
    for each in (plain, fused):
        torch.manual_seed(3)
        each.add_adapter(adapter())
    if offload == "sequential":
        pytest.importorskip("accelerate").cpu_offload(fused, execution_device=cpu)
        assert fused.transformer_blocks[0].attn.to_qkv.qweight.is_meta
    else:
        fused.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=offload)
    assert_same(fused, run(plain))


def test_adapters_load_and_unload_through_the_pipeline(fused, packed_model, expected):
    from ..swap.lora import lora_state_dict, pipeline

    plain, outputs = copy.deepcopy(packed_model), []
    for each in (plain, fused):
        pipe = pipeline(each)
        pipe.load_lora_weights(lora_state_dict(1), adapter_name="one")
        outputs.append(run(each))
        pipe.unload_lora_weights()
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    assert not torch.allclose(outputs[1], expected, **CLOSE)
    assert_same(fused, expected)
    assert not any(layer.adapted() for layer in fused.modules() if isinstance(layer, FusedLinear))


def add_branches(model):
    """Put low-rank branches of different ranks on two layers that share an input."""
    torch.manual_seed(0)
    attention = model.single_transformer_blocks[0].attn
    for part, rank in ((attention.to_q, 4), (attention.to_v, 2)):
        part.set_low_rank(0.1 * torch.randn(rank, part.in_features), 0.1 * torch.randn(part.out_features, rank))


@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_parts_join_the_product_and_survive_unfusing(model, packed_model, monkeypatch, kind, compute):
    inputs, plain = flux_inputs(tokens=64, text=32), copy.deepcopy(packed_model)
    for each in (plain, model):
        fk.swap_linear(each, compute=compute)
    before = run(plain, **inputs)
    add_branches(plain)
    want = run(plain, **inputs)
    assert not torch.allclose(want, before, **CLOSE)
    fk.fuse_projections(model, kind)
    add_branches(model)
    torch.testing.assert_close(run(model, **inputs), want, **CLOSE)
    if compute == "int8":
        assert count_quantizations(monkeypatch, model)[2] == {"qkv": 3, "linear1": 2}[kind]
    assert "single_transformer_blocks.0.attn.to_v.low_rank_down" in model.state_dict()
    copy.deepcopy(model).load_state_dict(model.state_dict())
    fk.unfuse_projections(model)
    assert model.single_transformer_blocks[0].attn.to_v.rank == 2
    torch.testing.assert_close(run(model, **inputs), want, **CLOSE)
    fk.fuse_projections(model, kind)  # branches that are there already
    torch.testing.assert_close(run(model, **inputs), want, **CLOSE)


def test_outlier_channels_of_a_part_are_kept(model, packed_model):
    inputs, plain = flux_inputs(tokens=64, text=32), copy.deepcopy(packed_model)
    channels = torch.tensor([3, 200])
    for each in (plain, model):
        fk.swap_linear(each, compute="int8")
        each.single_transformer_blocks[0].proj_mlp.keep_outliers(channels)
    fk.fuse_projections(model, "linear1")
    assert model.single_transformer_blocks[0].linear1.adapted()
    torch.testing.assert_close(run(model, **inputs), run(plain, **inputs), **CLOSE)


def test_what_belongs_to_the_other_half_is_refused(fused):
    part = fused.transformer_blocks[0].attn.to_q
    with pytest.raises(fk.FormatError, match="Put it on a part: to_q, to_k, to_v"):
        part.whole.set_low_rank(torch.zeros(4, 256), torch.zeros(768, 4))
    with pytest.raises(fk.FormatError, match="Set them on a part: to_q, to_k, to_v"):
        part.whole.keep_outliers(torch.tensor([1]))
    with pytest.raises(fk.FormatError, match="bias of this layer is part of a fused layer"):
        part.bias = nn.Parameter(torch.zeros(256))
    with pytest.raises(fk.FormatError, match=r"qweight of this layer .* Call unfuse_projections\(model\) first"):
        part.qweight = nn.Parameter(part.qweight.clone(), requires_grad=False)


# int8: each distinct x is quantized once


def count_quantizations(monkeypatch, model, compute: str = "int8") -> list[int]:
    """Return how many activations one forward quantizes, a number for each block of the model."""
    calls: list[int] = []
    original = low_precision.linear_int8

    def counted(x, *arguments):
        calls.append(x.data_ptr())
        return original(x, *arguments)

    fk.swap_linear(model, compute=compute, backend="torch")
    marks = []
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    handles = [block.register_forward_hook(lambda *_: marks.append(len(calls))) for block in blocks]
    with monkeypatch.context() as patch:
        patch.setattr(low_precision, "linear_int8", counted)
        run(model, **flux_inputs(tokens=64, text=32))  # more rows than WEIGHT_ONLY_M in both streams
    for handle in handles:
        handle.remove()
    return [after - before for before, after in zip([0, *marks], marks)]


def test_int8_quantizes_each_distinct_x_once(model, monkeypatch):
    """A double block has 4 distinct x for each of two streams, a single block 2.

    Of q/k/v, attention output, MLP input and MLP output.
    """
    assert count_quantizations(monkeypatch, model) == [12, 12, 5, 5]
    fk.fuse_projections(model)
    assert count_quantizations(monkeypatch, model) == [8, 8, 3, 3]
    fk.unfuse_projections(model)
    fk.fuse_projections(model, "linear1")
    assert count_quantizations(monkeypatch, model) == [8, 8, 2, 2]


@pytest.mark.parametrize("compute", ["exact", "fp16_accumulate", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_compute_mode_gives_the_same_numbers_fused(model, kind, compute):
    inputs = flux_inputs(tokens=64, text=32)
    fk.swap_linear(model, compute=compute)
    want = run(model, **inputs)
    fk.fuse_projections(model, kind)
    torch.testing.assert_close(run(model, **inputs), want, **CLOSE)


class Attention(nn.Module):
    """Stand in for an attention module of diffusers with narrow projections.

    The interpreter can compute those in time.
    """

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(256, 16) for _ in range(3))

    def fuse_projections(self):
        raise AssertionError("decodes")


def test_the_triton_kernels_quantize_once_for_a_fused_layer(monkeypatch):
    """The activation quantizer runs once for to_qkv where its three parts need three.

    In Triton's interpreter.
    """
    from flux_kernels._triton import interpreting
    from flux_kernels.kernels.activations import quantize_activation_kernel
    from flux_kernels.kernels.launching import Launch

    if not interpreting():
        pytest.skip("kernels are interpreted only where there is no GPU")
    calls, original = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *given: calls.append(self.kernel) or original(self, *given))
    model = nn.ModuleDict({"attn": Attention()})
    fk.swap_linear(model, backend="triton", compute="int8", format="Q4_K")
    x = torch.randn(17, 256)
    with torch.no_grad():
        apart = torch.cat([part(x) for part in model["attn"].children()], -1)
        assert calls.count(quantize_activation_kernel) == 3
        assert fk.fuse_projections(model).fused == ["attn.to_qkv"]
        together = model["attn"].to_qkv(x)
    assert calls.count(quantize_activation_kernel) == 4
    torch.testing.assert_close(together, apart, **CLOSE)


def test_fidelity_measures_a_fused_layer_as_one(model):
    fk.fuse_projections(model, "linear1")
    report = fk.fidelity(model, flux_inputs(tokens=64, text=32), computes=("exact", "int8"))
    measured = {row.layer for row in report.rows}
    assert {"single_transformer_blocks.0.linear1", "transformer_blocks.0.attn.to_added_qkv"} <= measured
    assert not any(layer.endswith(("to_q", "proj_mlp", "add_k_proj")) for layer in measured)
    assert all(row.relative_error < 0.03 for row in report.rows)
    assert not fk.swap_linear(model, compute=report.modes(0.03)).unmatched
    assert model.single_transformer_blocks[0].linear1.compute == "int8"
