"""fuse_projections: the same numbers and bytes in fewer products.

Under everything users do to a fused model.

Rows of one product are independent, so fusing changes at most the order of a sum, and on the CPU nothing: outputs are
compared exactly wherever the same rows go through the same matmul shape, and within `CLOSE` elsewhere.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import flux_kernels as fk
from flux_kernels.layers.fused_linear import FusedLinear, FusedPart

from ..conftest import flux_inputs
from .conftest import KINDS, run

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def rows(model) -> dict[str, torch.Tensor]:
    """Return layer name -> packed rows, as they are under the layers' own names."""
    return {name: module.qweight.clone() for name, module in model.named_modules() if type(module) is fk.GGUFLinear}


def assert_same(model, expected):
    assert any(isinstance(module, FusedLinear) for module in model.modules())
    torch.testing.assert_close(run(model), expected, **CLOSE)


def test_the_fused_layers_hold_the_rows_and_nothing_else_does(model, expected):
    before, footprint = rows(model), fk.memory_footprint(model)
    report = fk.fuse_projections(model, "linear1")
    assert not report.left and len(report.fused) == 2 * 2 + 2
    block = model.single_transformer_blocks[1]
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    joined = torch.cat([before[f"single_transformer_blocks.1.{part}"] for part in parts])
    assert torch.equal(block.linear1.qweight, joined)
    assert not list(block.attn.to_q.parameters()) and not list(block.proj_mlp.parameters())
    assert block.attn.to_k.qweight.data_ptr() == block.linear1.qweight[block.attn.to_q.out_features :].data_ptr()
    assert fk.memory_footprint(model) == footprint
    assert_same(model, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_unfusing_restores_the_rows_bit_for_bit(model, expected, kind):
    before = rows(model)
    fk.fuse_projections(model, kind)
    fk.unfuse_projections(model)
    after = rows(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(isinstance(module, FusedLinear | FusedPart) for module in model.modules())
    storages = {module.qweight.untyped_storage().nbytes() - module.qweight.nbytes for module in packed_layers(model)}
    assert storages == {0}, "a part still shares the fused rows"
    assert torch.equal(run(model), expected)


def packed_layers(model) -> list[fk.GGUFLinear]:
    return [module for module in model.modules() if isinstance(module, fk.GGUFLinear)]


def test_the_methods_of_diffusers_join_packed_rows(model, expected, monkeypatch):
    decodes = count_decodes(monkeypatch)
    model.fuse_qkv_projections()
    for module in (block.attn for block in [*model.transformer_blocks, *model.single_transformer_blocks]):
        assert module.fused_projections and type(module.to_qkv) is FusedLinear
    assert type(model.transformer_blocks[0].attn.to_added_qkv) is FusedLinear
    model.fuse_qkv_projections()  # again: nothing to do
    assert not decodes
    assert_same(model, expected)
    model.unfuse_qkv_projections()
    for module in (block.attn for block in [*model.transformer_blocks, *model.single_transformer_blocks]):
        assert not module.fused_projections and not hasattr(module, "to_qkv") and type(module.to_q) is fk.GGUFLinear
    assert torch.equal(run(model), expected)


def count_decodes(monkeypatch) -> list[str]:
    """Return a list that grows with each whole weight that is decoded outside a product."""
    from flux_kernels import torch_backend

    calls: list[str] = []
    original = torch_backend.dequantize

    def counted(data, fmt, *arguments):
        calls.append(fmt.name)
        return original(data, fmt, *arguments)

    monkeypatch.setattr(torch_backend, "dequantize", counted)
    return calls


def test_the_methods_of_diffusers_leave_linear1_alone(model, expected):
    fk.fuse_projections(model, "linear1")
    block = model.single_transformer_blocks[0]
    model.fuse_qkv_projections()  # linear1 shares the input already
    assert not block.attn.fused_projections
    model.unfuse_qkv_projections()
    assert type(block.linear1) is FusedLinear and type(model.transformer_blocks[0].attn.to_q) is fk.GGUFLinear
    assert_same(model, expected)
    fk.unfuse_projections(model)
    assert not block.norm._forward_hooks and not hasattr(block, "linear1")
    assert torch.equal(run(model), expected)


def test_plain_layers_still_fuse_as_diffusers_fuses_them(model):
    model.dequantize()
    model.fuse_qkv_projections()
    assert type(model.transformer_blocks[0].attn.to_qkv) is nn.Linear
    model.unfuse_qkv_projections()
    assert not hasattr(model.transformer_blocks[0].attn, "to_qkv")


def test_parts_of_different_types_stay_as_they_are_and_are_reported(swapped_flux):
    expected = run(swapped_flux)
    report = fk.fuse_projections(swapped_flux)
    assert not report.fused and set(report.left) == {
        *(f"transformer_blocks.{i}.attn" for i in range(2)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
    }
    assert "differ in type: to_q Q5_0, to_k Q4_K" in report.left["transformer_blocks.0.attn"]
    assert "0 fused, 4 left" in str(report)
    with pytest.warns(UserWarning, match=r"FluxAttention is not fused: they differ in type: to_q"):
        swapped_flux.fuse_qkv_projections()
    assert not swapped_flux.transformer_blocks[0].attn.fused_projections
    assert torch.equal(run(swapped_flux), expected)


def test_a_linear1_of_different_types_is_refused_and_nothing_changes(model):
    block = model.single_transformer_blocks[1]
    block.proj_mlp = fk.GGUFLinear.from_linear(block.proj_mlp.dequantize(), "Q8_0")
    with pytest.raises(fk.FormatError, match=r'single_transformer_blocks\.1 cannot have a linear1.*Q8_0.*single_blocks="qkv"'):
        fk.fuse_projections(model, "linear1")
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
    assert len(fk.fuse_projections(model).fused) == 6


def test_fusing_qkv_then_linear1_is_refused(model):
    fk.fuse_projections(model)
    with pytest.raises(fk.FormatError, match=r"fused already; call unfuse_projections"):
        fk.fuse_projections(model, "linear1")


def test_words_that_are_no_kind_and_layers_under_offloading_are_refused(model):
    with pytest.raises(ValueError, match=r"'qkv', 'linear1', got 'all'"):
        fk.fuse_projections(model, "all")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="Fuse or unfuse first, then enable offloading"):
        fk.fuse_projections(model)
    with pytest.raises(ValueError, match="Fuse or unfuse first"):
        model.fuse_qkv_projections()


# what users do to a fused model


def test_copies_compute_with_their_own_rows(fused, expected):
    clone = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    for layer in packed_layers(fused):
        layer.qweight.data.zero_()
    assert_same(clone, expected)
    fk.unfuse_projections(clone)
    assert torch.equal(run(clone), expected)


def test_state_dicts_go_from_fused_to_fused(fused, expected, tmp_path):
    torch.save(fused.state_dict(), tmp_path / "fused.pt")
    other = copy.deepcopy(fused)
    for layer in packed_layers(other):
        layer.qweight.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "fused.pt", weights_only=True))
    assert_same(other, expected)


