"""Writing FLUX.1 files: packed bytes come back bit for bit, and diffusers loads what was written."""

from __future__ import annotations

import inspect
import json

import gguf
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import nn

from flux_kernels.errors import GGUFError
from flux_kernels.gguf.file import read_gguf
from flux_kernels.layers.linear import GGUFLinear
from flux_kernels.models import load_flux, save_gguf
from flux_kernels.swap import swap_linear

from ..flux_files import Architecture, flux_file, layout_types

TINY = Architecture()


def packed(model) -> dict[str, tuple[str, torch.Tensor]]:
    return {name: (m.format, m.file_bytes()) for name, m in model.named_modules() if isinstance(m, GGUFLinear)}


def assert_same_model(left, right):
    """Compare packed layers byte for byte and all other parameters by value."""
    ours, theirs = packed(left), packed(right)
    assert ours.keys() == theirs.keys()
    for name, (format, data) in ours.items():
        assert format == theirs[name][0] and torch.equal(data, theirs[name][1]), name
    expected = dict(right.named_parameters())
    for name, value in left.named_parameters():
        assert torch.equal(value, expected[name]), name


LAYOUTS = [("legacy", "Q4_0"), ("old", "Q4_K"), ("new", "Q6_K"), ("mixed", "Q8_0"), ("new", "BF16"), ("all", "Q8_0")]


@pytest.mark.parametrize("names", ["bfl", "diffusers"])
@pytest.mark.parametrize(("layout", "block"), LAYOUTS)
def test_load_save_load_gives_the_same_model(tmp_path, layout, block, names):
    """ "all" quantizes the last modulation too, whose halves are swapped back when it is written."""
    types = (lambda name, shape: block) if layout == "all" else layout_types(layout, block)
    file = flux_file(TINY, types)
    model = load_flux(file.write(tmp_path / "in.gguf"))
    save_gguf(model, tmp_path / "out.gguf", names=names)
    again = load_flux(tmp_path / "out.gguf")
    assert_same_model(again, model)
    assert dict(again.config) == dict(model.config)
    if names == "bfl":
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
        assert written.keys() == file.tensors.keys()
        for name, (data, kind, shape) in file.tensors.items():
            if len(shape) == 2 and kind not in ("F32", "F16", "BF16"):
                assert written[name].tensor_type.name == kind and np.array_equal(written[name].data, data), name


def test_keys_are_those_of_other_writers_and_our_config(tmp_path):
    model = load_flux(flux_file(TINY, layout_types("new", "Q4_K")).write(tmp_path / "in.gguf"))
    save_gguf(model, tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.architecture"].contents() == "flux"
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert json.loads(fields["flux_kernels.config"].contents())["num_single_layers"] == 1


def test_rotary_axes_survive_where_tensors_do_not_tell(tmp_path):
    architecture = Architecture(head=16, width=64, text=32, pooled=32)
    path = flux_file(architecture, layout_types("new", "Q8_0")).write(tmp_path / "in.gguf")
    save_gguf(load_flux(path, config={"axes_dims_rope": (4, 6, 6)}), tmp_path / "out.gguf")
    assert load_flux(tmp_path / "out.gguf").config.axes_dims_rope == (4, 6, 6)


def diffusers_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config_of(architecture))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def config_of(architecture: Architecture) -> dict:
    return {
        "num_layers": architecture.double,
        "num_single_layers": architecture.single,
        "attention_head_dim": architecture.head,
        "num_attention_heads": architecture.width // architecture.head,
        "joint_attention_dim": architecture.text,
        "pooled_projection_dim": architecture.pooled,
        "guidance_embeds": architecture.guidance,
        "axes_dims_rope": (16, 56, 56) if architecture.head == 128 else (8, 28, 28),
    }


