"""Loading through diffusers: 16-bit checkpoints are quantized, GGUF files stay packed; refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from packaging.version import Version

import flux_kernels as fk
from flux_kernels import FluxKernelsConfig

from ..conftest import TINY_FLUX, load_stock, random_packed
from .conftest import assert_same_model, packed, run

gguf = pytest.importorskip("gguf")
BLOCKS = {"*transformer_blocks.*.attn.*": "Q8_0", "*transformer_blocks.*": "Q4_K"}


def load(folder, config, **options):
    options = {"torch_dtype": torch.bfloat16, **options}
    return FluxTransformer2DModel.from_pretrained(folder, quantization_config=config, **options)


def from_file(path, config, **options):
    options = {"config": str(path.parent), "torch_dtype": torch.float32, **options}
    return FluxTransformer2DModel.from_single_file(str(path), quantization_config=config, **options)


def test_loading_equals_loading_and_swapping(plain_folder):
    loaded = load(plain_folder, FluxKernelsConfig(BLOCKS, compute="int8"))
    swapped = FluxTransformer2DModel.from_pretrained(plain_folder, torch_dtype=torch.bfloat16)
    fk.swap_linear(swapped, format=BLOCKS, compute="int8")
    assert {layer[0] for layer in packed(loaded).values()} == {"Q8_0", "Q4_K"}
    assert_same_model(loaded, swapped)
    # bf16; rows of files lie at odd addresses.
    torch.testing.assert_close(run(loaded), run(swapped), rtol=0.02, atol=0.02)


def test_the_first_pattern_counts_and_the_rest_stays(plain_folder):
    model = load(plain_folder, FluxKernelsConfig({"*.to_q": "Q6_K", "*.attn.to_?": "Q8_0", "transformer_blocks.*": "Q4_0"}))
    formats = {name: layer[0] for name, layer in packed(model).items()}
    assert formats["transformer_blocks.1.attn.to_q"] == formats["single_transformer_blocks.0.attn.to_q"] == "Q6_K"
    assert formats["transformer_blocks.0.attn.to_k"] == "Q8_0" and formats["transformer_blocks.0.norm1.linear"] == "Q4_0"
    assert "single_transformer_blocks.0.proj_mlp" not in formats and "proj_out" not in formats


def test_settings_by_pattern(plain_folder):
    config = FluxKernelsConfig("Q8_0", compute={"*proj_mlp": "int8"}, backend={"*proj_mlp": "torch"})
    for name, (_, compute, backend, dtype, _) in packed(load(plain_folder, config)).items():
        mlp = name.endswith("proj_mlp")
        assert (compute, backend, dtype) == (("int8", "torch") if mlp else ("exact", "auto")) + (torch.bfloat16,)


def test_layers_without_whole_blocks_stay_and_are_named(plain_folder, caplog):
    model = load(plain_folder, FluxKernelsConfig("Q4_K"))
    assert type(model.x_embedder) is torch.nn.Linear and model.x_embedder.weight.dtype == torch.bfloat16
    assert len(packed(model)) == 49
    assert "Left in bfloat16: x_embedder (K=64, Q4_K needs K % 256 == 0)." in caplog.text


@pytest.mark.parametrize(
    ("entry", "left_out"),
    [
        ("proj_out", ["proj_out", "single_transformer_blocks.0.proj_out", "single_transformer_blocks.1.proj_out"]),
        ("norm_out.linear", ["norm_out.linear"]),
        (
            "time_text_embed.*",
            [f"time_text_embed.{x}_embedder.linear_{i}" for x in ("timestep", "guidance", "text") for i in (1, 2)],
        ),
    ],
)
def test_modules_to_not_convert(plain_folder, entry, left_out):
    everything = packed(load(plain_folder, FluxKernelsConfig("Q8_0")))
    model = load(plain_folder, FluxKernelsConfig("Q8_0", modules_to_not_convert=[entry]))
    assert sorted(set(everything) - set(packed(model))) == sorted(left_out)


def test_modules_kept_in_float32(plain_folder, monkeypatch):
    monkeypatch.setattr(FluxTransformer2DModel, "_keep_in_fp32_modules", ["norm_out", "context_embedder"])
    model = load(plain_folder, FluxKernelsConfig("Q8_0"))
    assert model.norm_out.linear.weight.dtype == model.context_embedder.weight.dtype == torch.float32
    assert "proj_out" in packed(model) and model.proj_out.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", {"": "cpu"}])
def test_device_map(plain_folder, device_map):
    model = load(plain_folder, FluxKernelsConfig("Q8_0"), device_map=device_map)
    assert model.hf_device_map and run(model).isfinite().all()


def test_sharded_16_bit_checkpoints(plain_folder, tmp_path):
    plain = FluxTransformer2DModel.from_pretrained(plain_folder, torch_dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert_same_model(load(tmp_path, FluxKernelsConfig("Q5_0")), load(plain_folder, FluxKernelsConfig("Q5_0")))


def test_without_a_dtype_it_is_float32_as_elsewhere_in_diffusers(plain_folder):
    model = load(plain_folder, FluxKernelsConfig("Q8_0"), torch_dtype=None)
    assert model.dtype == model.config["_pre_quantization_dtype"] == packed(model)["proj_out"][3] == torch.float32


def test_progress_is_shown_and_diffusers_can_turn_it_off(plain_folder, capsys):
    from diffusers.utils import logging

    # Commands that ran before in this process turn it off.
    logging.enable_progress_bar()
    load(plain_folder, FluxKernelsConfig("Q8_0"))
    assert "Quantizing: 100%" in capsys.readouterr().err
    logging.disable_progress_bar()
    try:
        load(plain_folder, FluxKernelsConfig("Q8_0"))
    finally:
        logging.enable_progress_bar()
    assert "Quantizing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        ({}, {}, fk.FormatError, 'needs a type to quantize 16-bit weights to, such as FluxKernelsConfig(format="Q4_K")'),
        ({"format": "Q8_0"}, {"torch_dtype": torch.float64}, fk.FormatError, "torch_dtype must be one of float16"),
        ({"format": "Q8_0"}, {"device_map": {"": "disk"}}, ValueError, "call save_pretrained, and load what it wrote"),
        ({"format": "Q8_0", "compute": {"x_embedder": "fp16_accumulate", "*": "exact"}}, {}, None, ""),
    ],
)
def test_refusals(plain_folder, tmp_path, config, options, error, message):
    # K = 64 is just enough.
    if error is None:
        assert packed(load(plain_folder, FluxKernelsConfig(**config), **options))["x_embedder"][1] == "fp16_accumulate"
        return
    with pytest.raises(error) as caught:
        load(plain_folder, FluxKernelsConfig(**config), offload_folder=str(tmp_path), **options)
    assert message in str(caught.value)


def test_an_incomplete_checkpoint_is_refused(plain_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    name = "diffusion_pytorch_model.safetensors"
    state = load_file(plain_folder / name)
    state.pop("proj_out.weight")
    save_file(state, tmp_path / name)
    (tmp_path / "config.json").write_text((plain_folder / "config.json").read_text())
    with pytest.raises(fk.GGUFError, match="holds no weight for proj_out. It is incomplete"):
        load(tmp_path, FluxKernelsConfig("Q8_0"))


# GGUF files, and single files of 16-bit weights


@pytest.fixture(scope="module")
def gguf_with_bf16(tmp_path_factory):
    """Write a GGUF file of the tiny Flux with a BF16 matrix and a BF16 vector.

    diffusers' own layers cannot run them.
    """
    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "flux")
    for name, value in FluxTransformer2DModel(**TINY_FLUX).state_dict().items():
        if value.dim() == 2 and "transformer_blocks" in name:
            writer.add_tensor(name, random_packed("Q4_K", *value.shape).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        elif name in ("proj_out.weight", "norm_out.linear.bias"):
            stored = value.bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **TINY_FLUX}))
    return folder / "tiny.gguf"


def test_gguf_rows_are_those_of_the_file(tiny_gguf):
    model = from_file(tiny_gguf / "tiny.gguf", FluxKernelsConfig())
    stored = fk.read_gguf(tiny_gguf / "tiny.gguf").tensors
    layers = packed(model)
    assert len(layers) == 40
    for name, (format, *_, data) in layers.items():
        assert format == stored[f"{name}.weight"].format and torch.equal(data, stored[f"{name}.weight"].data), name
    swapped = load_stock(tiny_gguf)
    fk.swap_linear(swapped)
    assert_same_model(model, swapped)


def test_gguf_rows_are_not_copied(tiny_gguf, monkeypatch):
    """diffusers' reader copies the file once; the layers hold that memory."""
    from diffusers.models import modeling_utils

    taken = {}
    read = modeling_utils.load_state_dict

    def reading(*args, **options):
        state = read(*args, **options)
        taken.update({name: value.data_ptr() for name, value in state.items()})
        return state

    monkeypatch.setattr("diffusers.loaders.single_file_utils.load_state_dict", reading)
    model = from_file(tiny_gguf / "tiny.gguf", FluxKernelsConfig())
    assert taken and all(model.get_submodule(name).qweight.data_ptr() == taken[f"{name}.weight"] for name in packed(model))


