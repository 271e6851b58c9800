"""MixedQuantFlux's tables in and out."""

from __future__ import annotations

import csv

import pytest

from flux_kernels import FormatError
from flux_kernels.mixed.casting_cost import is_casting_cost, read_casting_cost, write_casting_cost
from flux_kernels.mixed.file_layout import embedded_shapes, layout_of_shapes, shapes_of_variant
from flux_kernels.mixed.option import Option

from .made_costs import PUBLISHED, made_table


@pytest.fixture(scope="module")
def dev():
    return layout_of_shapes(shapes_of_variant("flux1-dev"), "flux1-dev")


def block_costs(table, prefix: str, kind: str) -> float:
    return sum(row.cost for row in table.rows if row.tensor.startswith(prefix) and str(row.option) == kind)


def test_blocks_keep_their_published_costs(dev):
    table = read_casting_cost(PUBLISHED, dev)
    assert len(table.by_tensor()) == 304
    assert set(map(str, next(iter(table.by_tensor().values())))) == {
        "BF16",
        "Q2_K",
        "Q3_K",
        "Q4_0",
        "Q4_1",
        "Q4_K",
        "Q5_1",
        "Q5_K",
        "Q6_K",
        "Q8_0",
    }
    assert block_costs(table, "double_blocks.0.", "Q2_K") == pytest.approx(652.65)
    # Layer 19, and 56, the last.
    assert block_costs(table, "single_blocks.0.", "Q8_0") == pytest.approx(8.9919)
    assert block_costs(table, "single_blocks.37.", "Q8_0") == pytest.approx(0.13739)
    assert block_costs(table, "single_blocks.37.", "BF16") == 0


def test_of_two_measurements_the_first_counts(dev, tmp_path):
    assert block_costs(read_casting_cost(PUBLISHED, dev), "double_blocks.1.", "Q4_1") == pytest.approx(97.95)
    lines = PUBLISHED.read_text().splitlines()
    again = {tuple(line.split(",")[:2]) for line in lines if line.endswith(",patched")}
    kept = [line for line in lines if line.endswith(",patched") or tuple(line.split(",")[:2]) not in again]
    (tmp_path / "patched.csv").write_text("\n".join(kept) + "\n")
    patched = read_casting_cost(tmp_path / "patched.csv", dev)
    assert block_costs(patched, "double_blocks.1.", "Q4_1") == pytest.approx(95.388)
    # Measured once.
    assert block_costs(patched, "double_blocks.1.", "Q4_0") == pytest.approx(120.78)


def test_costs_are_spread_by_weights(dev):
    rows = {row.tensor: row.cost for row in read_casting_cost(PUBLISHED, dev).rows if row.option == Option("Q4_K")}
    assert rows["single_blocks.3.linear1.weight"] / rows["single_blocks.3.linear2.weight"] == pytest.approx(21504 / 15360)


def test_what_was_read_is_written_again(dev, tmp_path):
    out = tmp_path / "costs.csv"
    write_casting_cost(read_casting_cost(PUBLISHED, dev), dev, out)
    assert is_casting_cost(out)
    again = {(line["layer"], line["quant"]): float(line["cost_mse"]) for line in csv.DictReader(out.open())}
    lines = [line for line in csv.DictReader(PUBLISHED.open()) if not line["note"] and not line["quant"].startswith("bnb")]
    assert again == {(line["layer"], line["quant"]): pytest.approx(float(line["cost_mse"])) for line in lines}


def test_a_measured_table_is_exported_with_the_earlier_metric(tmp_path):
    layout, table, out = layout_of_shapes(embedded_shapes(), "embedded"), made_table(), tmp_path / "costs.csv"
    write_casting_cost(table, layout, out)
    lines = list(csv.DictReader(out.open()))
    assert {line["layer"] for line in lines} == {"0", "1", "2"}
    first = next(float(line["cost_mse"]) for line in lines if (line["layer"], line["quant"]) == ("0", "Q4_K_S"))
    wanted = sum(
        row.mfq_cost for row in table.rows if row.tensor.startswith("double_blocks.0.") and row.option == Option("Q4_K")
    )
    # Six digits are written.
    assert first == pytest.approx(wanted, rel=1e-5)
    table.rows = [row for row in table.rows if "txt_mlp.2" not in row.tensor]
    with pytest.raises(FormatError, match="lacks double_blocks.0.txt_mlp.2.weight"):
        write_casting_cost(table, layout, out)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a,b\n", "no casting_cost table: its columns are"),
        ("layer,quant,cost_mse\n0,Q4_K_S,cheap\n", "line 2: .*cost_mse a number"),
        ("layer,quant,cost_mse\n0,Q4_K_S,-1\n", "finite and not negative"),
        ("layer,quant,cost_mse\n0,Q4_K_S,1\n", "has costs of 1 layers, embedded has 3 blocks; missing: \\[1, 2\\]"),
        ("layer,quant,cost_mse\n" + "".join(f"{i},Q4_K_S,1\n" for i in (0, 1, 2, 7)), "unknown: \\[7\\]"),
    ],
)
def test_a_damaged_table_is_refused(text, error, tmp_path):
    path = tmp_path / "costs.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=error):
        read_casting_cost(path, layout_of_shapes(embedded_shapes(), "embedded"))