def test_q_k_v_of_different_types_need_diffusers_names(tmp_path):
    def types(name, shape):
        return "Q5_1" if name == "single_transformer_blocks.0.attn.to_k.weight" else layout_types("new", "Q8_0")(name, shape)

    file = flux_file(TINY, types, shapes=diffusers_shapes(TINY))
    model = load_flux(file.write(tmp_path / "in.gguf"))
    with pytest.raises(GGUFError) as error:
        save_gguf(model, tmp_path / "out.gguf", names="bfl")
    assert "'single_blocks.0.linear1.weight' is one tensor of one type" in str(error.value)
    assert "attn.to_q.weight Q8_0, single_transformer_blocks.0.attn.to_k.weight Q5_1" in str(error.value)
    assert 'Use names="diffusers"' in str(error.value)
    assert not (tmp_path / "out.gguf").exists()
    save_gguf(model, tmp_path / "out.gguf", names="diffusers")
    assert_same_model(load_flux(tmp_path / "out.gguf"), model)
    save_gguf(model, tmp_path / "default.gguf")
    assert read_gguf(tmp_path / "default.gguf").tensors.keys() == read_gguf(tmp_path / "out.gguf").tensors.keys()
    assert_same_model(load_flux(tmp_path / "default.gguf"), model)


@pytest.mark.parametrize(("types", "first"), [("*.to_v", "transformer_blocks."), ("nothing", "double_blocks.")])
def test_default_names_are_those_that_can_hold_the_model(tmp_path, types, first):
    """The demo's mixed file has attention inputs of two types in one block; it is saved as it came."""
    model = FluxTransformer2DModel(**config_of(TINY)).eval()
    swap_linear(model, format={types: "Q8_0", "*": "Q4_K"}, include=["transformer_blocks.*", "single_transformer_blocks.*"])
    save_gguf(model, tmp_path / "out.gguf")
    assert any(name.startswith(first) for name in read_gguf(tmp_path / "out.gguf").tensors)
    assert packed(load_flux(tmp_path / "out.gguf")).keys() == packed(model).keys()


