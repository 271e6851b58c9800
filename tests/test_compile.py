"""Compilation of whole models and repeated blocks in every mode, export and AOTInductor.

There are no more compilations than with plain linears.

aot_eager runs the same kernels as eager mode, so results are equal; inductor fuses the arithmetic around packed layers, which
moves float32 results by rounding (`CLOSE`).
"""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import flux_kernels as fk
from flux_kernels import torch_backend
from flux_kernels.compute import COMPUTE_MODES
from flux_kernels.formats import FORMATS, Packed

from .conftest import TINY_FLUX, flux_inputs

diffusers = pytest.importorskip("diffusers")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MANY = {"tokens": 64, "text": 32}  # more rows than WEIGHT_ONLY_M, so that every mode runs as itself
SIZES = [{}, {"tokens": 24, "text": 12}, {"tokens": 36, "text": 9}]


@pytest.fixture(scope="module")
def plain_flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(**{**TINY_FLUX, "num_layers": 1, "num_single_layers": 1}).eval()


@pytest.fixture(scope="module")
def packed_flux(plain_flux):
    model = copy.deepcopy(plain_flux)
    fk.swap_linear(model, format={"*transformer_blocks*": "Q4_K"})
    return model


@pytest.fixture(autouse=True)
def forget_compilations():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prepared(packed_flux, kind: str):
    """Copy the model and put it in a compute mode.

    "fused" is int8 with the projections fused as far as they can be.
    """
    model = copy.deepcopy(packed_flux)
    fk.swap_linear(model, compute="int8" if kind == "fused" else kind)
    if kind == "fused":
        fk.fuse_projections(model, "linear1")
    return model


@pytest.mark.parametrize("kind", ["fp16_accumulate", "fused"])  # exact: test_operations_table.py; "fused" is int8
def test_the_whole_model_is_one_graph(packed_flux, kind):
    model = prepared(packed_flux, kind)
    with torch.no_grad():
        want = model(**flux_inputs(**MANY))[0]
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**flux_inputs(**MANY))[0]
    assert torch.equal(got, want)


def test_the_backward_pass_compiles(packed_flux):
    gradients = []
    for forward in (packed_flux, torch.compile(packed_flux, fullgraph=True, backend="aot_eager")):
        inputs = flux_inputs()
        inputs["hidden_states"].requires_grad_(True)
        forward(**inputs)[0].square().mean().backward()
        gradients.append(inputs["hidden_states"].grad)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)


def compilations(model, repeated_blocks: bool) -> list[int]:
    """Return how many graphs were compiled in all, after each of SIZES; the first size comes twice."""
    torch._dynamo.reset()
    counter, model = CompileCounter(), copy.deepcopy(model)
    if repeated_blocks:
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        forward = model
    else:
        forward = torch.compile(model, fullgraph=True, backend=counter)
    counts = []
    with torch.no_grad():
        for size in (SIZES[0], *SIZES):
            forward(**flux_inputs(**size))
            counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0, "the same sizes were compiled twice"
    return counts


@pytest.mark.parametrize(("repeated_blocks", "kind"), [(False, "int8"), (True, "fused")])
def test_new_sizes_compile_no_more_often_than_with_plain_linears(plain_flux, packed_flux, repeated_blocks, kind):
    """Image and text lengths change; the second size makes both dynamic, and no later one compiles again."""
    plain = compilations(plain_flux, repeated_blocks)
    packed = compilations(prepared(packed_flux, kind), repeated_blocks)
    assert all(mine <= theirs for mine, theirs in zip(packed, plain, strict=True)), (packed, plain)
    assert packed[-1] == packed[2], "sizes that follow were compiled again"


def test_swapping_the_mode_compiles_once_more_and_no_stale_graph_runs(packed_flux):
    """The mode is part of what a graph was compiled for; changing it must not leave the old one in use."""
    model, counter = copy.deepcopy(packed_flux), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        exact = compiled(**flux_inputs(**MANY))[0]
        fk.swap_linear(model, compute="int8")
        int8 = compiled(**flux_inputs(**MANY))[0]
        assert counter.frame_count == 2
        assert torch.equal(int8, model(**flux_inputs(**MANY))[0]) and not torch.equal(int8, exact)


