"""Conversions: published sizes, files that every reader takes, bytes against libggml, and refusals."""

from __future__ import annotations

import ctypes
import json
import shutil
from math import prod

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import flux_kernels as fk
from flux_kernels.convert.choose_types import Request
from flux_kernels.convert.convert import prepare
from flux_kernels.errors import BackendUnavailable, FormatError, GGUFError
from flux_kernels.formats import FORMATS
from flux_kernels.generation.embedded import embedded_model_path
from flux_kernels.mixed.imatrix import save_imatrix
from flux_kernels.mixed.plan_file import Plan
from flux_kernels.models.types import NAMED_TYPES, RULES, tensor_types
from flux_kernels.source.source import understand_source

from .. import libggml_oracle
from ..gguf.test_against_ggml import _InitParams, _library
from ..mixed.source_models import SMALL, bfl_tensors, narrow_conversion
from ..models.test_types import DEV, PUBLISHED

QKV = "double_blocks.0.img_attn.qkv.weight"
EMBEDDED = embedded_model_path()
OWN = [name for name, fmt in FORMATS.items() if fmt.quantize is not None]


@pytest.fixture(scope="module")
def embedded_weights():
    """Read the embedded model's tensors in float32 under BFL's names."""
    tensors = understand_source(EMBEDDED).tensors
    return {name: tensor.read(0, tensor.rows, torch.device("cpu")) for name, tensor in tensors.items()}


