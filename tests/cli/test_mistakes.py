"""What the commands say of files that are missing or no text, before they ask for packages."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from flux_kernels.cli import app


def error(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def no_text(tmp_path):
    path = tmp_path / "day.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return path


def test_plan_misses_the_file_before_the_solver(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert error("plan", "nothere.csv", "--bpw", "5") == "Error: No such file or directory: nothere.csv"


def test_plan_takes_no_picture_for_a_cost_table(no_text):
    assert f"{no_text} is not text, so it is no cost table." in error("plan", no_text, "--bpw", "5")


def test_prompts_that_cannot_be_read_are_named_with_their_option(tmp_path, monkeypatch, no_text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    for path, what in (("nothere.txt", "is no file"), (tmp_path, "is no file"), (no_text, "is not text in UTF-8")):
        assert f"--prompts {path} {what}. It is a text file, a prompt a line." in error("measure", "--prompts", path)
    assert "--prompts empty.txt holds no prompts." in error("measure", "--prompts", "empty.txt")


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_of_costs_shows_whole_names(width):
    from rich.console import Console

    from flux_kernels.cli.measure import _cost_table
    from flux_kernels.mixed.cost import CostRow

    class Table:
        def by_tensor(self):
            row = CostRow.__new__(CostRow)
            object.__setattr__(row, "cost", 1.5e-4)
            return {name: dict.fromkeys(TYPES, row) for name in NAMES}

    console = Console(record=True, width=width)
    console.print(_cost_table(Table(), TYPES))
    lines = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in console.export_text().splitlines()]
    columns = ["".join(column) for column in zip(*(cells for cells in lines if cells), strict=True)]
    assert columns[0] == "".join(name.removesuffix(".weight") for name in NAMES)
    assert columns[1:] == ["1.5e-04" * len(NAMES)] * len(TYPES)


TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
NAMES = ("double_blocks.18.txt_attn.qkv.weight", "single_blocks.37.modulation.lin.weight")
