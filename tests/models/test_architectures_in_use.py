"""Every architecture in use: 16 bit, whole files quantized, adapters, compile, offload, fusing."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from flux_kernels import FluxKernelsConfig, load_transformer
from flux_kernels.cli import app
from flux_kernels.convert.choose_types import Request
from flux_kernels.convert.convert import prepare
from flux_kernels.generation.inspect_file import inspect_file
from flux_kernels.layers.fuse import fuse_projections, unfuse_projections
from flux_kernels.layers.linear import GGUFLinear

from ..flux_files import FluxFile, random_tensor
from .cases import Case
from .test_architectures import ROWS, all_cases, oracle, packed, run, small_file, write

CPU = torch.device("cpu")
# float32; sums in another order.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
RANK = 4


_ACTIVATIONS = re.compile(r"hidden_states|projections$|^x$|^cap_feats$")


def half_inputs(inputs: dict, dtype: torch.dtype) -> dict:
    """Give activations the model's dtype, as pipelines do; positions and times stay."""
    return {name: _cast(value, dtype) if _ACTIVATIONS.search(name) else value for name, value in inputs.items()}


def _cast(value, dtype):
    return [_cast(item, dtype) for item in value] if isinstance(value, list) else value.to(dtype)


@torch.inference_mode()
def run_half(model: nn.Module, case: Case) -> torch.Tensor:
    inputs = half_inputs(case.inputs(torch.Generator().manual_seed(1)), model.dtype)
    result = model(**inputs, return_dict=False)[0]
    return torch.stack(result) if isinstance(result, list) else result


def loaded(case: Case, tmp_path, **options) -> nn.Module:
    return load_transformer(write(case, tmp_path / "small.gguf"), **{"dtype": torch.float32, "backend": "torch", **options})


def block_linears(case: Case, model: nn.Module) -> list[str]:
    """Name the packed layers inside the blocks."""
    starts = tuple(f"{pair[1]}." for pair in ROWS[case.name].blocks)
    return [name for name, module in model.named_modules() if isinstance(module, GGUFLinear) and name.startswith(starts)]


def error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the square error relative to the energy of what is wanted."""
    return float((value.float() - wanted.float()).square().mean() / wanted.float().square().mean())


@all_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_computes_what_diffusers_does_in_16_bit(tmp_path, case, dtype):
    """What diffusers keeps in 32 bit stays there. The error is at most twice its own model's."""
    model = loaded(case, tmp_path, dtype=dtype)
    plain = oracle(case, small_file(case.name))
    expected = run(plain, case)
    wide = set(getattr(plain, "_keep_in_fp32_modules", None) or ())
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if wide.intersection(name.split(".")) else dtype)
        stored = model.get_parameter(name) if name in dict(model.named_parameters()) else None
        assert stored is None or stored.dtype == parameter.dtype, name
    assert model.dtype == dtype
    result = run_half(model, case)
    assert torch.isfinite(result).all()
    assert error(result, expected) <= 2 * error(run_half(plain, case), expected)


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_whose_every_matrix_is_quantized(tmp_path, case, dtype):
    """As stable-diffusion.cpp writes them: embedders and tables too, where rows are whole blocks."""
    file, rng = FluxFile(dict(small_file(case.name).tensors)), np.random.default_rng(3)
    matrices = [name for name, shape in case.shapes.items() if len(shape) == 2 and shape[-1] % 32 == 0]
    for name in matrices:
        shape = case.shapes[name]
        file.tensors[name] = (random_tensor(rng, shape, "Q8_0", shape[-1] ** -0.5), "Q8_0", shape)
    path = file.write(tmp_path / "all.gguf")
    model = load_transformer(path, dtype=dtype, backend="torch")
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    rows = {name: model.get_submodule(name).in_features for name in plain}
    assert not [name for name, columns in rows.items() if columns % 32 == 0], rows
    expected = run(oracle(case, file), case)
    if dtype == torch.float32:
        torch.testing.assert_close(run(model, case), expected, rtol=0, atol=0)
    else:
        assert torch.isfinite(run_half(model, case)).all()


@all_cases
def test_dimensions_of_one_may_be_lost(tmp_path, case):
    """ggml counts no last dimension of 1, so tools that write files with it drop the first of ours."""
    file = small_file(case.name)
    tensors = {}
    for name, (data, kind, shape) in file.tensors.items():
        kept = shape
        while len(kept) > 1 and kept[0] == 1:
            kept = kept[1:]
        tensors[name] = (data.reshape(kept) if kept != shape else data, kind, kept)
    model = load_transformer(FluxFile(tensors).write(tmp_path / "lost.gguf"), dtype=torch.float32, backend="torch")
    torch.testing.assert_close(run(model, case), run(oracle(case, file), case), rtol=0, atol=0)