def test_a_state_dict_of_an_unfused_model_is_refused(fused, packed_model):
    with pytest.raises(RuntimeError, match=r"Call unfuse_projections\(model\) first, load"):
        fused.load_state_dict(packed_model.state_dict())


def test_save_gguf_writes_the_parts(fused, packed_model, tmp_path):
    for names in ("bfl", "diffusers"):
        fk.save_gguf(packed_model, tmp_path / "plain.gguf", names=names)
        fk.save_gguf(fused, tmp_path / "fused.gguf", names=names)
        assert (tmp_path / "plain.gguf").read_bytes() == (tmp_path / "fused.gguf").read_bytes()


def test_dequantize_unfuses(fused, expected):
    fused.dequantize()
    assert type(fused.single_transformer_blocks[0].proj_mlp) is nn.Linear
    assert not any(isinstance(module, fk.GGUFLinear) for module in fused.modules())
    torch.testing.assert_close(run(fused), expected, **CLOSE)


@pytest.mark.parametrize("offload", ["sequential", "disk", "block_level", "leaf_level"])
def test_offloading(fused, expected, offload, tmp_path):
    cpu = torch.device("cpu")
    if offload == "sequential":
        accelerate.cpu_offload(fused, execution_device=cpu)
    elif offload == "disk":
        accelerate.disk_offload(fused, tmp_path, execution_device=cpu)
    else:
        count = {"num_blocks_per_group": 1} if offload == "block_level" else {}
        fused.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=offload, **count)
    assert_same(fused, expected)
    with pytest.raises(ValueError, match="under .*offloading"):
        fk.unfuse_projections(fused)


