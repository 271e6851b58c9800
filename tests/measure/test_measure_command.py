"""`flux-kernels measure`: tables, plans, what a written file costs, and its errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import flux_kernels as fk
from flux_kernels.cli import app
from flux_kernels.cli.measure import _report_table
from flux_kernels.measure.measurer import Measurer
from flux_kernels.mixed.cost import CostTable
from flux_kernels.mixed.option import Option
from flux_kernels.mixed.plan_file import Plan

from ..mixed.captured import embedded_pipeline, states
from .measured import CLOSE, QKV, measurer, request_in


def test_the_command_measures_and_evaluates_plans(whole, tmp_path):
    request = request_in(tmp_path / "command", types=(Option("Q8_0"),))
    arguments = ["measure", "--out", str(request.out), "--types", "Q8_0", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["complete"] and facts["rows"] == 32
    Plan({QKV: "Q4_K", "double_blocks.0.img_mod.lin.weight": "F16"}, bytes=1, cost=0.0).save(tmp_path / "plan.json")
    done = CliRunner().invoke(app, [*arguments, "--plan", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    expected = whole.table.by_tensor()[QKV][Option("Q4_K")].cost
    assert json.loads(done.stdout)["cost"] == pytest.approx(expected, rel=CLOSE)
    (kept,) = CostTable.load(request.out).joint
    assert kept.types == {QKV: Option("Q4_K")} and kept.cost == pytest.approx(expected, rel=CLOSE)
    # The importance is read back from its file here: sums and counts in float32, so a weight on an edge may fall otherwise


def test_a_written_file_costs_what_was_measured(whole, tmp_path):
    """The velocities of the written file's packed layers have the error that the plan was measured with."""
    request = whole.request
    types = {name: ("Q8_0", "Q4_K")[index % 2] for index, name in enumerate(measurer().tensors)}
    plan = Plan(types, bytes=1, cost=0.0)
    plan.save(tmp_path / "plan.json")
    done = CliRunner().invoke(
        app,
        ["quantize", str(request.source.files[0].parent), str(tmp_path / "mixed.gguf"), "--plan", str(tmp_path / "plan.json")]
        + ["--imatrix", str(request.imatrix_path), "--json"],
    )
    assert done.exit_code == 0, done.output
    model = fk.load_flux(tmp_path / "mixed.gguf", dtype=torch.float32, backend="torch")
    error = magnitude = 0.0
    with torch.no_grad():
        for state in states():
            difference = (model(**state.inputs).sample - state.velocity).double()
            error += state.dsigma**2 * difference.square().mean().item()
            magnitude += state.dsigma**2 * state.velocity.double().square().mean().item()
    assert error / magnitude == pytest.approx(measurer().measure_joint(plan.by_tensor()).cost, rel=CLOSE)


def test_a_plan_with_corrections_is_measured_as_its_file_is_made(whole, tmp_path):
    """Corrections are fitted to the inputs' covariance, also where no table has such options."""
    Plan({QKV: "Q2_K"}, bytes=1, cost=0.0, low_rank={QKV: 8}).save(tmp_path / "plan.json")
    arguments = ["measure", "--out", str(tmp_path / "joint.csv"), "--states-file", str(whole.request.states_path)]
    done = CliRunner().invoke(app, [*arguments, "--plan", str(tmp_path / "plan.json"), "--json"])
    assert done.exit_code == 0, done.output
    fitted = Measurer(embedded_pipeline().transformer, states(), covariance=True).measure_joint({QKV: Option("Q2_K", 8)})
    assert json.loads(done.stdout)["cost"] == pytest.approx(fitted.cost, rel=CLOSE)


@pytest.mark.parametrize(("count", "noted"), [(31, True), (32, False)])
def test_few_states_for_a_rank_are_noted(whole, tmp_path, count, noted):
    table = replace(whole.table, states={**whole.table.states, "count": count})
    console = Console(record=True, width=200)
    _report_table(console, table, replace(whole.request, types=(Option("Q8_0"), Option("Q4_K", 8))), False)
    assert ("Take --states 32 or more" in console.export_text()) == noted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--types", "Q9"], "Unknown type 'Q9'"),
        (["--sizes", "1000x1000"], "multiples of 16"),
        (["--device", "warp"], "'warp' cannot be used here"),
        (["--gguf", "no.gguf"], "no.gguf does not exist"),
        (["--out", "none/costs.csv"], "--out none/costs.csv: there is no folder none. Make it"),
        (["--states-file", "none/states"], "--states-file none/states: there is no folder none. Make it"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, arguments, message):
    done = CliRunner().invoke(app, ["measure", "--out", str(tmp_path / "costs.csv"), *arguments])
    assert done.exit_code == 1 and message in " ".join(done.output.split())
