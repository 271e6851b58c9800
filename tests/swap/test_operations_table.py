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

from ..conftest import TINY_FLUX, flux_inputs

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
RANK = 4


def run(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or flux_inputs()))[0]


def packed_layers(model) -> list[fk.GGUFLinear]:
    return [module for module in model.modules() if isinstance(module, fk.GGUFLinear)]


def twin(model):
    """Return a deep copy with every packed layer decoded."""
    return copy.deepcopy(model).dequantize()


@pytest.fixture
def model(swapped_flux):
    return swapped_flux


@pytest.fixture(scope="module")
def expected(_swapped_flux):
    return run(twin(_swapped_flux))


def assert_same(model, expected):
    assert packed_layers(model), "the operation lost the packed layers"
    torch.testing.assert_close(run(model), expected, **CLOSE)


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
    for layer in packed_layers(model):  # weights stay exact: only biases and plain layers are stored in 8 bits
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


# LoRA


def lora_config(**options):
    return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "proj_mlp"], **options)


def lora_state_dict(seed: int, name: str = "to_q") -> dict[str, torch.Tensor]:
    """Make a LoRA file for every attention projection `name`, under the names of a pipeline."""
    generator = torch.Generator().manual_seed(seed)
    width = TINY_FLUX["attention_head_dim"] * TINY_FLUX["num_attention_heads"]
    state = {}
    for stack, count in (("transformer_blocks", 2), ("single_transformer_blocks", 2)):
        for index in range(count):
            prefix = f"transformer.{stack}.{index}.attn.{name}"
            state[f"{prefix}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * 0.1
            state[f"{prefix}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) * 0.1
    return state


def pipeline(model):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxPipeline(scheduler=scheduler, transformer=model, **empty)


def test_add_adapter_and_train(model):
    plain = twin(model)
    gradients = []
    for each in (plain, model):
        torch.manual_seed(1)
        each.add_adapter(lora_config(init_lora_weights=False))
        each.train()
        each(**flux_inputs())[0].square().mean().backward()
        gradients.append([value.grad for name, value in each.named_parameters() if "lora" in name])
    assert gradients[0] and all(gradient is not None for gradient in gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)


def test_training_an_adapter_lowers_the_loss(model):
    torch.manual_seed(0)
    model.add_adapter(lora_config())
    trained = [value for name, value in model.named_parameters() if value.requires_grad and "lora" in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    target, losses = torch.randn(1, 16, 64), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(**flux_inputs())[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_load_two_adapters_scale_delete_and_unload(model, expected):
    plain, outputs = twin(model), []
    for each in (plain, model):
        pipe = pipeline(each)
        pipe.load_lora_weights(lora_state_dict(1), adapter_name="one")
        pipe.load_lora_weights(lora_state_dict(2, "to_k"), adapter_name="two")
        steps = []
        for names, weights in ((["one"], [1.0]), (["one", "two"], [0.7, 0.3])):
            pipe.set_adapters(names, adapter_weights=weights)
            steps.append(run(each))
        pipe.delete_adapters("one")
        steps.append(run(each))
        pipe.unload_lora_weights()
        steps.append(run(each))
        outputs.append(steps)
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    assert not torch.allclose(outputs[1][0], outputs[1][1])
    assert_same(model, expected)


def test_hotswap(model):
    plain, outputs = twin(model), []
    for each in (plain, model):
        pipe = pipeline(each)
        pipe.load_lora_weights(lora_state_dict(1), adapter_name="one")
        first = run(each)
        pipe.load_lora_weights(lora_state_dict(3), adapter_name="one", hotswap=True)
        outputs.append([first, run(each)])
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    assert not torch.allclose(outputs[1][0], outputs[1][1])


@pytest.mark.parametrize("safe", [False, True])
def test_fuse_and_unfuse_lora(model, expected, safe):
    plain, outputs = twin(model), []
    for each in (plain, model):
        pipe = pipeline(each)
        pipe.load_lora_weights(lora_state_dict(1), adapter_name="one")
        pipe.fuse_lora(lora_scale=0.5, safe_fusing=safe)
        outputs.append(run(each))
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
    assert not torch.allclose(outputs[1], expected, **CLOSE)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert_same(model, expected)


def test_dora(model):
    plain, outputs = twin(model), []
    for each in (plain, model):
        torch.manual_seed(1)
        each.add_adapter(lora_config(use_dora=True, init_lora_weights=False))
        outputs.append(run(each))
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


def test_adapters_that_edit_the_base_weight_refuse(model):
    with pytest.raises(fk.FormatError, match="packed"):
        model.add_adapter(lora_config(init_lora_weights="pissa"))


def test_lora_and_packed_layers_compile_together(model):
    model.add_adapter(lora_config(init_lora_weights=False))
    want = run(model)
    torch.testing.assert_close(run(torch.compile(model, fullgraph=True, backend="aot_eager")), want, **CLOSE)
