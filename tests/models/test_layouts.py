"""Every layout, naming and variant of FLUX.1 files computes what the decoded file does in float32.

The oracle is not ours: gguf-py writes and decodes the files, diffusers' own key conversion (with its hard-coded width
replaced) maps the names.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from flux_kernels.generation.inspect_file import inspect_file
from flux_kernels.gguf.file import read_gguf
from flux_kernels.layers.linear import GGUFLinear
from flux_kernels.models import load_flux
from flux_kernels.models.architectures.flux1 import FLUX1
from flux_kernels.models.config import infer_config

from ..flux_files import HEAD, Architecture, FluxFile, flux_file, layout_types
from .test_types import DEV, SCHNELL

TINY = Architecture()


@cache
def conversion(width: int):
    """Return diffusers' key conversion for another width than the one it has hard-coded."""
    source = inspect.getsource(convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    namespace = {"torch": torch}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), namespace)  # noqa: S102 (the source is diffusers' own)
    return namespace["convert_flux_transformer_checkpoint_to_diffusers"]


def empty_oracle(architecture: Architecture) -> FluxTransformer2DModel:
    """Build the model, without weights, by a config written by hand."""
    with torch.device("meta"):
        return _build(architecture)


def _build(architecture: Architecture) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=architecture.in_channels,
        out_channels=architecture.out_channels,
        num_layers=architecture.double,
        num_single_layers=architecture.single,
        attention_head_dim=architecture.head,
        num_attention_heads=architecture.width // architecture.head,
        joint_attention_dim=architecture.text,
        pooled_projection_dim=architecture.pooled,
        guidance_embeds=architecture.guidance,
        axes_dims_rope={32: (4, 14, 14), HEAD: (8, 28, 28), 128: (16, 56, 56)}[architecture.head],
    ).eval()


def oracle(architecture: Architecture, file: FluxFile, bfl: bool = True) -> FluxTransformer2DModel:
    """Load the decoded file into a plain float32 model."""
    values = {name: torch.from_numpy(value) for name, value in file.values().items()}
    model = empty_oracle(architecture)
    model.load_state_dict(conversion(architecture.width)(values) if bfl else values, strict=True, assign=True)
    return model


