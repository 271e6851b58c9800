"""What diffusers, peft, accelerate and torch do to a model, done to a swapped one.

Each operation either gives the numbers of the plain model (the dequantized twin), or refuses with a sentence. Compared in
float32, where only the order of sums differs: errors stay near K * eps of the output's scale, far below `CLOSE`.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import flux_kernels as fk

from ..conftest import flux_inputs
from .twins import CLOSE, assert_same, packed_layers, run, twin

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")


def test_forward_equals_the_dequantized_model(model, expected):
    assert len(packed_layers(model)) == 40
    assert_same(model, expected)


def test_deepcopy(model, expected):
    clone = copy.deepcopy(model)
    assert packed_layers(clone)[0].qweight.data_ptr() != packed_layers(model)[0].qweight.data_ptr()
    assert_same(clone, expected)


def test_pickle(model, expected):
    assert_same(pickle.loads(pickle.dumps(model)), expected)


def test_torch_save(model, expected):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False), expected)


def test_state_dict_round_trip_through_torch_save(model, expected):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    for layer in packed_layers(other):
        layer.qweight.data.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(other, expected)


def test_state_dict_round_trip_through_safetensors(model, expected, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "m.safetensors")
    other = copy.deepcopy(model).to("meta")
    other.load_state_dict(safetensors.load_file(tmp_path / "m.safetensors"), assign=True)
    assert_same(other, expected)


def test_state_dict_has_a_weight_key_for_each_packed_layer(model):
    keys = set(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, fk.GGUFLinear):
            assert {f"{name}.weight", f"{name}.qweight"} <= keys


def test_packed_bytes_are_plain_parameters(model):
    for layer in packed_layers(model):
        assert type(layer.qweight) is nn.Parameter and layer.qweight.dtype == torch.uint8 and not layer.qweight.requires_grad


def test_sequential_offload_to_cpu(model, expected):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert packed_layers(model)[0].qweight.device.type == "meta"
    assert_same(model, expected)


def test_sequential_offload_to_disk(model, expected, tmp_path):
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert packed_layers(model)[0].qweight.device.type == "meta"
    assert_same(model, expected)


def test_dispatch_with_a_device_map(model, expected):
    assert_same(accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True), expected)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(model, expected, kind):
    count = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    device = torch.device("cpu")
    model.enable_group_offload(onload_device=device, offload_device=device, offload_type=kind, **count)
    assert_same(model, expected)


def test_layerwise_casting(model):
    plain = twin(model)
    for each in (plain, model):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert packed_layers(model)[0].qweight.dtype == torch.uint8
    assert run(model).isfinite().all()
    # Weights stay exact: only biases and plain layers are stored in 8 bits.
    for layer in packed_layers(model):
        assert layer.compute_dtype == torch.float32


def test_compile_fullgraph(model, expected):
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), expected, **CLOSE)


def test_compile_with_inductor(model):
    layer, x = model.single_transformer_blocks[0].proj_mlp, torch.randn(3, 256)
    with torch.no_grad():
        want = nn.functional.gelu(layer(x))
        got = torch.compile(lambda x: nn.functional.gelu(layer(x)), fullgraph=True, backend="inductor")(x)
    torch.testing.assert_close(got, want, **CLOSE)


def test_export(model, expected):
    exported = torch.export.export(model, (), flux_inputs(), strict=False)
    torch.testing.assert_close(exported.module()(**flux_inputs())[0], expected, **CLOSE)


def test_fuse_qkv_projections(model, expected):
    model.fuse_qkv_projections()
    assert_same(model, expected)
    model.unfuse_qkv_projections()
    assert_same(model, expected)


def test_gradient_checkpointing_and_backward(model):
    plain = twin(model)
    gradients = []
    for each in (plain, model):
        each.enable_gradient_checkpointing()
        each.train()
        inputs = flux_inputs()
        inputs["hidden_states"].requires_grad_(True)
        each(**inputs)[0].square().mean().backward()
        gradients.append(inputs["hidden_states"].grad)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)


def test_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        layer = packed_layers(model)[0]
        out = layer(torch.randn(3, layer.in_features))
        assert out.dtype == torch.bfloat16 == nn.Linear(4, 4)(torch.randn(3, 4)).dtype
        assert run(model).isfinite().all()


def test_inference_mode(model, expected):
    with torch.inference_mode():
        torch.testing.assert_close(model(**flux_inputs())[0], expected, **CLOSE)


def test_batch_of_two(model):
    inputs = flux_inputs(batch=2)
    torch.testing.assert_close(run(model, **inputs), run(twin(model), **inputs), **CLOSE)


def test_controlnet_residuals(model):
    residuals = {
        "controlnet_block_samples": [torch.randn(1, 16, 256)],
        "controlnet_single_block_samples": [torch.randn(1, 16, 256)],
    }
    inputs = {**flux_inputs(), **residuals}
    torch.testing.assert_close(run(model, **inputs), run(twin(model), **inputs), **CLOSE)


def test_first_block_cache(model):
    plain = twin(model)
    outputs = []
    for each in (plain, model):
        each.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
        with each.cache_context("cond"):
            outputs.append([run(each), run(each)])
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


def test_to_dtype_leaves_the_packed_bytes(model):
    before = [layer.qweight.clone() for layer in packed_layers(model)]
    model.to(torch.bfloat16)
    for layer, bytes_before in zip(packed_layers(model), before):
        assert torch.equal(layer.qweight, bytes_before)
        assert layer.weight.dtype == layer.compute_dtype == layer.bias.dtype == torch.bfloat16
    assert run(model, **flux_inputs(dtype=torch.bfloat16)).isfinite().all()


def test_share_memory(model, expected):
    model.share_memory()
    assert packed_layers(model)[0].qweight.is_shared()
    assert_same(model, expected)


def test_meta_device(model):
    model.to("meta")
    inputs = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in flux_inputs().items()}
    assert run(model, **inputs).shape == (1, 16, 64)
    assert packed_layers(model)[0].weight.device.type == "meta"


def test_dequantize(model, expected):
    model.dequantize()
    assert not packed_layers(model) and not hasattr(model, "hf_quantizer")
    torch.testing.assert_close(run(model), expected, **CLOSE)


def test_save_pretrained(model, expected, tmp_path):
    """The rest of saving and loading is in integrations/."""
    model.save_pretrained(tmp_path)
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert [layer.format for layer in packed_layers(loaded)] == [layer.format for layer in packed_layers(model)]
    assert_same(loaded, expected)


def test_parameter_count_and_footprint(model):
    assert model.get_memory_footprint() == fk.memory_footprint(model)["total"]
