"""Every architecture: config from true sizes, diffusers' own arithmetic, bytes kept, nothing decoded."""

from __future__ import annotations

import inspect
import json
import time
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from torch import nn

from flux_kernels import load_flux, load_transformer, save_gguf
from flux_kernels.convert.choose_types import Request
from flux_kernels.convert.convert import prepare
from flux_kernels.errors import GGUFError
from flux_kernels.generation.inspect_file import inspect_file
from flux_kernels.gguf.file import read_gguf
from flux_kernels.layers.linear import GGUFLinear
from flux_kernels.models.architectures import ARCHITECTURES
from flux_kernels.models.model_class import config_names
from flux_kernels.packing import Engine
from flux_kernels.torch_backend import libggml

from ..flux_files import Architecture, FluxFile, random_tensor, write_hole
from .cases import CASES, Case

ROWS = {row.name: row for row in ARCHITECTURES}
# Names and layout are tested, not a quantizer: ggml's is many times faster.
ENGINE: Engine = "libggml" if libggml.available() else "torch"
PUBLISHED = [(name, variant) for name, case in CASES.items() for variant in case.published]
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_every_architecture_has_a_case():
    """FLUX.1's are test_flux, test_layouts, test_save and test_types."""
    assert set(CASES) | {"FLUX.1"} == set(ROWS)
    assert set(PUBLISHED) == {
        (row.name, variant.name) for row in ARCHITECTURES if row.name in CASES for variant in row.variants
    }


@cache
def small_file(name: str, kind: str = "Q8_0", seed: int = 0) -> FluxFile:
    """Draw a small file: what tools quantize in `kind`, vectors in F32, the rest in F16."""
    case, rng, file = CASES[name], np.random.default_rng(seed), FluxFile()
    quantized = set(case.quantized)
    for tensor, shape in case.shapes.items():
        stored = kind if tensor in quantized else "F32" if len(shape) < 2 else "F16"
        std = 0.1 if len(shape) < 2 else shape[-1] ** -0.5
        file.tensors[tensor] = (random_tensor(rng, shape, stored, std, 1.0 if _is_norm(tensor) else 0.0), stored, shape)
    return file


def _is_norm(tensor: str) -> bool:
    return tensor.endswith(".scale") or ("norm" in tensor and tensor.endswith(".weight"))


def decoded(file: FluxFile) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in file.values().items()}


def oracle(case: Case, file: FluxFile) -> nn.Module:
    """Return diffusers' model of the decoded tensors, by its own conversion and a config by hand."""
    model = getattr(diffusers, case.model_class)(**case.config).eval()
    model.load_state_dict(case.convert(decoded(file)), strict=True)
    return model


@torch.inference_mode()
def run(model: nn.Module, case: Case) -> torch.Tensor:
    result = model(**case.inputs(torch.Generator().manual_seed(1)), return_dict=False)[0]
    return torch.stack(result) if isinstance(result, list) else result


def public_config(model) -> dict:
    return {name: value for name, value in model.config.items() if not name.startswith(("_", "quantization_config"))}


def packed(model: nn.Module) -> dict[str, bytes]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GGUFLinear)}
    return {name: layer.file_bytes().numpy().tobytes() for name, layer in layers.items()}


def write(case: Case, path, **options):
    return small_file(case.name).write(path, architecture=options.pop("architecture", case.gguf_name), **options)


def write_true_size(case: Case, shapes, path):
    """Write a hole with tensors of these shapes, as tools quantize them."""
    quantized = {tensor for tensor, shape in shapes.items() if len(shape) == 2 and tensor not in case.plain}
    packed_as = {tensor: "Q4_K" if shapes[tensor][-1] % 256 == 0 else "Q4_0" for tensor in quantized}
    return write_hole(path, "pig", {tensor: (packed_as.get(tensor, "F16"), shape) for tensor, shape in shapes.items()})


