"""Cost tables: what their files promise."""

from __future__ import annotations

from flux_kernels.mixed.cost import CostTable, sidecar

from .made_costs import made_table


def test_two_processes_may_write_one_table_at_once(tmp_path):
    """In a distributed measurement each process that finds all done writes the table: here the second does so in the first's midst."""
    path, table = tmp_path / "costs.csv", made_table()

    class Interrupted(list):
        def __iter__(self):
            table.save(path)
            return super().__iter__()

    CostTable(Interrupted(table.rows), model="embedded", importance="none").save(path)
    assert CostTable.load(path).rows == table.rows
    assert sorted(tmp_path.iterdir()) == [path, sidecar(path)]