def test_what_is_put_on_a_compiled_fused_model_is_not_missed(packed_flux):
    """Graphs are guarded by what the parts are: a branch on one, or an adapter around one, compiles anew."""
    peft = pytest.importorskip("peft")
    model = prepared(packed_flux, "fused")
    fk.swap_linear(model, compute="exact")
    compiled, part = torch.compile(model, fullgraph=True, backend="eager"), model.single_transformer_blocks[0].attn.to_q
    results = []
    for change in (
        lambda: None,
        lambda: part.set_low_rank(0.1 * torch.ones(1, part.in_features), 0.1 * torch.ones(part.out_features, 1)),
        lambda: model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "proj_mlp"], init_lora_weights=False)),
    ):
        change()
        with torch.no_grad():
            results.append(compiled(**flux_inputs())[0])
            torch.testing.assert_close(results[-1], model(**flux_inputs())[0], **CLOSE)
    assert not torch.allclose(results[0], results[1], **CLOSE) and not torch.allclose(results[1], results[2], **CLOSE)


def test_strict_export(packed_flux):
    model = prepared(packed_flux, "fused")
    exported = torch.export.export(model, (), flux_inputs(**MANY), strict=True)
    with torch.no_grad():
        assert torch.equal(exported.module()(**flux_inputs(**MANY))[0], model(**flux_inputs(**MANY))[0])


def test_export_with_dynamic_lengths(packed_flux, tmp_path):
    """One exported program serves other resolutions and prompts, from a file too.

    Packed rows stay uint8 in it.
    """
    model = prepared(packed_flux, "int8")
    image, text = torch.export.Dim("image", min=20, max=4096), torch.export.Dim("text", min=2, max=512)
    shapes = dict.fromkeys(flux_inputs())
    shapes |= {"hidden_states": {1: image}, "img_ids": {0: image}, "encoder_hidden_states": {1: text}, "txt_ids": {0: text}}
    exported = torch.export.export(model, (), flux_inputs(**MANY), dynamic_shapes=shapes, strict=False)
    rows = {name for name, value in exported.state_dict.items() if value.dtype == torch.uint8}
    assert rows == {name for name, _ in model.named_parameters() if name.endswith("qweight")}
    torch.export.save(exported, tmp_path / "flux.pt2")
    loaded = torch.export.load(tmp_path / "flux.pt2").module()
    other = flux_inputs(tokens=100, text=17)
    with torch.no_grad():
        assert torch.equal(loaded(**other)[0], model(**other)[0])


@pytest.mark.slow
def test_ahead_of_time_package(tmp_path):
    """An AOTInductor package runs packed layers of two modes with other numbers of rows.

    In a process of its own too.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    fk.swap_linear(model, format="Q4_K", compute={"0": "exact", "2": "int8"})
    rows = torch.export.Dim("rows", min=17, max=4096)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(40, 256),), dynamic_shapes=({0: rows},))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "packed.pt2"))
        x = torch.randn(100, 256)
        want = model(x)
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), want, **CLOSE)
    torch.save(x, tmp_path / "x.pt")
    code = (
        f"import torch, flux_kernels; x = torch.load({str(tmp_path / 'x.pt')!r}); "
        f"torch.save(torch._inductor.aoti_load_package({package!r})(x), {str(tmp_path / 'y.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), want, **CLOSE)


# CUDA graphs: nothing on the way to a kernel may wait for the device or depend on its data


@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_the_torch_backend_never_reads_a_result_back(compute):
    """Tensors on the meta device have no data: an `.item()`, or a branch on a value, raises."""
    for name in ("Q4_K", "Q6_K", "Q8_0"):  # types without a table, which would be cached
        fmt = FORMATS[name]
        with torch.device("meta"):
            data = torch.empty(32, fmt.row_bytes(512), dtype=torch.uint8)
            y = torch_backend.linear(torch.empty(40, 512), Packed(data, fmt), torch.empty(32), compute)
        assert y.shape == (40, 32) and y.is_meta


WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "is_nonzero", "masked_select", "unique"}


def test_launch_code_never_waits_for_the_device():
    """What runs before a launch is checked by name; tests/gpu captures and replays every mode on a GPU."""
    package = Path(fk.__file__).parent
    for path in [*(package / "kernels").glob("*.py"), package / "ops.py"]:
        called = {
            node.func.attr: node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not called.keys() & WAITS, (path.name, {name: called[name] for name in called.keys() & WAITS})
