"""Loading FLUX.1 files: configs, refusals, dtypes, mapped bytes and memory."""

from __future__ import annotations

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from flux_kernels.errors import BackendUnavailable, FormatError, GGUFError
from flux_kernels.layers.linear import GGUFLinear
from flux_kernels.models import load_flux, tensor_types

from ..flux_files import Architecture, FluxFile, flux_file, layout_types
from .test_types import DEV, write_sparse

TINY = Architecture()


@pytest.fixture(scope="module")
def q8_file(tmp_path_factory):
    file = flux_file(TINY, layout_types("old", "Q8_0"))
    return file.write(tmp_path_factory.mktemp("flux") / "q8_0.gguf"), file


def write_names(path, names, architecture="flux"):
    """Write a file of one-element tensors."""
    file = FluxFile({name: (np.zeros(1, np.float32), "F32", (1,)) for name in names})
    return file.write(path, architecture=architecture)


# Names as they stand in real files of each model.
REFUSED = {
    "Chroma Radiance": [
        *("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight", "img_in_patch.weight"),
        *("nerf_blocks.0.param_generator.weight", "nerf_final_layer_conv.conv.weight", "__x0__"),
    ],
    "FLUX.3": ["early_stream_modulations.image.lin.weight", "img_in.weight"],
    "a LoRA": ["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "x_embedder.weight"],
    "a FLUX.1 ControlNet": ["controlnet_x_embedder.weight", "x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"],
    "FLUX.1 Redux": ["redux_up.weight", "redux_down.weight"],
    "HunyuanVideo": ["txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight", "double_blocks.0.img_attn_qkv.weight"],
    "a Qwen-Image ControlNet": ["controlnet_blocks.0.weight", "txt_norm.weight", "transformer_blocks.0.img_mod.1.weight"],
    "Qwen-Image 2.1": ["img_in.weight", "txt_in.text_norm.weight", "transformer_blocks.0.img_mlp.proj.weight"],
    "Lens": ["img_in.weight", "transformer_blocks.0.img_mod.1.weight", "transformer_blocks.0.img_mlp.w1.weight"],
    "a Stable Diffusion 3 ControlNet": ["controlnet_blocks.0.weight", "pos_embed_input.proj.weight", "pos_embed.proj.weight"],
    "Wan VACE": [
        "blocks.0.self_attn.q.weight",
        "patch_embedding.weight",
        "head.modulation",
        "vace_blocks.0.self_attn.q.weight",
    ],
    "Wan Animate": ["blocks.0.self_attn.q.weight", "patch_embedding.weight", "face_adapter.fuser_blocks.0.linear2.weight"],
    "Wan S2V": ["blocks.0.self_attn.q.weight", "patch_embedding.weight", "audio_injector.injector.0.q.weight"],
    "Wan Fun-Control": ["blocks.0.self_attn.q.weight", "patch_embedding.weight", "ref_conv.weight"],
    "HiDream": ["double_stream_blocks.0.block.ff_i.w1.weight", "x_embedder.proj.weight"],
    "LTX-Video": ["patchify_proj.weight", "transformer_blocks.0.scale_shift_table"],
    "Lumina 2": ["cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight", "layers.0.adaLN_modulation.1.weight"],
    "a Z-Image ControlNet": ["control_layers.0.adaLN_modulation.0.weight", "noise_refiner.0.adaLN_modulation.0.weight"],
    "OmniGen 2 or Boogu": ["ref_image_refiner.0.attn.to_q.weight", "noise_refiner.0.attn.to_q.weight"],
    "a UNet": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a T5 encoder": ["enc.blk.0.attn_q.weight", "token_embd.weight", "enc.output_norm.weight"],
    "a CLIP model": ["text_model.embeddings.token_embedding.weight"],
    "a language model": ["token_embd.weight", "blk.0.attn_q.weight", "output.weight"],
    "a VAE": ["decoder.conv_in.weight", "encoder.conv_in.weight"],
}


@pytest.mark.parametrize("model", REFUSED)
def test_other_models_are_refused_by_name(tmp_path, model):
    path = write_names(tmp_path / "other.gguf", REFUSED[model])
    with pytest.raises(GGUFError, match=f"other.gguf: This is .*{model}.*, not FLUX.1 or FLUX.2 .*flux_kernels loads FLUX.1"):
        load_flux(path)


def test_an_unknown_model_is_described_by_what_it_says(tmp_path):
    path = write_names(tmp_path / "x.gguf", ["alpha", "beta"], architecture="novel")
    with pytest.raises(
        GGUFError, match="no FLUX.1 or FLUX.2 transformer: its architecture key says 'novel', its tensors are called alpha"
    ):
        load_flux(path)


def test_a_file_without_tensors_is_refused(tmp_path):
    with pytest.raises(GGUFError, match="holds no tensors"):
        load_flux(write_names(tmp_path / "x.gguf", []))


def changed(file: FluxFile, path, *, drop=(), add=(), reshape=()):
    tensors = {name: value for name, value in file.tensors.items() if name not in drop}
    tensors |= {name: (np.zeros(4, np.float32), "F32", (4,)) for name in add}
    for name in reshape:
        data, kind, shape = tensors[name]
        tensors[name] = (data[:-1], kind, (shape[0] - 1, *shape[1:]))
    return FluxFile(tensors).write(path)


def test_missing_superfluous_and_misshapen_tensors_are_named_in_one_error(q8_file, tmp_path):
    path = changed(
        q8_file[1],
        tmp_path / "x.gguf",
        drop=["single_blocks.0.linear2.bias"],
        add=["double_blocks.0.img_attn.extra", "another.decoder"],
        reshape=["txt_in.bias", "single_blocks.0.linear1.weight"],
    )
    with pytest.raises(GGUFError) as error:
        load_flux(path)
    message = str(error.value)
    assert "1 tensor missing: single_blocks.0.linear2.bias;" in message
    assert "2 tensors superfluous: double_blocks.0.img_attn.extra, another.decoder;" in message
    assert (
        "2 tensors wrongly shaped: txt_in.bias is 255, should be 256, single_blocks.0.linear1.weight is 1791 x 256" in message
    )
    assert "1 double and 1 single blocks holds exactly" in message


def test_an_error_about_many_tensors_names_five(q8_file, tmp_path):
    norms = [name for name in q8_file[1].tensors if name.endswith(".bias")]
    with pytest.raises(GGUFError, match=rf"{len(norms)} tensors missing: ([\w.]+, ){{4}}[\w.]+ and {len(norms) - 5} more\."):
        load_flux(changed(q8_file[1], tmp_path / "x.gguf", drop=norms))


@pytest.mark.parametrize("name", ["img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight"])
def test_a_tensor_the_config_needs_is_named(q8_file, tmp_path, name):
    with pytest.raises(GGUFError, match=f"{name}'|no FLUX.1 or FLUX.2 transformer"):
        load_flux(changed(q8_file[1], tmp_path / "x.gguf", drop=[name]))


def test_a_gap_between_blocks_is_named_before_a_model_is_built(tmp_path):
    names = ["img_in.weight", "double_blocks.0.img_mod.lin.weight", "double_blocks.999999.img_mod.lin.weight"]
    with pytest.raises(GGUFError, match="double_blocks up to 999999, but none with index 1"):
        load_flux(write_names(tmp_path / "x.gguf", names))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("double_blocks.0.img_attn.norm.query_norm.scale", (0,), r"has shape \[0\]; FLUX.1 has 1 dimension there, none"),
        ("img_in.weight", (2**40, 0), r"has shape \[1099511627776, 0\]; FLUX.1 has 2 dimensions there"),
        ("img_in.weight", (2**17, 1), "The file has width 131072; .*more than 65536 is not read"),
        ("img_in.weight", (96, 64), "has width 96 and heads of 64"),
        ("txt_in.weight", (256,), r"has shape \[256\]; FLUX.1 has 2 dimensions"),
    ],
)
def test_sizes_that_no_flux_has_are_refused(q8_file, tmp_path, name, shape, message):
    tensors = dict(q8_file[1].tensors)
    tensors[name] = (np.zeros(shape, np.float16), "F16", shape)
    with pytest.raises(GGUFError, match=message):
        load_flux(FluxFile(tensors).write(tmp_path / "x.gguf"))


