"""What swap_linear leaves as it is, and that its report and its errors say so."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import flux_kernels as fk

K = 256


class Tied(nn.Module):
    """A table of tokens, one layer, and a head that holds the table's weight."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(64, K), nn.Linear(K, K), nn.Linear(K, 64, bias=False)
        self.head.weight = self.table.weight


def test_a_weight_that_a_module_left_as_it_is_holds_too_is_said():
    report = fk.swap_linear(Tied(), format="Q8_0")
    sentence = "head shared its weight with table, which stays as it was: the weight is in memory packed and plain now."
    assert sentence in str(report) and 'exclude="head" keeps it shared' in str(report)
    rows = {row["name"]: row for row in json.loads(report.to_json())["rows"]}
    assert rows["head"]["tied"] == "table" and not rows["layer"]["tied"]
    model = Tied()
    assert "shared" not in str(fk.swap_linear(model, format="Q8_0", exclude="head")) and model.head.weight is model.table.weight


def test_a_weight_shared_by_layers_that_are_all_swapped_is_no_surprise():
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model[1].weight = model[0].weight
    assert "shared" not in str(fk.swap_linear(model, format="Q8_0"))
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model[1].weight = model[0].weight
    assert "0 shared its weight with 1, " in str(fk.swap_linear(model, format="Q8_0", exclude="1"))


def test_layers_of_gpt2_that_are_no_nn_linear_are_named():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=K, n_head=4, vocab_size=64, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    report = fk.swap_linear(transformers.GPT2LMHeadModel(config), format="Q8_0")
    assert [row.name for row in report.swapped] == ["lm_head"]
    skipped = {row.name: row for row in report.skipped}
    assert len(skipped) == 8 and skipped["transformer.h.1.mlp.c_fc"].shape == (K, 4 * K)
    assert {row.detail for row in report.skipped} == {"a transformers.pytorch_utils.Conv1D, not a plain nn.Linear"}
    assert "transformer.h.*.attn.c_attn" in str(report) and "8 skipped" in str(report)
    assert "lm_head shared its weight with transformer.wte" in str(report)


def test_the_matrix_of_an_attention_of_torch_is_named():
    report = fk.swap_linear(nn.Sequential(nn.MultiheadAttention(K, 4), nn.LayerNorm((4, K)), nn.Embedding(4, K)), format="Q8_0")
    details = {row.name: row.detail for row in report}
    assert details["0"] == "a torch.nn.modules.activation.MultiheadAttention, not a plain nn.Linear"
    assert set(details) == {"0", "0.out_proj"}


def test_one_layer_is_no_layers():
    assert "\n1 layer swapped, " in str(fk.swap_linear(nn.Sequential(nn.Linear(K, K)), format="Q8_0"))
    assert "\n2 layers swapped, " in str(fk.swap_linear(nn.Sequential(nn.Linear(K, K), nn.Linear(K, K)), format="Q8_0"))


@pytest.mark.parametrize("model", [nn.Linear(K, K), nn.Sequential(nn.Linear(K, K))], ids=["layer", "model"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "Q4_X"}, fk.FormatError, "Unknown block format 'Q4_X'"),
        ({"format": ["Q4_K"]}, TypeError, r"format must be a name or a map of fnmatch pattern -> name, got \['Q4_K'\]"),
        ({"format": torch.float16}, TypeError, "format must be a name .* got torch.float16"),
        ({"compute": ["int8"]}, TypeError, "compute must be a name"),
        ({"backend": "cuda"}, fk.BackendUnavailable, "Unknown backend 'cuda'"),
    ],
)
def test_a_wrong_name_is_said_first_whatever_is_swapped(model, arguments, error, message):
    with pytest.raises(error, match=message):
        fk.swap_linear(model, **arguments)


def test_a_single_layer_is_refused_with_what_does_it():
    with pytest.raises(TypeError, match=r'for a single nn.Linear use GGUFLinear.from_linear\(layer, "Q8_0"\)'):
        fk.swap_linear(nn.Linear(K, K), format="Q8_0")


def test_patterns_match_the_names_of_a_compiled_model():
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    report = fk.swap_linear(torch.compile(model), format="Q8_0", include="1")
    assert [row.name for row in report] == ["0", "1"] and isinstance(model[1], fk.GGUFLinear) and not report.unmatched