def test_moving_and_casting(fused):
    fused.to(torch.bfloat16)
    linear = fused.transformer_blocks[0].attn.to_qkv
    assert linear.qweight.dtype == torch.uint8 and fused.transformer_blocks[0].attn.to_q.compute_dtype == torch.bfloat16
    assert run(fused, **flux_inputs(dtype=torch.bfloat16)).isfinite().all()
    fused.to("meta")
    assert fused.transformer_blocks[0].attn.to_q.weight.device.type == "meta"


# Of patterns, and the mode of to_qkv under it: one mode for all parts, or the safe one
MAPS = [
    ({"*.to_qkv": "int8"}, "int8"),
    ({"*.to_qkv": "int8", "*": "exact"}, "int8"),
    ({"*.to_[qkv]": "int8"}, "int8"),
    ({"*": "int8"}, "int8"),
    ({"*.to_q": "exact", "*": "int8"}, "exact"),
    ({"*.to_q": "int8", "*": "exact"}, "exact"),
    ({"*.to_v": "int8"}, "exact"),
]


@pytest.mark.parametrize(("compute", "mode"), MAPS, ids=[str(compute) for compute, _ in MAPS])
def test_swap_linear_gives_a_fused_layer_the_mode_that_all_its_parts_get(model, compute, mode):
    fk.fuse_projections(model)
    report = fk.swap_linear(model, backend="torch", compute=compute)
    layer = model.transformer_blocks[0].attn.to_qkv
    assert (layer.compute, layer.backend, model.transformer_blocks[0].attn.to_q.compute) == (mode, "torch", mode)
    assert not report.unmatched and not any(row.name.endswith((".to_q", ".to_v")) for row in report.rows)


def test_autograd_through_a_fused_model(fused, packed_model):
    gradients, plain = [], copy.deepcopy(packed_model)
    for each in (plain, fused):
        each.enable_gradient_checkpointing()
        each.train()
        inputs = flux_inputs()
        inputs["hidden_states"].requires_grad_(True)
        each(**inputs)[0].square().mean().backward()
        gradients.append(inputs["hidden_states"].grad)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)


def test_ip_adapter_and_controlnet_inputs_reach_a_fused_model(fused, packed_model):
    residuals = {
        "controlnet_block_samples": [torch.randn(1, 16, 256)],
        "controlnet_single_block_samples": [torch.randn(1, 16, 256)],
    }
    inputs = {**flux_inputs(), **residuals}
    torch.testing.assert_close(run(fused, **inputs), run(packed_model, **inputs), **CLOSE)


def test_nothing_is_warned_about_where_all_can_be_fused(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fuse_qkv_projections()


# load_flux(fuse=...)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_the_file_stores_together_stay_mapped(kind, tmp_path, monkeypatch):
    from ..flux_files import Architecture, flux_file, layout_types

    path = flux_file(Architecture(), layout_types("new", "Q4_K")).write(tmp_path / "flux.gguf")
    copied = []
    original = torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, *rest: copied.append(tensors[0].dtype) or original(tensors, *rest))
    model = fk.load_flux(path, dtype=torch.float32, fuse=kind)
    assert torch.uint8 not in copied, "packed rows were copied"
    monkeypatch.undo()
    linear1 = {"qkv": "attn.to_qkv", "linear1": "linear1"}[kind]
    block = model.single_transformer_blocks[0]
    stored = fk.read_gguf(path).tensors["single_blocks.0.linear1.weight"]
    held = block.get_submodule(linear1).qweight
    assert torch.equal(held, stored.data[: held.shape[0]])
    plain = fk.load_flux(path, dtype=torch.float32)
    inputs = flux_inputs()
    torch.testing.assert_close(run(model, **inputs), run(plain, **inputs), **CLOSE)
    fk.save_gguf(model, tmp_path / "again.gguf")
    again = fk.read_gguf(tmp_path / "again.gguf").tensors["single_blocks.0.linear1.weight"]
    assert torch.equal(again.data, stored.data)