def test_plain_types_of_a_gguf_file_are_decoded_or_quantized(gguf_with_bf16):
    model = from_file(gguf_with_bf16, FluxKernelsConfig())
    assert type(model.proj_out) is torch.nn.Linear and model.proj_out.weight.dtype == torch.float32
    assert model.norm_out.linear.bias.dtype == torch.float32 and run(model).isfinite().all()
    again = from_file(gguf_with_bf16, FluxKernelsConfig("Q8_0"))
    formats = {name: layer[0] for name, layer in packed(again).items()}
    assert formats["proj_out"] == formats["context_embedder"] == "Q8_0" and formats["transformer_blocks.0.attn.to_q"] == "Q4_K"
    expected = fk.quantize(model.proj_out.weight, "Q8_0")
    assert torch.equal(packed(again)["proj_out"][-1], expected)


def test_gguf_layers_that_are_not_converted_are_decoded(gguf_with_bf16):
    model = from_file(gguf_with_bf16, FluxKernelsConfig(modules_to_not_convert=["transformer_blocks.0"]))
    assert not [name for name in packed(model) if "transformer_blocks.0" in name] and len(packed(model)) == 20
    torch.testing.assert_close(run(model), run(from_file(gguf_with_bf16, FluxKernelsConfig())), rtol=1e-4, atol=1e-5)