@pytest.mark.parametrize(("name", "variant"), PUBLISHED)
def test_a_file_of_true_size_says_what_it_is(tmp_path, name, variant):
    case, published = CASES[name], CASES[name].published[variant]
    path = write_true_size(case, published.shapes, tmp_path / f"{published.title}.gguf")
    start = time.perf_counter()
    facts = inspect_file(path)
    seconds = time.perf_counter() - start
    assert facts.refused is None and facts.variant == variant and not facts.notes
    assert {key: facts.config[key] for key in published.config} == dict(published.config)
    # Model cards round to three digits, some of them down.
    assert len(published.shapes) == published.tensors and abs(facts.parameters / published.parameters - 1) < 0.005
    assert seconds < 5


def of_class(model_class: str, config) -> dict[str, tuple[int, ...]]:
    """Return the shapes in the state dict of diffusers' class, without memory."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in getattr(diffusers, model_class)(**config).state_dict().items()}


def converted(convert, shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes that diffusers' conversion makes of a file's, without tensors that hold nothing."""
    stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if 0 not in shape}
    return {name: tuple(value.shape) for name, value in convert(stored).items()}


@pytest.mark.parametrize(("name", "variant"), PUBLISHED)
def test_the_table_of_a_published_model_becomes_diffusers_class(name, variant):
    """The tables were typed from other programs: just the tensors of diffusers' class come of them."""
    case, published = CASES[name], CASES[name].published[variant]
    assert converted(case.convert, published.shapes) == of_class(case.model_class, published.config)


def test_the_table_of_flux1_becomes_diffusers_class():
    shapes = Architecture(19, 38, width=3072, head=128, text=4096, pooled=768).bfl_shapes()
    assert len(shapes) == 780
    ours = converted(convert_flux_transformer_checkpoint_to_diffusers, shapes)
    assert ours == of_class("FluxTransformer2DModel", {"guidance_embeds": True})


@all_cases
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_the_forward_is_diffusers_own_of_the_decoded_tensors(tmp_path, case, kind):
    """Exact: both have the same float32 weights and call the same products in the same order."""
    file = small_file(case.name, kind)
    model = load_transformer(file.write(tmp_path / "small.gguf"), dtype=torch.float32, backend="torch")
    expected = run(oracle(case, file), case)
    assert torch.isfinite(expected).all() and expected.std() > 1e-3
    torch.testing.assert_close(run(model, case), expected, rtol=0, atol=0)


@all_cases
def test_config_and_layers(tmp_path, case):
    model = load_transformer(write(case, tmp_path / "small.gguf"))
    assert type(model).__name__ == case.model_class and not model.training
    assert public_config(model) == dict(case.config)
    rows = [module.out_features for module in model.modules() if isinstance(module, GGUFLinear)]
    assert sum(rows) == sum(case.shapes[name][0] for name in case.quantized)
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and type(module) is nn.Linear]
    inside = [name for name in plain if name.startswith(tuple(f"{pair[1]}." for pair in ROWS[case.name].blocks))]
    assert {ROWS[case.name].original_of(f"{name}.weight") for name in inside} <= case.plain


@all_cases
def test_load_and_save_keep_every_byte(tmp_path, case):
    path = write(case, tmp_path / "small.gguf")
    model = load_transformer(path)
    for names in ROWS[case.name].namings:
        save_gguf(model, tmp_path / "again.gguf", names=names)
        again = load_transformer(tmp_path / "again.gguf")
        assert packed(again) == packed(model)
        assert public_config(again) == public_config(model)
        values = dict(again.state_dict())
        assert values.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(values[name], value) if isinstance(value, torch.Tensor) else values[name] == value
    save_gguf(model, tmp_path / "again.gguf")
    mine, theirs = read_gguf(tmp_path / "again.gguf"), read_gguf(path)
    assert mine.metadata["general.architecture"] == case.gguf_name
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name in case.quantized:
        assert mine.tensors[name].data.equal(theirs.tensors[name].data), name


@all_cases
@pytest.mark.parametrize("stated", ["pig", "cow", "", "flux", "qwen_image"])
def test_tensors_tell_the_model_whatever_the_key_says(tmp_path, case, stated):
    path = write(case, tmp_path / "small.gguf", architecture=stated, prefix="model.diffusion_model.")
    assert type(load_transformer(path)).__name__ == case.model_class


