"""`flux-kernels formats`: all types, one type, JSON."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
from typer.testing import CliRunner

from flux_kernels.cli import app
from flux_kernels.formats import FORMATS, draw_layout
from flux_kernels.torch_backend import libggml


def output_of(*arguments: str, width: int = 80, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": str(width)}).invoke(app, ["formats", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_table_has_every_type_whole_in_80_columns():
    text = output_of()
    rows = {line.split()[0]: line for line in text.splitlines() if line.split() and line.split()[0] in FORMATS}
    assert list(rows) == sorted(FORMATS, key=lambda name: -FORMATS[name].bits_per_weight)
    assert "…" not in text
    assert rows["Q3_K"].split() == ["Q3_K", "11", "3.4375", "256", "110", "16%", "own", "yes", "2", "odd"]
    assert rows["NVFP4"].split()[-3:] == ["own", "values", "default"] and "grid" in rows["IQ1_M"]


def test_json_has_what_the_rows_have():
    facts = {row["name"]: row for row in json.loads(output_of("--json"))}
    assert facts.keys() == FORMATS.keys()
    for name, fmt in FORMATS.items():
        row = facts[name]
        assert (row["ggml_type"], row["block_size"], row["type_size"]) == (fmt.ggml_type, fmt.block_size, fmt.type_size)
        assert row["own_quantizer"] == (fmt.quantize is not None) and row["formula"].startswith("x = ") and row["codes"]
        assert {field["name"]: field["offset"] for field in row["fields"]} == fmt.layout.offsets


def test_one_type_by_any_case_shows_formula_drawing_and_odd_tiles():
    text = output_of("mxfp4", width=300)
    assert "x = 2^(e-128) * values[q]" in text and draw_layout(FORMATS["MXFP4"].layout) in text
    assert "fp16 with a branch on sm_120: block_m=64, num_warps=4" in text
    (odd,) = [row for row in json.loads(output_of("MXFP4", "--json"))["odd_tiles"] if row["cards"] == [[12, 0]]]
    assert odd["branch"] and odd["changes"] == {"block_m": 64, "num_warps": 4} and odd["why"]


def test_an_unknown_type_is_one_line_with_the_known_ones():
    text = output_of("Q4_K_M", width=400, code=1)
    assert (
        "Unknown block format 'Q4_K_M'. Known: Q4_0" in text
        and "its block format is Q4_K" in text
        and len(text.splitlines()) == 1
    )


@pytest.mark.parametrize(
    ("answer", "word"), [(None, "missing"), ("yes", "libggml"), ("with an importance matrix", "imatrix"), ("no", "none")]
)
def test_the_quantizer_of_types_without_their_own_is_what_libggml_says(answer, word, monkeypatch):
    monkeypatch.setattr(import_module("flux_kernels.cli.formats"), "_libggml", lambda fmt: answer)
    lines = output_of().splitlines()
    assert all(word in line for line in lines if line.split()[:1] == ["IQ2_XS"])


def test_libggml_is_asked_for_its_importance(monkeypatch):
    pytest.importorskip("libggml", reason="libggml-python has no wheel for this machine")
    answers = {name: json.loads(output_of(name, "--json"))["libggml"] for name in ("IQ2_XS", "IQ3_S", "Q4_K")}
    assert answers == {"IQ2_XS": "with an importance matrix", "IQ3_S": "yes", "Q4_K": "yes"}
    monkeypatch.setattr(libggml, "available", lambda: False)
    assert json.loads(output_of("IQ3_S", "--json"))["libggml"] is None


def test_help_teaches():
    text = output_of("--help")
    assert "Examples" in text and "flux-kernels formats Q4_K" in text and "gaussian weights" in text
