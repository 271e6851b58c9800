"""Cost tables: what their files promise."""

from __future__ import annotations

import json

import pytest

from flux_kernels.errors import FormatError
from flux_kernels.mixed.cost import COLUMNS, CostRow, CostTable, JointRow, sidecar
from flux_kernels.mixed.option import Option

from .made_costs import made_table


def test_two_processes_may_write_one_table_at_once(tmp_path):
    """In a distributed measurement each process that finds all items done writes the table.

    Here the second does so while the first is writing.
    """
    path, table = tmp_path / "costs.csv", made_table()

    class Interrupted(list):
        def __iter__(self):
            table.save(path)
            return super().__iter__()

    CostTable(Interrupted(table.rows), model="embedded", importance="none").save(path)
    assert CostTable.load(path).rows == table.rows
    assert sorted(tmp_path.iterdir()) == [path, sidecar(path)]


def test_tables_are_given_back(tmp_path):
    rows = [CostRow("a", Option("F16"), 0.0, 0.0, 10, 0.0), CostRow("a", Option("Q4_K", 16), 1e-3, 2.5, 3, 0.1)]
    table = CostTable(
        rows, model="m", states=dict(count=2), joint=[JointRow({"a": Option("Q4_K", 16)}, 1.0, 2.0, 0.5, 1.5, "abc")]
    )
    path = tmp_path / "costs.csv"
    table.save(path)
    assert CostTable.load(path) == table and table.by_tensor()["a"][Option("Q4_K", 16)].bytes == 3
    assert path.read_text().splitlines()[0] == "tensor,type,cost,mfq_cost,bytes,error_weight_rms" == ",".join(COLUMNS)
    assert path.read_text().splitlines()[2] == "a,Q4_K+r16,0.001,2.5,3,0.1"
    about = json.loads(sidecar(path).read_text())
    assert about["schema"] == "flux_kernels.costs/1" and about["joint"][0]["types"] == {"a": "Q4_K+r16"}
    sidecar(path).unlink()
    assert CostTable.load(path).rows == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor,type,cost\n", "lacks the columns mfq_cost, bytes, error_weight_rms"),
        (f"{','.join(COLUMNS)}\na,Q4_K,much,0,1,0\n", "line 2: could not convert"),
        (f"{','.join(COLUMNS)}\na,Q4_K,nan,0,1,0\n", "line 2: costs, bytes and errors are finite"),
        (f"{','.join(COLUMNS)}\na,Q4_K,0,0,-1,0\n", "line 2: costs, bytes and errors are finite"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "costs.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        CostTable.load(path)


def test_a_sidecar_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "costs.csv"
    CostTable([]).save(path)
    sidecar(path).write_text('{"schema": "other"}')
    with pytest.raises(FormatError, match="does not have the schema"):
        CostTable.load(path)