@pytest.fixture
def small(tmp_path):
    save_file(bfl_tensors(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def sparse_safetensors(path, shapes, dtype="BF16"):
    """Write the header of a full-size file; its data are a hole."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + 2 * prod(shape)]}
        offset += 2 * prod(shape)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with open(path, "r+b") as file:
        file.truncate(8 + len(text) + offset)
    return path


@pytest.mark.parametrize(("architecture", "rule", "name", "size"), PUBLISHED)
def test_planned_files_have_the_published_sizes(tmp_path, architecture, rule, name, size):
    source = sparse_safetensors(tmp_path / "flux.safetensors", architecture.bfl_shapes())
    conversion = prepare(source, Request(name, rule), provenance=False)
    assert conversion.nbytes == conversion.bare_nbytes == size
    assert conversion.choice.types == tensor_types(rule, name, architecture.bfl_shapes())
    assert conversion.source.model.startswith("FLUX.1") and not conversion.notes


def test_what_a_full_conversion_takes_is_planned(tmp_path):
    source = sparse_safetensors(tmp_path / "flux.safetensors", DEV.bfl_shapes())
    conversion = prepare(source, Request("Q4_K_S", "old"), workers=2)
    assert conversion.source_bytes == 2 * 11_901_408_320
    assert 4.5 < conversion.block_bits_per_weight + 1e-9 < 4.5001 and 4.57 < conversion.bits_per_weight < 4.58
    assert conversion.peak_bytes < 300e6
    assert 0 < conversion.nbytes - conversion.bare_nbytes < 1000


def ggml_reads(path):
    """Return the tensors that ggml's own reader finds in a file: name -> type number."""
    ggml = _library()
    context = ggml.gguf_init_from_file(bytes(path), _InitParams(True, None))
    assert context, "ggml refuses the file; it says why on stderr"
    try:
        return {
            ggml.gguf_get_tensor_name(context, index).decode(): ggml.gguf_get_tensor_type(context, index)
            for index in range(ggml.gguf_get_n_tensors(context))
        }
    finally:
        ggml.gguf_free(ctypes.c_void_p(context))


def forward(model):
    config = model.config
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, config.in_channels, generator=generator),
            encoder_hidden_states=torch.randn(1, 4, config.joint_attention_dim, generator=generator),
            pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=generator),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([2.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(4, 3),
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def velocity():
    from diffusers import FluxTransformer2DModel

    return forward(FluxTransformer2DModel.from_pretrained(EMBEDDED / "transformer", torch_dtype=torch.float32).eval())


# Relative errors of the model's output, above what they were measured at by a half; they grow as bits shrink.
MOST = {"F16": 1e-3, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_0": 0.1, "Q5_1": 0.1, "Q5_K": 0.1, "Q5_K_M": 0.1, "Q4_0": 0.2, "Q4_1": 0.2}
MOST |= dict.fromkeys(("Q4_K", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS", "NVFP4"), 0.2) | {
    "MXFP4": 0.3,
    "Q3_K": 0.4,
    "Q3_K_L": 0.4,
}
MOST |= {"Q2_K": 0.8}


def check_file(path, conversion, velocity, most):
    """Read a file with gguf-py, with ggml, and as a model."""
    assert path.stat().st_size == conversion.nbytes
    read = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert {key: kind.name for key, kind in read.items()} == conversion.choice.types
    assert ggml_reads(path) == read
    error = forward(fk.load_flux(path, dtype=torch.float32)) - velocity
    assert float(error.norm() / velocity.norm()) < most


@pytest.mark.parametrize("name", OWN)
def test_every_type_is_read_everywhere_and_no_worse_than_libggmls(tmp_path, name, velocity, embedded_weights):
    path = tmp_path / "own.gguf"
    conversion = prepare(EMBEDDED, Request(name))
    conversion.write(path)
    check_file(path, conversion, velocity, MOST[name])
    own, theirs = 0.0, 0.0
    for key, tensor in fk.read_gguf(path).tensors.items():
        if tensor.format == name:
            weight = embedded_weights[key]
            oracle = libggml_oracle.dequantize(name, libggml_oracle.quantize(name, weight.numpy()), weight.shape[1])
            own += float((fk.dequantize(tensor.data, name) - weight).double().square().sum())
            theirs += float((torch.from_numpy(oracle) - weight).double().square().sum())
    assert 0 < own <= theirs


LAYOUTS = [(rule, name) for rule in RULES for name in ("F16", "Q8_0", "Q4_K_S")]
LAYOUTS += [("new", name) for name in ("Q5_K_M", "Q4_K_M", "Q3_K_L")]


@pytest.mark.parametrize(("rule", "name"), LAYOUTS)
def test_every_layout_is_read_everywhere(tmp_path, rule, name, velocity):
    # The faster one.
    conversion = prepare(EMBEDDED, Request(name, rule), engine="libggml")
    conversion.write(tmp_path / "layout.gguf")
    check_file(tmp_path / "layout.gguf", conversion, velocity, MOST[name])


@pytest.mark.parametrize("rule", RULES)
def test_diffusers_loads_the_file(tmp_path, rule, velocity, monkeypatch):
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    known = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(known, "checkpoint_mapping_fn", lambda checkpoint, **kwargs: narrow_conversion()(checkpoint))
    path = tmp_path / "embedded.gguf"
    prepare(EMBEDDED, Request("Q8_0", rule), engine="libggml").write(path)
    loaded = FluxTransformer2DModel.from_single_file(
        str(path),
        config=str(EMBEDDED / "transformer"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert float((forward(loaded) - velocity).norm() / velocity.norm()) < 0.02


def test_the_libggml_engine_writes_its_bytes(tmp_path, embedded_weights):
    path = tmp_path / "libggml.gguf"
    importance = torch.linspace(0, 2, 256)
    prepare(EMBEDDED, Request("Q4_K_S"), imatrix={QKV: importance}, engine="libggml").write(path)
    for name, values in ((QKV, importance.numpy()), ("double_blocks.0.txt_attn.qkv.weight", None)):
        oracle = libggml_oracle.quantize("Q4_K", embedded_weights[name].numpy(), values)
        assert np.array_equal(fk.read_gguf(path).tensors[name].data.numpy(), oracle)


def test_importance_moves_the_error_to_where_it_counts_least(tmp_path, embedded_weights):
    importance = torch.where(torch.arange(256) % 2 == 0, 100.0, 1.0)
    save_imatrix(tmp_path / "m.dat", {QKV: (importance * 7, 7)})
    weighted, even = prepare(EMBEDDED, Request("Q3_K_S"), imatrix=tmp_path / "m.dat"), prepare(EMBEDDED, Request("Q3_K_S"))
    assert "15 of 16 quantized matrices have no importance" in weighted.notes[0]
    errors = []
    for conversion in (weighted, even):
        conversion.write(tmp_path / "m.gguf", force=True)
        decoded = fk.dequantize(fk.read_gguf(tmp_path / "m.gguf").tensors[QKV].data, "Q3_K")
        errors.append(float(((decoded - embedded_weights[QKV]).square() * importance).sum()))
    assert errors[0] < 0.95 * errors[1]


def test_bytes_do_not_depend_on_threads_or_run(tmp_path, monkeypatch):
    prepare(EMBEDDED, Request("Q4_1"), workers=1).write(tmp_path / "one.gguf")
    monkeypatch.setattr("flux_kernels.convert.quantize_rows.SLAB_WEIGHTS", {"cpu": 50_000, "cuda": 50_000})
    prepare(EMBEDDED, Request("Q4_1"), workers=3).write(tmp_path / "three.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes()


def test_tensors_of_the_wanted_type_move_as_bytes(tmp_path):
    prepare(EMBEDDED, Request("Q4_K_S"), engine="libggml").write(tmp_path / "first.gguf")
    again = prepare(tmp_path / "first.gguf", Request("Q4_K_M"), engine="libggml")
    again.write(tmp_path / "second.gguf")
    first, second = fk.read_gguf(tmp_path / "first.gguf").tensors, fk.read_gguf(tmp_path / "second.gguf").tensors
    changed = {name for name in first if first[name].format != second[name].format}
    assert changed == {QKV, "double_blocks.0.txt_attn.qkv.weight"}
    assert all(torch.equal(first[name].data, second[name].data) for name in first.keys() - changed)
    assert "2 tensors are quantized in the source (Q4_K) and change their type: errors add up" in again.notes[0]


def test_a_plan_decides_and_the_rule_fills_the_rest(tmp_path, small):
    types = {QKV: "Q6_K", "double_blocks.0.img_attn.qkv.bias": "Q8_0", "txt_in.weight": "F32"}
    plan = Plan(types=types, bytes=1, cost=0.0, options={"rule": "old"}, costs_sha256="ab" * 32)
    plan.save(tmp_path / "plan.json")
    conversion = prepare(
        small,
        Request("Q4_K_S", plan=plan, overrides=[("*.txt_attn.qkv.weight", "Q5_0")]),
        plan_path=str(tmp_path / "plan.json"),
    )
    conversion.write(tmp_path / "mixed.gguf")
    file = fk.read_gguf(tmp_path / "mixed.gguf")
    expected = {**tensor_types("old", "Q4_K_S", SMALL.bfl_shapes()), **types, "double_blocks.0.txt_attn.qkv.weight": "Q5_0"}
    assert {name: tensor.format for name, tensor in file.tensors.items()} == expected
    assert file.metadata["flux_kernels.plan.costs_sha256"] == "ab" * 32
    assert file.metadata["flux_kernels.tensor_types"] == ["*.txt_attn.qkv.weight=Q5_0"]
    assert f"The plan said 1 bytes; the file takes {conversion.nbytes:,}" in conversion.notes[0]
    fk.load_flux(tmp_path / "mixed.gguf")


def test_where_a_file_comes_from_is_in_it(tmp_path, small):
    import hashlib

    save_imatrix(tmp_path / "m.gguf", {QKV: (torch.ones(256), 3)})
    prepare(small, Request("Q8_0"), imatrix=tmp_path / "m.gguf", whole_hash=True).write(tmp_path / "out.gguf")
    metadata = fk.read_gguf(tmp_path / "out.gguf").metadata
    digest = {path: hashlib.sha256((tmp_path / path).read_bytes()).hexdigest() for path in ("small.safetensors", "m.gguf")}
    assert metadata["flux_kernels.source.hashes"] == [f"sha256:{digest['small.safetensors']}"]
    assert metadata["flux_kernels.source.files"] == ["small.safetensors"]
    assert metadata["quantize.imatrix.file"] == "m.gguf" and metadata["quantize.imatrix.entries_count"] == 1
    assert metadata["flux_kernels.imatrix.sha256"] == digest["m.gguf"]
    assert (metadata["general.architecture"], metadata["general.file_type"]) == ("flux", NAMED_TYPES["Q8_0"].file_type)


def test_leftovers_of_a_half_precision_source_stay_half_precision(tmp_path):
    save_file(bfl_tensors(dtype=torch.float16), tmp_path / "half.safetensors")
    assert prepare(tmp_path / "half.safetensors", Request("Q8_0")).choice.types["txt_in.weight"] == "F16"


def test_a_config_that_tensors_do_not_tell_is_kept(tmp_path, small):
    prepare(small, Request("Q8_0"), config={"axes_dims_rope": (16, 24, 24)}).write(tmp_path / "out.gguf")
    assert tuple(fk.load_flux(tmp_path / "out.gguf").config.axes_dims_rope) == (16, 24, 24)


def test_other_models_are_converted_by_pattern(tmp_path):
    tensors = {
        "layers.0.up.weight": torch.randn(64, 256),
        "layers.0.narrow.weight": torch.randn(64, 48),
        "layers.0.conv.weight": torch.randn(8, 4, 3, 3),
        "embed.weight": torch.randn(64, 256),
        "patch.weight": torch.randn(8, 4, 1, 2, 2),
        "layers.0.norm.weight": torch.randn(64),
    }
    save_file(tensors, tmp_path / "other.safetensors")
    conversion = prepare(tmp_path / "other.safetensors", Request("Q4_K_S"), architecture="wan")
    conversion.write(tmp_path / "other.gguf")
    file = fk.read_gguf(tmp_path / "other.gguf")
    assert {name: tensor.format for name, tensor in file.tensors.items()} == {
        "layers.0.up.weight": "Q4_K",
        "layers.0.narrow.weight": "BF16",
        "layers.0.conv.weight": "BF16",
        "embed.weight": "BF16",
        "patch.weight": "BF16",
        "layers.0.norm.weight": "F32",
    }
    assert file.metadata["general.architecture"] == "wan"
    assert file.metadata["comfy.gguf.orig_shape.patch.weight"] == [8, 4, 1, 2, 2]
    assert torch.equal(file.tensors["patch.weight"].data, tensors["patch.weight"].flatten(0, 1).bfloat16())
    notes = " ".join(conversion.notes)
    assert "Not recognised, so nothing is checked" in notes
    assert "1 matrices stay BF16, as their rows are not whole blocks: layers.0.narrow.weight" in notes
    chosen = prepare(tmp_path / "other.safetensors", Request("Q4_K_S", blocks=["emb*"])).choice.types
    assert [name for name, kind in chosen.items() if kind == "Q4_K"] == ["embed.weight"]


PLAN = Plan(types={"nope.weight": "Q4_K"}, bytes=1, cost=0.0)
LOW_RANK = Plan(types={QKV: "Q4_K"}, low_rank={QKV: 1000}, bytes=1, cost=0.0)
REFUSED = [
    (dict(request=Request()), "Nothing to do: give --type, --plan or --tensor-type"),
    (dict(request=Request("Q9_K")), "Unknown file type 'Q9_K'. Known: .*Q4_K_S"),
    (dict(request=Request("Q8_0", "newest")), "Unknown rule 'newest'"),
    (dict(request=Request("Q4_K_M", "old")), "Q4_K_M mixes types"),
    (dict(request=Request(plan=PLAN)), "The plan names nope.weight, which the source does not hold"),
    (dict(request=Request(plan=LOW_RANK)), "correction of rank 1000. Plan again"),
    (dict(request=Request(overrides=[("img_in.weight", "Q4_K")])), "img_in.weight cannot be Q4_K: its rows have 64 weights"),
    (dict(request=Request("Q8_0", overrides=[("nope", "Q4_K")])), "No tensor is called 'nope'"),
    (dict(request=Request("Q8_0", overrides=[("*", "Q9")])), "Unknown ggml type 'Q9'"),
    (dict(request=Request("Q8_0", blocks=["nope"])), "No matrix is a block by name"),
    (dict(request=Request("IQ2_XXS")), "libggml makes IQ2_XXS only with an importance matrix, and there is none of double_bl"),
    (dict(request=Request("IQ3_S"), engine="torch"), "IQ3_S has no quantizer in torch"),
    (dict(request=Request("Q8_0"), workers=0), "workers must be 1 or more, got 0"),
    (dict(request=Request("Q8_0"), imatrix={QKV: torch.ones(255)}), "has 255 values, its rows have 256 weights"),
    (
        dict(request=Request("Q8_0"), imatrix={"nope": torch.ones(256)}),
        "importance matrix has none of the tensors: it names nope",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_done_is_said_before_anything_is_read(arguments, message):
    with pytest.raises(FormatError, match=message):
        prepare(EMBEDDED, **arguments)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(BackendUnavailable, match="tpu"):
        prepare(EMBEDDED, Request("Q8_0"), device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="'cuda' cannot be used here"):
            prepare(EMBEDDED, Request("Q8_0"), device="cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [QKV, "img_in.bias", "txt_in.weight"])
def test_a_damaged_tensor_is_named_and_nothing_is_left(tmp_path, name, value):
    tensors = bfl_tensors()
    tensors[name].view(tensors[name].shape[0], -1)[200, 0] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(FormatError, match=rf"{name} holds 1 values that are NaN or infinite \(first in row 200\)"):
        prepare(tmp_path / "bad.safetensors", Request("Q8_0"), engine="libggml").write(tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_values_beyond_half_precision_are_named(tmp_path):
    tensors = bfl_tensors()
    tensors["img_in.bias"][3] = 1e6
    save_file(tensors, tmp_path / "big.safetensors")
    with pytest.raises(FormatError, match=r"img_in.bias holds 999424 in row 3, which F16 cannot. Use --rule new"):
        prepare(tmp_path / "big.safetensors", Request("Q8_0", "legacy")).write(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_targets_are_checked_before_writing(tmp_path, small, monkeypatch):
    conversion = prepare(small, Request("Q8_0"), engine="libggml")
    before = small.read_bytes()
    with pytest.raises(GGUFError, match="is the source itself. Write to another name"):
        conversion.write(small, force=True)
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(GGUFError, match="out.gguf exists. Give --force"):
        conversion.write(out)
    with pytest.raises(GGUFError, match="is no folder. Make it first"):
        conversion.write(tmp_path / "none" / "out.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=conversion.nbytes - 1))
    with pytest.raises(GGUFError, match=rf"The file takes {conversion.nbytes:,} bytes, .* has {conversion.nbytes - 1:,} free"):
        conversion.write(out, force=True)
    assert out.read_bytes() == b"mine" and small.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "small.safetensors"]


def test_progress_ends_at_all_bytes(tmp_path, small):
    seen = []
    conversion = prepare(small, Request("Q8_0"), engine="libggml")
    conversion.write(tmp_path / "out.gguf", progress=lambda *state: seen.append(state))
    done = [state[1] for state in seen]
    assert done == sorted(done) and done[-1] == seen[-1][2] == conversion.source_bytes
    assert {state[0] for state in seen} == set(SMALL.bfl_shapes())