def test_a_scalar_where_a_vector_should_be_is_named(q8_file, tmp_path):
    tensors = dict(q8_file[1].tensors)
    tensors["txt_in.bias"] = (np.zeros((), np.float32), "F32", ())
    with pytest.raises(GGUFError, match="txt_in.bias is a scalar, should be 256"):
        load_flux(FluxFile(tensors).write(tmp_path / "x.gguf"))


def test_more_blocks_than_any_flux_has_are_refused_fast(q8_file, tmp_path):
    tensors = dict(q8_file[1].tensors)
    tensors |= {f"single_blocks.{i}.x": (np.zeros(1, np.float32), "F32", (1,)) for i in range(600)}
    with pytest.raises(GGUFError, match="600 single_blocks; FLUX.1 has far fewer, and more than 512"):
        load_flux(FluxFile(tensors).write(tmp_path / "x.gguf"))


def test_one_tensor_under_two_names_is_refused(tmp_path):
    path = write_names(tmp_path / "x.gguf", ["img_in.weight", "model.diffusion_model.img_in.weight"])
    with pytest.raises(GGUFError, match="both 'img_in.weight'"):
        load_flux(path)


def test_integer_weights_are_refused(q8_file, tmp_path):
    tensors = dict(q8_file[1].tensors)
    tensors["txt_in.bias"] = (np.zeros(256, np.int32), "I32", (256,))
    with pytest.raises(GGUFError, match="'txt_in.bias' has type I32, which cannot be a weight"):
        load_flux(FluxFile(tensors).write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("shape", [[3], [-256], ["256"], 256])
def test_an_impossible_original_shape_is_refused(q8_file, tmp_path, shape):
    key = "comfy.gguf.orig_shape.txt_in.bias"
    method = "add_array" if isinstance(shape, list) else "add_uint32"
    path = q8_file[1].write(tmp_path / "x.gguf", keys=[(method, key, shape)])
    with pytest.raises(GGUFError, match=f"{key} says .*: both must hold as many weights"):
        load_flux(path)


# (2, 7, 7) is what scaling would give.
ODD_HEAD = Architecture(head=16, width=64, text=32, pooled=32)


def test_heads_that_do_not_scale_need_a_config(tmp_path):
    path = flux_file(ODD_HEAD, layout_types("new", "Q8_0")).write(tmp_path / "x.gguf")
    with pytest.raises(GGUFError, match=r"heads of 16.*Pass config=\{'axes_dims_rope': \(a, b, c\)\} with a \+ b \+ c = 16"):
        load_flux(path)
    assert load_flux(path, config={"axes_dims_rope": [4, 6, 6]}).config.axes_dims_rope == (4, 6, 6)


def test_config_may_be_a_file_a_directory_or_a_model(tmp_path):
    path = flux_file(ODD_HEAD, layout_types("new", "Q8_0")).write(tmp_path / "x.gguf")
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "axes_dims_rope": [4, 6, 6]}))
    model = load_flux(path, config=config)
    for source in (tmp_path, str(config.parent), model):
        assert load_flux(path, config=source).config.axes_dims_rope == (4, 6, 6)


