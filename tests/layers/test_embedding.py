"""GGUFEmbedding: bit-equal rows, few rows decoded, and the operations a pipeline performs on it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from flux_kernels import FormatError, GGUFEmbedding, dequantize, memory_footprint, torch_backend

from ..conftest import random_packed

ROWS, WIDTH = 40, 256
IDS = torch.tensor([[3, 0, 39], [3, 3, 7]])


@pytest.fixture(params=["Q8_0", "Q4_K", "IQ4_XS"])
def table(request):
    return GGUFEmbedding(random_packed(request.param, ROWS, WIDTH), request.param, compute_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_decoded_table(table, dtype):
    table.to(dtype)
    out = table(IDS)
    assert out.dtype == dtype and out.shape == (2, 3, WIDTH)
    assert torch.equal(out, dequantize(table.qweight, table.format, dtype)[IDS])
    assert torch.equal(table.dequantize()(IDS), out)


def test_only_the_rows_looked_up_are_decoded(table, monkeypatch):
    decoded = []
    original = torch_backend.dequantize
    monkeypatch.setattr(torch_backend, "dequantize", lambda weight, *rest: decoded.append(weight.n) or original(weight, *rest))
    table(IDS)
    assert sum(decoded) == IDS.numel()


def test_no_ids_give_no_rows(table):
    assert table(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, WIDTH)


def test_weight_is_a_stand_in_that_cannot_be_written(table):
    assert table.weight.shape == (ROWS, WIDTH) and table.weight.dtype == torch.float32
    assert table.num_embeddings == ROWS and table.embedding_dim == WIDTH
    with pytest.raises(FormatError, match="packed"):
        table.weight = torch.nn.Parameter(torch.zeros(ROWS, WIDTH))
    with pytest.raises(FormatError, match="packed"):
        table.weight.data[0] = 0


def test_bytes_stay_bytes(table):
    before = table.qweight.clone()
    table.half().float().to(torch.bfloat16)
    assert torch.equal(table.qweight, before) and table.compute_dtype == torch.bfloat16
    with pytest.raises(FormatError, match="stay uint8"):
        table.type(torch.float32)


def test_copies_pickles_and_state_dicts(table):
    expected = table(IDS)
    assert torch.equal(copy.deepcopy(table)(IDS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(table))(IDS), expected)
    other = GGUFEmbedding(torch.zeros_like(table.qweight), table.format, compute_dtype=torch.float32)
    other.load_state_dict(table.state_dict())
    assert torch.equal(other(IDS), expected)


def test_a_state_dict_of_another_table_is_refused(table):
    state = table.state_dict()
    state["weight"] = state["weight"] + torch.tensor([0, 1, 0, 0])
    with pytest.raises(RuntimeError, match=rf"the saved weight is \[{ROWS + 1}, {WIDTH}\], this layer is \[{ROWS}, {WIDTH}\]"):
        table.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"expected the int64 \[ggml type, N, K, planes\]"):
        table.load_state_dict({"weight": torch.zeros(ROWS, WIDTH), "qweight": table.qweight})


def test_footprint_counts_packed_bytes(table):
    assert memory_footprint(table) == {table.format: table.qweight.numel(), "total": table.qweight.numel()}


def test_bad_bytes_are_refused():
    with pytest.raises(FormatError, match="uint8"):
        GGUFEmbedding(torch.zeros(4, 34), "Q8_0")
    with pytest.raises(FormatError, match=r"\[rows, row bytes\]"):
        GGUFEmbedding(torch.zeros(34, dtype=torch.uint8), "Q8_0")
    with pytest.raises(FormatError, match="compute_dtype"):
        GGUFEmbedding(random_packed("Q8_0", 4, 32), "Q8_0", compute_dtype=torch.float64)


def test_compiles_without_graph_breaks(table):
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), table(IDS))