@torch.inference_mode()
def run(model, architecture: Architecture) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = model.dtype
    return model(
        hidden_states=torch.randn(1, 6, architecture.in_channels, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(1, 5, architecture.text, generator=generator).to(dtype),
        pooled_projections=torch.randn(1, architecture.pooled, generator=generator).to(dtype),
        timestep=torch.tensor([0.7]).to(dtype),
        img_ids=torch.tensor([[0.0, i // 3, i % 3] for i in range(6)]),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.tensor([3.5]).to(dtype) if architecture.guidance else None,
        return_dict=False,
    )[0]


def check(path, architecture: Architecture, file: FluxFile, bfl: bool = True):
    """Load in float32, compare with the oracle and return the model.

    Equality is exact: both decode to the same float32 weights and call the same products in the same order.
    """
    model = load_flux(path, dtype=torch.float32, backend="torch")
    expected = run(oracle(architecture, file, bfl), architecture)
    assert torch.isfinite(expected).all() and expected.std() > 0.01
    torch.testing.assert_close(run(model, architecture), expected, rtol=0, atol=0)
    return model


def public_config(model) -> dict:
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def packed_layers(model) -> dict[str, str]:
    return {name: module.format for name, module in model.named_modules() if isinstance(module, GGUFLinear)}


def diffusers_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in empty_oracle(architecture).state_dict().items()}


LAYOUTS = [
    ("legacy", layout_types("legacy", "Q4_0")),
    ("legacy", layout_types("legacy", "Q5_1")),
    ("legacy", layout_types("legacy", "F16")),
    ("old", layout_types("old", "Q4_K")),
    ("old", layout_types("old", "Q6_K")),
    ("new", layout_types("new", "Q8_0")),
    ("new", layout_types("new", "Q3_K")),
    ("new", layout_types("new", "BF16")),
    ("mixed", layout_types("mixed", "Q4_1", "Q4_1")),
    ("mixed", layout_types("mixed", "Q5_1", "Q5_1")),
    ("mixed", layout_types("mixed", "Q8_0", "Q8_0")),
    ("mixed", layout_types("mixed", "BF16", "BF16")),
]


# A layout is about types and a naming about names, so the second naming needs no more than one file of each layout.
@pytest.mark.parametrize(
    ("layout", "types", "bfl"), [(*layout, True) for layout in LAYOUTS] + [(*LAYOUTS[i], False) for i in (0, 3, 5, 8)]
)
def test_every_layout_loads_under_both_namings(tmp_path, layout, types, bfl):
    shapes = TINY.bfl_shapes() if bfl else diffusers_shapes(TINY)
    file = flux_file(TINY, types, shapes=shapes)
    path = file.write(tmp_path / "flux.gguf")
    model = check(path, TINY, file, bfl)
    block = types("double_blocks.0.img_mod.lin.weight", (1, 1))
    packed = packed_layers(model)
    assert set(packed.values()) == ({block} if block not in ("F16", "BF16") else set())
    # 14 linears in a double block, 6 in a single one.
    assert len(packed) in (0, 20)
    facts = inspect_file(path)
    assert (facts.refused, facts.layout, facts.naming) == (None, layout, "bfl" if bfl else "diffusers")


VARIANTS = {
    "FLUX.1-schnell": Architecture(guidance=False),
    "Fill": Architecture(in_channels=384),
    "Canny or Depth": Architecture(in_channels=128),
    "Flex.2": Architecture(in_channels=196),
    "more blocks": Architecture(double=2, single=3),
    "no single blocks": Architecture(double=2, single=0),
    "no double blocks": Architecture(double=0, single=2),
    "head 128": Architecture(head=128),
    "head 32": Architecture(head=32),
    "width 384": Architecture(width=384, text=160, pooled=96),
}


# The oracle for BFL names, diffusers' key conversion, needs blocks of both kinds.
CASES = [
    (name, bfl) for name, variant in VARIANTS.items() for bfl in (True, False) if variant.double * variant.single or not bfl
]


@pytest.mark.parametrize(("variant", "bfl"), CASES)
def test_every_variant_loads_with_its_config_inferred(tmp_path, variant, bfl):
    architecture = VARIANTS[variant]
    shapes = architecture.bfl_shapes() if bfl else diffusers_shapes(architecture)
    file = flux_file(architecture, layout_types("new", "Q8_0"), shapes=shapes)
    model = check(file.write(tmp_path / "flux.gguf"), architecture, file, bfl)
    expected = public_config(empty_oracle(architecture))
    if expected["out_channels"] == expected["in_channels"]:
        expected["out_channels"] = None
    config = public_config(model)
    assert config.pop("quantization_config").to_dict()["quant_method"] == "flux_kernels"
    assert config == expected


def test_a_full_size_file_is_named_by_its_variant():
    def name(architecture):
        return FLUX1.variant_name(infer_config(FLUX1, architecture.bfl_shapes(), "bfl"))

    assert name(DEV) == "FLUX.1-dev, -Kontext or -Krea"
    assert name(SCHNELL) == "FLUX.1-schnell"
    assert name(replace(DEV, in_channels=384)) == "FLUX.1-Fill"
    assert name(replace(DEV, in_channels=128)) == "FLUX.1-Canny or -Depth"
    assert name(replace(DEV, double=8, in_channels=196)) == "Flex.2"
    assert name(replace(DEV, double=8)) == "Flex.1 or Flux-Lite"
    assert name(replace(DEV, double=5)) == "FLUX.1-dev, -Kontext or -Krea, with 5 double and 38 single blocks"
    assert name(TINY) == "FLUX.1 architecture with 1 double and 1 single blocks, width 256"


def mixed_blocks(name: str, shape: tuple[int, ...]) -> str:
    """Give every block a type of its own and its biases the same, as MixedQuantFlux does.

    K-quant blocks have F16 biases.
    """
    block = {"double_blocks.0": "Q8_0", "double_blocks.1": "BF16", "single_blocks.0": "Q5_1", "single_blocks.1": "Q4_K"}.get(
        ".".join(name.split(".")[:2])
    )
    if block is None or name.endswith(".scale"):
        return "F32"
    return "F16" if block == "Q4_K" and len(shape) == 1 else block


def test_a_type_per_block_with_quantized_biases(tmp_path):
    """The layout diffusers cannot load: MixedQuantFlux, with the original shapes its converter writes."""
    architecture = Architecture(double=2, single=2)
    file = flux_file(architecture, mixed_blocks)
    keys = [
        ("add_array", f"comfy.gguf.orig_shape.{name}", list(shape))
        for name, (_, kind, shape) in file.tensors.items()
        if kind in ("F32", "F16")
    ]
    path = file.write(tmp_path / "flux.gguf", architecture="pig", keys=keys)
    model = check(path, architecture, file)
    assert set(packed_layers(model).values()) == {"Q8_0", "Q5_1", "Q4_K"}
    assert inspect_file(path).layout == "mixed"


def test_an_m_file_with_two_types_is_new_not_mixed(tmp_path):
    def types(name, shape):
        return "Q5_K" if name.endswith("attn.qkv.weight") else layout_types("new", "Q4_K")(name, shape)

    architecture = Architecture(double=2, single=1)
    file = flux_file(architecture, types)
    path = file.write(tmp_path / "flux.gguf")
    model = check(path, architecture, file)
    assert {name for name, kind in packed_layers(model).items() if kind == "Q5_K"} == {
        f"transformer_blocks.{i}.attn.{name}"
        for i in range(2)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    }
    assert inspect_file(path).layout == "new"


def test_every_matrix_and_vector_may_be_quantized(tmp_path):
    """The modulation of the last layer, whose halves change places, and the input layers included."""
    file = flux_file(TINY, lambda name, shape: "Q8_0")
    model = check(file.write(tmp_path / "flux.gguf"), TINY, file)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert list(packed_layers(model)) == linears


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
def test_prefixed_unsorted_files_without_keys(tmp_path, prefix):
    """As stable-diffusion.cpp writes them: no key-values at all, tensors in any order."""
    file = flux_file(TINY, layout_types("new", "Q8_0"))
    order = sorted(file.tensors, key=lambda name: hash((name, 7)))
    path = file.write(tmp_path / "flux.gguf", architecture="", prefix=prefix, order=order)
    assert read_gguf(path).metadata == {} and list(read_gguf(path).tensors) == [prefix + name for name in order]
    check(path, TINY, file)


def test_reshaped_tensors_take_their_original_shape(tmp_path):
    """ComfyUI's converters may store a tensor in another shape than torch's, and say so."""
    file = flux_file(TINY, layout_types("new", "Q8_0"))
    keys = []
    stored = FluxFile(dict(file.tensors))
    for name in ("single_blocks.0.linear1.weight", "txt_in.bias"):
        data, kind, shape = file.tensors[name]
        stored.tensors[name] = (data.reshape(1, -1), kind, shape)
        keys.append(("add_array", f"comfy.gguf.orig_shape.{name}", list(shape)))
    check(stored.write(tmp_path / "flux.gguf", keys=keys), TINY, file)