def test_rows_that_the_file_stores_apart_are_copied_together(tmp_path, packed_model, expected):
    fk.save_gguf(packed_model, tmp_path / "apart.gguf", names="diffusers")
    model = fk.load_flux(tmp_path / "apart.gguf", dtype=torch.float32, fuse="linear1")
    assert_same(model, expected)


# other models of diffusers


def other_models() -> dict:
    """Return name -> (model class, arguments, inputs, the fused layers it gets)."""
    text = {"encoder_hidden_states": torch.randn(1, 7, 64), "timestep": torch.tensor([0.5])}
    width = {"num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4, "in_channels": 4}
    flux = {**width, "patch_size": 1, "num_single_layers": 1, "joint_attention_dim": 64}
    image = {**text, "hidden_states": torch.randn(1, 16, 4)}
    sd3 = {**width, "patch_size": 1, "sample_size": 32, "caption_projection_dim": 128, "joint_attention_dim": 64}
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 32, "approximator_layers": 1}
    wan = {
        **width,
        "patch_size": (1, 2, 2),
        "out_channels": 4,
        "text_dim": 64,
        "freq_dim": 64,
        "ffn_dim": 128,
        "rope_max_seq_len": 32,
    }
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3)}
    return {
        "SD3Transformer2DModel": (
            {**sd3, "pooled_projection_dim": 64, "out_channels": 4},
            {**text, "hidden_states": torch.randn(1, 4, 8, 8), "pooled_projections": torch.randn(1, 64)},
            {"to_qkv", "to_added_qkv"},
        ),
        "WanTransformer3DModel": (wan, {**text, "hidden_states": torch.randn(1, 4, 2, 8, 8)}, {"to_qkv", "to_kv"}),
        "ChromaTransformer2DModel": (
            {**flux, "axes_dims_rope": (4, 12, 16), **approximator},
            {**image, **ids},
            {"to_qkv", "to_added_qkv", "linear1"},
        ),
    }


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "WanTransformer3DModel", "ChromaTransformer2DModel"])
def test_other_models_fuse_as_diffusers_names_it(name):
    torch.manual_seed(0)
    arguments, inputs, layers = other_models()[name]
    model = getattr(diffusers, name)(**arguments).eval()
    fk.swap_linear(model, format={"*blocks*": "Q8_0"})
    want = run(model, **inputs, return_dict=False)
    for kind, expected in (("qkv", layers - {"linear1"}), ("linear1", layers)):
        report = fk.fuse_projections(model, kind)
        assert {path.split(".")[-1] for path in report.fused} == expected and not report.left
        torch.testing.assert_close(run(model, **inputs, return_dict=False), want, **CLOSE)
        fk.unfuse_projections(model)
    model.fuse_qkv_projections()
    assert any(isinstance(module, FusedLinear) for module in model.modules())
    torch.testing.assert_close(run(model, **inputs, return_dict=False), want, **CLOSE)


def test_a_fused_model_has_as_many_parameters_and_is_not_written_by_save_pretrained(fused, packed_model, tmp_path):
    assert fused.num_parameters() == packed_model.num_parameters()
    with pytest.raises(ValueError, match="unfuse"):
        fused.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    fk.unfuse_projections(fused)
    fused.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_put_in_place_of_a_part_computes_and_survives_unfusing(model, expected, kind):
    """The message on writing a packed weight says to replace the layer by layer.dequantize()."""
    fk.fuse_projections(model, kind)
    attention = model.single_transformer_blocks[0].attn
    attention.to_k = plain = attention.to_k.dequantize(torch.float32)
    assert torch.allclose(run(model), expected, **CLOSE)
    fk.unfuse_projections(model)
    assert attention.to_k is plain and not any(isinstance(module, FusedLinear | FusedPart) for module in model.modules())
    assert torch.allclose(run(model), expected, **CLOSE)