def test_a_config_that_contradicts_the_tensors_is_refused(q8_file):
    with pytest.raises(GGUFError, match="tensors missing: double_blocks.1"):
        load_flux(q8_file[0], config={"num_layers": 2})


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"layers": 2}, GGUFError, "no config value 'layers'. Known: patch_size"),
        (7, TypeError, "config is a mapping, a model, or a path to config.json, got int"),
        ("/nowhere", GGUFError, "No config.json at"),
    ],
)
def test_a_wrong_config_is_refused(q8_file, config, error, message):
    with pytest.raises(error, match=message):
        load_flux(q8_file[0], config=config)


@pytest.mark.parametrize("text", ["{", "[1]", '{"axes_dims_rope": "abc"}', "[" * 100_000])
def test_a_damaged_config_key_is_refused(q8_file, tmp_path, text):
    path = q8_file[1].write(tmp_path / "x.gguf", keys=[("add_string", "flux_kernels.config", text)])
    with pytest.raises(GGUFError, match="flux_kernels.config"):
        load_flux(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_but_packed_rows_has_the_dtype_asked_for(q8_file, dtype):
    model = load_flux(q8_file[0], dtype=dtype)
    assert model.dtype == dtype and not model.training
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            assert parameter.dtype == (torch.uint8 if name == "qweight" else dtype)
            assert isinstance(module, GGUFLinear) or name != "qweight"
    assert {module.compute_dtype for module in model.modules() if isinstance(module, GGUFLinear)} == {dtype}


def test_packed_rows_are_the_bytes_of_the_file_each_with_its_own_storage(q8_file):
    """A view into a whole tensor would make every deepcopy and pickle of q copy k and v too."""
    model = load_flux(q8_file[0])
    packed = q8_file[1].tensors["double_blocks.0.img_attn.qkv.weight"][0]
    layers = [getattr(model.transformer_blocks[0].attn, name) for name in ("to_q", "to_k", "to_v")]
    assert np.array_equal(torch.cat([layer.file_bytes() for layer in layers]).numpy(), packed)
    for layer in layers:
        assert layer.qweight.untyped_storage().nbytes() == layer.qweight.numel()


def test_device_places_every_tensor(q8_file):
    model = load_flux(q8_file[0], device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_backend_and_compute_reach_the_layers(q8_file):
    model = load_flux(q8_file[0], backend="torch")
    assert {(m.backend, m.compute) for m in model.modules() if isinstance(m, GGUFLinear)} == {("torch", "exact")}
    with pytest.raises(BackendUnavailable, match="cuda"):
        load_flux(q8_file[0], backend="cuda")
    model = load_flux(q8_file[0], backend="torch", compute="int8")
    modes = {name: m.compute for name, m in model.named_modules() if isinstance(m, GGUFLinear)}
    assert modes["transformer_blocks.0.attn.to_q"] == modes["single_transformer_blocks.0.proj_out"] == "int8"
    # Modulation stays weight-only.
    assert modes["transformer_blocks.0.norm1.linear"] == "exact"
    with pytest.raises(BackendUnavailable, match="int7"):
        load_flux(q8_file[0], backend="torch", compute="int7")
    with pytest.raises(FormatError, match="float64"):
        load_flux(q8_file[0], dtype=torch.float64)


def test_what_diffusers_hangs_on_a_linear_survives(q8_file):
    """Tensor parallelism reads `_tp_packed_row_blocks` of the single blocks' output layer."""
    layer = load_flux(q8_file[0]).single_transformer_blocks[0].proj_out
    assert isinstance(layer, GGUFLinear) and layer._tp_packed_row_blocks == [256, 1024]


def test_linears_stay_linears(q8_file):
    model = load_flux(q8_file[0])
    shapes = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert shapes["single_transformer_blocks.0.proj_out"] == (256, 1280)
    # 14 in the double block, 6 in the single one, 3 embedders of 2, 4 outside.
    assert len(shapes) == 30


MEASURE = """
import sys, torch
from flux_kernels import load_flux
def status():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: 1024 * int(fields[key].split()[0]) for key in ("VmHWM", "VmRSS", "RssFile")}
load_flux(sys.argv[1])  # everything that is imported at the first call is
for path in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")  # resets the peak, VmHWM
    before = status()
    model = load_flux(path)
    after = status()
    plain = sum(p.nbytes for p in model.parameters() if p.dtype != torch.uint8)
    print(after["VmHWM"] - before["VmRSS"], after["RssFile"] - before["RssFile"], plain)
    del model
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc/self/status")
def test_a_full_size_file_loads_in_little_memory(q8_file, tmp_path):
    """FLUX.1-dev Q4_K_S, 6.8 GB, sparse: beyond the mapped file, at most twice the largest tensor.

    A new file has its plain matrices in the dtype asked for, so they stay mapped: nothing but the pages that were read
    comes on top. An old one has them in another dtype: the cast tensors, which are the model, come on top too.
    """
    paths = [
        write_sparse(tmp_path / f"{rule}.gguf", DEV, tensor_types(rule, "Q4_K_S", DEV.bfl_shapes()), 14)
        for rule in ("new", "old")
    ]
    largest = 21504 * 3072 // 256 * 144
    command = [sys.executable, "-c", MEASURE, q8_file[0], *paths]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    (new, new_read, _), (old, old_read, cast) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert new <= 2 * largest + new_read
    assert old <= 2 * largest + old_read + cast


def test_gguf_py_reads_what_it_should_of_the_synthetic_files(q8_file):
    """The builders are only as good as gguf-py's view of their output."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(q8_file[0]).tensors}
    for name, (_, kind, shape) in q8_file[1].tensors.items():
        assert (tensors[name].tensor_type.name, tuple(tensors[name].shape[::-1])) == (kind, shape)


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", "must be a torch.dtype, one of"), (torch.float64, "got float64.$")])
def test_a_dtype_that_is_none_is_said_first(dtype, said, tmp_path):
    with pytest.raises(FormatError, match=said):
        load_flux(tmp_path / "never-read.gguf", dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_said_first(device, tmp_path):
    with pytest.raises(BackendUnavailable, match=rf"'{device}' cannot be used here: .*[^.]\. `flux-kernels doctor`"):
        load_flux(tmp_path / "never-read.gguf", device=device)
