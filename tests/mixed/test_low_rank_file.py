"""Low-rank corrections from plan to file to model: what was planned is what the layers compute with."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import flux_kernels as fk
from flux_kernels.convert.choose_types import Request
from flux_kernels.convert.convert import prepare
from flux_kernels.errors import FormatError, GGUFError
from flux_kernels.gguf.file import write_gguf
from flux_kernels.mixed.covariance import save_covariance
from flux_kernels.mixed.low_rank_fit import corrected
from flux_kernels.mixed.plan_file import Plan
from flux_kernels.models.low_rank_tensors import correction_names, join_branches

from .source_models import SMALL, bfl_tensors

QKV = "double_blocks.0.img_attn.qkv.weight"
MOD = "double_blocks.0.txt_mod.lin.weight"
RANKS = {QKV: 8, "single_blocks.0.linear1.weight": 4, MOD: 16}


def plan_of(ranks=RANKS, kind="Q4_K") -> Plan:
    types = {name: kind for name, shape in SMALL.bfl_shapes().items() if len(shape) == 2 and "_blocks." in name}
    return Plan(types=types, bytes=1, cost=0.0, low_rank=dict(ranks))


@pytest.fixture
def tensors(tmp_path):
    made = bfl_tensors()
    save_file(made, tmp_path / "small.safetensors")
    return made


@pytest.fixture
def file(tmp_path, tensors):
    conversion = prepare(tmp_path / "small.safetensors", Request(plan=plan_of()))
    conversion.write(tmp_path / "corrected.gguf")
    assert (tmp_path / "corrected.gguf").stat().st_size == conversion.nbytes
    assert any("Only flux_kernels.load_flux reads" in note for note in conversion.notes)
    return tmp_path / "corrected.gguf"


def expected(weight: torch.Tensor, rank: int, seen=None):
    """Fit as `measure` does, on the whole matrix in float32."""

    def round_trip(part):
        return fk.dequantize(fk.quantize(part, "Q4_K"), "Q4_K")

    return corrected(weight.float(), round_trip, rank, seen)


def effective(layer) -> torch.Tensor:
    # Its branch is included.
    return layer.dequantize(torch.float32).weight


def test_layers_compute_with_what_was_fitted(file, tensors):
    """Rows of fused tensors go to their layers: q, k, v and the single block's MLP input share down."""
    model = fk.load_flux(file, dtype=torch.float32)
    attention = model.transformer_blocks[0].attn
    decoded, down, up = expected(tensors[QKV], 8)
    whole = torch.cat([effective(layer) for layer in (attention.to_q, attention.to_k, attention.to_v)])
    torch.testing.assert_close(whole, decoded + up.float() @ down.float(), rtol=1e-6, atol=1e-6)
    single = model.single_transformer_blocks[0]
    decoded, down, up = expected(tensors["single_blocks.0.linear1.weight"], 4)
    whole = torch.cat([effective(layer) for layer in (single.attn.to_q, single.attn.to_k, single.attn.to_v, single.proj_mlp)])
    torch.testing.assert_close(whole, decoded + up.float() @ down.float(), rtol=1e-6, atol=1e-6)
    assert model.transformer_blocks[0].norm1_context.linear.rank == 16
    assert attention.to_out[0].rank == 0
    x = torch.randn(3, attention.to_q.in_features)
    torch.testing.assert_close(attention.to_q(x), x @ effective(attention.to_q).T + attention.to_q.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fuse", [None, "qkv"])
def test_saving_writes_the_same_bytes_again(file, tmp_path, fuse):
    model = fk.load_flux(file, fuse=fuse)
    fk.save_gguf(model, tmp_path / "again.gguf")
    first, second = fk.read_gguf(file), fk.read_gguf(tmp_path / "again.gguf")
    assert first.tensors.keys() == second.tensors.keys()
    for name in [*RANKS, *(half for weight in RANKS for half in correction_names(weight))]:
        assert first.tensors[name].format == second.tensors[name].format
        assert torch.equal(first.tensors[name].data, second.tensors[name].data)


def test_a_correction_is_fitted_to_the_covariance(tmp_path, tensors):
    """Inputs along few directions: a correction fitted to them leaves far less error there than another."""
    k = tensors[QKV].shape[1]
    directions = torch.randn(4, k)
    covariance = directions.T @ directions / 4
    save_covariance(tmp_path / "c.safetensors", {QKV: covariance})
    errors = {}
    for name, path in (("with", tmp_path / "c.safetensors"), ("without", None)):
        conversion = prepare(tmp_path / "small.safetensors", Request(plan=plan_of({QKV: 4}, "Q2_K")), covariance=path)
        conversion.write(tmp_path / f"{name}.gguf")
        attention = fk.load_flux(tmp_path / f"{name}.gguf", dtype=torch.float32).transformer_blocks[0].attn
        whole = torch.cat([effective(layer) for layer in (attention.to_q, attention.to_k, attention.to_v)])
        errors[name] = ((whole - tensors[QKV].float()) @ directions.T).norm()
    assert errors["with"] < 0.1 * errors["without"]


def test_branches_of_several_layers_become_one_correction_exactly():
    """A shared down stays one; another layer's gets ranks of its own; a layer without one gets zeros."""
    shared, other = torch.randn(2, 8), torch.randn(3, 8)
    branches = [(shared, torch.randn(4, 2)), None, (shared.clone(), torch.randn(5, 2)), (other, torch.randn(6, 3))]
    down, up = join_branches(branches, [4, 7, 5, 6])
    assert down.shape == (5, 8) and up.shape == (22, 5)
    products = [
        torch.zeros(rows, 8) if branch is None else branch[1] @ branch[0] for branch, rows in zip(branches, (4, 7, 5, 6))
    ]
    torch.testing.assert_close(up @ down, torch.cat(products))
    assert join_branches([None, None], [1, 2]) is None


def broken(file, tmp_path, change):
    """Write the file anew with changed tensors; return its path."""
    read = fk.read_gguf(file)
    entries = {name: (tensor.format, tensor.shape, tensor.data) for name, tensor in read.tensors.items()}
    change(entries)
    metadata = {key: (read.metadata_types[key], value) for key, value in read.metadata.items()}
    write_gguf(tmp_path / "broken.gguf", [(name, *entry) for name, entry in entries.items()], metadata)
    return tmp_path / "broken.gguf"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop(correction_names(QKV)[0]), "only one half"),
        (lambda e: e.update({correction_names(QKV)[0]: ("BF16", (7, 256), torch.zeros(7, 256).bfloat16())}), "must be"),
        (lambda e: e.update({"img_in.low_rank_up": ("F32", (4, 4), torch.zeros(4, 4))}), "no quantized matrix"),
        (
            lambda e: e.update({correction_names(QKV)[0]: ("Q8_0", (8, 256), fk.quantize(torch.zeros(8, 256), "Q8_0"))}),
            "are F16, BF16 or F32",
        ),
    ],
    ids=["half", "shape", "plain", "type"],
)
def test_a_correction_that_does_not_fit_is_refused(file, tmp_path, change, message):
    with pytest.raises(GGUFError, match=message):
        fk.load_flux(broken(file, tmp_path, change))


def test_a_plan_whose_rank_does_not_fit_is_refused(tmp_path, tensors):
    types = plan_of().types | {QKV: "BF16"}
    with pytest.raises(FormatError, match="correction of rank 8"):
        prepare(tmp_path / "small.safetensors", Request(plan=Plan(types=types, bytes=1, cost=0.0, low_rank={QKV: 8})))
    with pytest.raises(FormatError, match="no file of covariances"):
        prepare(tmp_path / "small.safetensors", Request(plan=plan_of()), covariance=tmp_path / "small.txt")