@all_cases
def test_odd_orders_are_read(tmp_path, case):
    order = sorted(case.shapes, key=lambda name: hash(name[::-1]))
    model = load_transformer(write(case, tmp_path / "small.gguf", order=order))
    assert packed(model) == packed(load_transformer(write(case, tmp_path / "usual.gguf")))


@all_cases
def test_missing_and_superfluous_tensors_are_named(tmp_path, case):
    file = small_file(case.name)
    lost = case.quantized[-1]
    tensors = {name: value for name, value in file.tensors.items() if name != lost}
    tensors["nobody.knows.weight"] = (np.zeros(4, np.float32), "F32", (4,))
    with pytest.raises(GGUFError) as error:
        load_transformer(FluxFile(tensors).write(tmp_path / "small.gguf"))
    assert lost in str(error.value) and case.name in str(error.value)
    if f"missing: {lost}" in str(error.value):
        assert "superfluous: nobody.knows.weight" in str(error.value)


@all_cases
def test_a_file_in_diffusers_names(tmp_path, case):
    """What a 16-bit folder of diffusers becomes when it is quantized without a change of names."""
    model = oracle(case, small_file(case.name))
    file, rng = FluxFile(), np.random.default_rng(2)
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        kind = "Q8_0" if len(shape) == 2 and shape[-1] % 32 == 0 else "F32"
        std = 0.1 if len(shape) < 2 else shape[-1] ** -0.5
        file.tensors[name] = (random_tensor(rng, shape, kind, std, 1.0 if _is_norm(name) else 0.0), kind, shape)
    loaded = load_transformer(file.write(tmp_path / "named.gguf"), dtype=torch.float32, backend="torch")
    model.load_state_dict(decoded(file))
    torch.testing.assert_close(run(loaded, case), run(model, case), rtol=0, atol=0)


@all_cases
def test_quantizing_from_either_naming_gives_one_file(tmp_path, case):
    """BF16 sources as makers publish them, a file in original names and a folder in diffusers'."""
    values = {name: value.bfloat16().contiguous() for name, value in decoded(small_file(case.name)).items()}
    save_file(values, tmp_path / "original.safetensors")
    folder = tmp_path / "transformer"
    folder.mkdir()
    converted = case.convert({name: value.clone() for name, value in values.items()})
    save_file({name: value.contiguous() for name, value in converted.items()}, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": case.model_class, **case.config}))
    files = []
    for source in (tmp_path / "original.safetensors", folder):
        conversion = prepare(source, Request(type="Q8_0"), provenance=False, device="cpu", engine=ENGINE)
        conversion.write(tmp_path / "made.gguf", force=True)
        files.append(read_gguf(tmp_path / "made.gguf"))
        for name, tensor in files[-1].tensors.items():
            assert (tensor.format == "Q8_0") == (name in case.quantized), name
    first, second = files
    assert first.metadata["general.architecture"] == case.gguf_name
    assert {name: tensor.format for name, tensor in first.tensors.items()} == {
        name: tensor.format for name, tensor in second.tensors.items()
    }
    assert all(tensor.data.equal(second.tensors[name].data) for name, tensor in first.tensors.items())
    assert first.tensors.keys() == case.shapes.keys()


@all_cases
def test_rows_name_every_argument_of_diffusers_class(case):
    row = ROWS[case.name]
    assert set(config_names(row)) == set(case.config)
    signature = inspect.signature(getattr(diffusers, row.model_class).__init__).parameters
    assert set(row.untold) <= set(signature)
    for variant in row.variants:
        assert set(variant.config) <= set(signature)


def test_load_flux_says_who_loads_the_others(tmp_path):
    others = [case for case in CASES.values() if case.name not in ("FLUX.1", "FLUX.2")]
    for case in others:
        with pytest.raises(GGUFError, match=rf"This is {case.name}, not FLUX.1 or FLUX.2 .*load_transformer"):
            load_flux(write(case, tmp_path / "other.gguf"))