def test_what_is_no_flux_is_refused_with_one_sentence(tmp_path):
    """A config of transformers is no mapping, a model around a model has other names."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(d_model=64, d_kv=16, num_heads=4, d_ff=64, num_layers=1, vocab_size=32)
    out = tmp_path / "out.gguf"
    with pytest.raises(
        TypeError, match="takes a transformer such as pipe.transformer .*FluxTransformer2DModel.*, got T5EncoderModel"
    ):
        save_gguf(transformers.T5EncoderModel(transformers.T5Config(**sizes)), out)
    around = nn.Sequential(FluxTransformer2DModel(**config_of(TINY)))
    around.config = around[0].config
    with pytest.raises(GGUFError, match="The model has no 'x_embedder', which its config promises"):
        save_gguf(around, out)
    assert not list(tmp_path.iterdir())


def test_a_file_can_be_saved_over_itself(tmp_path):
    """The bytes being written are mapped from the file that is being replaced."""
    path = flux_file(TINY, layout_types("old", "Q8_0")).write(tmp_path / "flux.gguf")
    model = load_flux(path)
    before = {name: data.clone() for name, (_, data) in packed(model).items()}
    save_gguf(model, path)
    after = packed(load_flux(path))
    assert all(torch.equal(data, after[name][1]) for name, data in before.items())


@pytest.mark.parametrize("names", ["bfl", "diffusers"])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_a_plain_model_is_written_in_its_dtype(tmp_path, dtype, kind, names):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**config_of(TINY)).to(dtype).eval()
    save_gguf(model, tmp_path / "out.gguf", names=names)
    file = read_gguf(tmp_path / "out.gguf")
    matrices = {tensor.format for tensor in file.tensors.values() if len(tensor.shape) == 2 and tensor.name != "img_in.weight"}
    assert matrices == {kind} and {tensor.format for tensor in file.tensors.values() if len(tensor.shape) == 1} == {"F32"}
    assert_same_model(load_flux(tmp_path / "out.gguf", dtype=dtype), model)


def test_a_wrong_naming_an_adapter_and_missing_weights_are_refused(tmp_path):
    model = load_flux(flux_file(TINY, layout_types("new", "Q8_0")).write(tmp_path / "in.gguf"))
    out = tmp_path / "out.gguf"
    with pytest.raises(GGUFError, match="names is 'bfl' or 'diffusers', got 'comfy'"):
        save_gguf(model, out, names="comfy")
    with pytest.raises(TypeError, match="takes a transformer such as pipe.transformer .*FluxTransformer2DModel.*, got Linear"):
        save_gguf(nn.Linear(2, 2), out)
    layer, model.x_embedder = model.x_embedder, nn.Sequential(model.x_embedder)
    with pytest.raises(GGUFError, match="no 'x_embedder.weight': x_embedder is a Sequential. Unload adapters"):
        save_gguf(model, out)
    model.x_embedder = layer.to("meta")
    with pytest.raises(GGUFError, match="'x_embedder.weight' is on the meta device"):
        save_gguf(model, out)
    model.x_embedder = nn.Linear(64, 256, dtype=torch.float64)
    with pytest.raises(GGUFError, match="'x_embedder.weight' is torch.float64"):
        save_gguf(model, out)
    assert not out.exists()


def load_with_diffusers(path, architecture: Architecture):
    (path.parent / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **config_of(architecture)}))
    return FluxTransformer2DModel.from_single_file(
        str(path),
        config=str(path.parent),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    )


def test_diffusers_loads_files_with_diffusers_names(tmp_path):
    model = load_flux(flux_file(TINY, layout_types("old", "Q4_K")).write(tmp_path / "in.gguf"))
    save_gguf(model, tmp_path / "out.gguf", names="diffusers")
    stock = dict(load_with_diffusers(tmp_path / "out.gguf", TINY).named_parameters())
    for name, (_, data) in packed(model).items():
        assert torch.equal(stock[f"{name}.weight"].as_tensor(), data), name


@pytest.mark.slow
def test_one_block_of_each_kind_at_the_true_width(tmp_path):
    """Width 3072: diffusers' own conversion, applied to packed bytes, is the oracle of the map.

    The file then runs and comes back from save_gguf as it was, and diffusers loads it.
    """
    wide = Architecture(width=3072, head=128, text=256, pooled=256)
    file = flux_file(wide, layout_types("old", "Q4_K"))
    model = load_flux(file.write(tmp_path / "in.gguf"), backend="torch")
    assert "inner_dim = 3072" in inspect.getsource(convert_flux_transformer_checkpoint_to_diffusers)
    stored = {name: torch.from_numpy(data) for name, (data, _, _) in file.tensors.items()}
    expected = convert_flux_transformer_checkpoint_to_diffusers(stored)
    layers = packed(model)
    assert len(layers) == 20
    for name, value in expected.items():
        module, _, kind = name.rpartition(".")
        if module in layers and kind == "weight":
            assert torch.equal(layers[module][1], value), name
        else:
            assert torch.equal(model.get_parameter(name), value.to(torch.bfloat16)), name
    assert torch.isfinite(forward(model, wide)).all()
    save_gguf(model, tmp_path / "out.gguf")
    written = read_gguf(tmp_path / "out.gguf")
    for name, (data, kind, _) in file.tensors.items():
        if kind == "Q4_K":
            assert np.array_equal(written.tensors[name].data.numpy(), data), name
    stock = dict(load_with_diffusers(tmp_path / "out.gguf", wide).named_parameters())
    for name, (_, data) in layers.items():
        assert torch.equal(stock[f"{name}.weight"].as_tensor(), data), name


@torch.inference_mode()
def forward(model, architecture: Architecture) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(model.dtype)

    return model(
        hidden_states=normal(1, 4, architecture.in_channels),
        encoder_hidden_states=normal(1, 4, architecture.text),
        pooled_projections=normal(1, architecture.pooled),
        timestep=torch.tensor([0.7]).to(model.dtype),
        guidance=torch.tensor([3.5]).to(model.dtype),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(4, 3),
        return_dict=False,
    )[0]
