"""Test the origins of rows: they say what a CPU's numbers depend on, and older rows are read."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from flux_kernels.benchmark import record
from flux_kernels.benchmark.record import CHECKOUT, origin, origin_text, read_csv
from flux_kernels.torch_backend import libggml

CPU = torch.device("cpu")


@pytest.mark.parametrize("there", [True, False])
def test_rows_of_a_cpu_say_whether_libggml_decodes(monkeypatch, there):
    monkeypatch.setattr(libggml, "available", lambda: there)
    monkeypatch.setattr(record, "installed_version", lambda name: f"1.2 of {name}")
    columns = origin(CPU)
    assert columns["libggml"] == ("1.2 of libggml-python" if there else "none")
    assert (", libggml 1.2 of" in origin_text(columns)) == there and (", no libggml, commit" in origin_text(columns)) != there


def test_the_version_is_that_of_the_package():
    pytest.importorskip("libggml")
    assert origin(CPU)["libggml"] == version("libggml-python")


def test_one_thread_is_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert origin(CPU)["device"].endswith(", 1 thread")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert origin(CPU)["device"].endswith(", 2 threads")


def test_recorded_rows_are_read_with_or_without_the_newer_columns():
    rows = read_csv(CHECKOUT / "bench" / "results" / "linear_cpu.csv")
    for row in (rows[0], {name: text for name, text in rows[0].items() if name not in ("libggml", "repeats")}):
        assert row["device"] in origin_text(row) and row["commit"] in origin_text(row)


def test_the_commit_can_be_told_where_git_is_missing(monkeypatch):
    monkeypatch.setattr(record.shutil, "which", lambda name: None)
    assert record.commit().startswith("version ")
    monkeypatch.setenv("FLUX_KERNELS_COMMIT", "abc1234")
    assert record.commit() == "abc1234"