@all_cases
def test_what_files_carry_besides_is_left_out(tmp_path, case):
    file = FluxFile(dict(small_file(case.name).tensors))
    file.tensors |= {name: (np.ones(shape, np.float16), "F16", shape) for name, shape in case.extra.items()}
    model = load_transformer(file.write(tmp_path / "extra.gguf"))
    assert packed(model) == packed(load_transformer(write(case, tmp_path / "small.gguf")))


@all_cases
def test_adapters_go_on_and_come_off(tmp_path, case):
    """A LoRA on every packed layer of the blocks gives what it gives on diffusers' own model."""
    peft = pytest.importorskip("peft")
    # As adapters leave it: some norms compute otherwise where a gradient is wanted.
    model, plain = loaded(case, tmp_path).requires_grad_(False), oracle(case, small_file(case.name))
    before = run(model, case)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=block_linears(case, model), init_lora_weights=False)
    count = len(config.target_modules)
    for each in (model, plain):
        each.add_adapter(config)
        adapters = {name: value for name, value in each.named_parameters() if "lora_" in name}
        assert len(adapters) == 2 * count
        torch.manual_seed(0)
        for name in sorted(adapters):
            adapters[name].data.normal_(std=0.05)
    adapted = run(model, case)
    assert not torch.allclose(adapted, before, **CLOSE)
    torch.testing.assert_close(adapted, run(plain, case), **CLOSE)
    model.disable_adapters()
    torch.testing.assert_close(run(model, case), before, rtol=0, atol=0)
    model.unload_lora()
    assert packed(model) == packed(loaded(case, tmp_path))
    torch.testing.assert_close(run(model, case), before, rtol=0, atol=0)


@all_cases
def test_compiled_it_gives_the_same(tmp_path, case):
    torch._dynamo.reset()
    model = loaded(case, tmp_path)
    compiled = torch.compile(model, backend="aot_eager")
    inputs = case.inputs(torch.Generator().manual_seed(1))
    with torch.no_grad():
        result = compiled(**inputs, return_dict=False)[0]
    result = torch.stack(result) if isinstance(result, list) else result
    torch.testing.assert_close(result, run(model, case), rtol=0, atol=0)
    torch._dynamo.reset()


@all_cases
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_group_offloading_gives_the_same(tmp_path, case, level):
    model = loaded(case, tmp_path)
    expected = run(model, case)
    if not getattr(model, "_supports_group_offloading", True):
        pytest.skip("diffusers' class refuses group offloading")
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=level, **blocks)
    torch.testing.assert_close(run(model, case), expected, rtol=0, atol=0)


@all_cases
def test_fused_projections_give_the_same_and_come_apart(tmp_path, case):
    model = loaded(case, tmp_path)
    expected, bytes_before = run(model, case), packed(model)
    report = fuse_projections(model)
    torch.testing.assert_close(run(model, case), expected, **CLOSE)
    unfuse_projections(model)
    assert packed(model) == bytes_before
    assert not report.left, report.left


@all_cases
def test_what_is_quantized_here_has_the_new_layout(tmp_path, case):
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in case.shapes.items()}, tmp_path / "source.safetensors"
    )
    conversion = prepare(tmp_path / "source.safetensors", Request(type="Q4_0"), provenance=False, device="cpu")
    conversion.write(tmp_path / "made.gguf")
    assert inspect_file(tmp_path / "made.gguf").layout == "new"


@all_cases
def test_inspect_names_the_model(tmp_path, case):
    result = CliRunner().invoke(app, ["inspect", str(write(case, tmp_path / "small.gguf"))])
    assert result.exit_code == 0, result.output
    assert case.name in result.output


@all_cases
def test_diffusers_quantizes_it_while_it_loads(tmp_path, case):
    """FluxKernelsConfig, then save_pretrained and back, bit for bit."""
    plain = oracle(case, small_file(case.name))
    plain.save_pretrained(tmp_path / "plain")
    config = FluxKernelsConfig(format={name: "Q8_0" for name in block_linears(case, loaded(case, tmp_path))})
    model = type(plain).from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.float32)
    assert len(packed(model)) == len(config.format)
    model.save_pretrained(tmp_path / "packed")
    again = type(plain).from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert packed(again) == packed(model)
    torch.testing.assert_close(run(again, case), run(model, case), rtol=0, atol=0)