def test_single_files_of_16_bit_weights(plain_folder, tmp_path):
    path = plain_folder / "diffusion_pytorch_model.safetensors"
    single = from_file(path, FluxKernelsConfig("Q4_K"), torch_dtype=torch.bfloat16)
    assert_same_model(single, load(plain_folder, FluxKernelsConfig("Q4_K")))
    with pytest.raises(fk.FormatError, match="Only GGUF files bring their own"):
        from_file(path, FluxKernelsConfig())
    single.save_pretrained(tmp_path)
    # Before 0.42, diffusers converts names before it asks the quantizer, and stumbles over them
    asked_first = Version(diffusers.__version__) >= Version("0.42")
    message = "written by save_pretrained. Load its folder with from_pretrained" if asked_first else ""
    with pytest.raises(fk.GGUFError if asked_first else IndexError, match=message):
        from_file(tmp_path / path.name, FluxKernelsConfig("Q4_K"))


MEASURE = """
import sys, torch
import flux_kernels as fk
from diffusers import FluxTransformer2DModel

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

open("/proc/self/clear_refs", "w").write("5")  # resets the peak, VmHWM
before = status("VmRSS")
config = fk.FluxKernelsConfig("Q4_0")
model = FluxTransformer2DModel.from_pretrained(sys.argv[1], quantization_config=config, torch_dtype=torch.bfloat16)
print(status("VmHWM") - before, model.get_memory_footprint())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_16_bit_model_is_never_in_memory_as_a_whole(tmp_path):
    config = {**TINY_FLUX, "num_attention_heads": 8, "joint_attention_dim": 512, "num_layers": 3, "num_single_layers": 4}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    whole = model.get_memory_footprint()
    model.save_pretrained(tmp_path)
    del model
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    peak, packed_bytes = map(int, done.stdout.split())
    assert packed_bytes < 0.3 * whole
    # The packed model, one layer at work, and what importing allocates late; without care 1.3.
    assert peak < 0.8 * whole
