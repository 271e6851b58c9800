"""`flux-kernels plan` from a cost table to the types of a file, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image
from typer.testing import CliRunner

from flux_kernels.cli import app
from flux_kernels.generation.embedded import embedded_model_path
from flux_kernels.gguf.file import read_gguf
from flux_kernels.install_hints import install_command
from flux_kernels.measure.measured_model import find_source
from flux_kernels.mixed.casting_cost import is_casting_cost
from flux_kernels.mixed.plan_file import Plan

from ..mixed.made_costs import PUBLISHED, made_table


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    path = tmp_path_factory.mktemp("costs") / "costs.csv"
    made_table().save(path)
    return path


def test_from_costs_to_a_file_with_the_planned_types(costs, tmp_path):
    out, report, file = tmp_path / "plan.json", tmp_path / "plan.html", tmp_path / "model.gguf"
    planned = invoke("plan", costs, "--size", "Q4_K", "-o", out, "--report", report, "--keep", "*.img_mod.*=Q8_0")
    assert planned.exit_code == 0, planned.output
    assert "the least there is" in planned.output and "Q5_K" in planned.output and "plan-curve.png" in planned.output
    plan = Plan.load(out)
    assert report.exists() and plan.types["double_blocks.0.img_mod.lin.weight"] == "Q8_0"
    done = invoke("quantize", embedded_model_path() / "transformer", file, "--plan", out, "--bare")
    assert done.exit_code == 0, done.output
    assert {name: tensor.format for name, tensor in read_gguf(file).tensors.items()} == plan.types
    assert file.stat().st_size == plan.bytes
    dry = invoke("quantize", embedded_model_path() / "transformer", "--plan", out, "--dry-run", "--json")
    # With what it says about its origin.
    assert json.loads(dry.stdout)["bytes"] <= plan.options["budget"]


def test_the_next_command_names_the_source_where_it_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = made_table()
    cases = [("", "", None), ("", find_source().sha256(), embedded_model_path()), ("flux 16.gguf", "", "'flux 16.gguf'")]
    for source, sha256, named in (*cases, ("gone.gguf", "", None)):
        replace(table, source=source, source_sha256=sha256).save(tmp_path / "costs.csv")
        (tmp_path / "flux 16.gguf").touch()
        done = invoke("plan", "costs.csv", "--bpw", 6)
        assert done.exit_code == 0, done.output
        assert f"quantize {named or 'SOURCE'} embedded_mx" in done.output
        assert ("SOURCE is the 16-bit file or folder that was measured (embedded)" in done.output) is (named is None)


def test_pictures_go_into_the_report(costs, tmp_path):
    Image.new("RGB", (64, 48), "blue").save(tmp_path / "sheet.png")
    arguments = ("--report", tmp_path / "plan.html", "--pictures", tmp_path / "sheet.png")
    done = invoke("plan", costs, "--bpw", 6, "-o", tmp_path / "plan.json", *arguments)
    assert done.exit_code == 0, done.output
    assert "Pictures side by side" in (tmp_path / "plan.html").read_text()


def test_json_is_the_plan(costs, tmp_path):
    done = invoke("plan", costs, "--bpw", 5, "-o", tmp_path / "plan.json", "--json")
    assert done.exit_code == 0, done.output
    assert Plan.from_json(done.stdout) == Plan.load(tmp_path / "plan.json")
    assert json.loads(done.stdout)["options"]["bits_per_weight"] <= 5


def test_a_published_table_for_a_card_and_back_out(tmp_path):
    arguments = ("plan", PUBLISHED, "--per-block", "--fits", "12GB", "-o", tmp_path / "plan.json")
    done = invoke(*arguments, "--export-casting-cost", tmp_path / "again.csv")
    assert done.exit_code == 0, done.output
    assert "1024 x 1024" in done.output and is_casting_cost(tmp_path / "again.csv")
    assert Plan.load(tmp_path / "plan.json").options["fits"] == "12GB"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "exactly one of --size 8GB, --bpw 5.1 and --fits 12GB"),
        (("--size", "8GB", "--bpw", "5"), "exactly one of"),
        (("--size", "lots"), "'lots' is no size"),
        (("--size", "1MB"), "No plan fits 1,000,000 bytes"),
        (("--size", "4MB", "--keep", "*.x=Q8_0"), "No tensor matches '*.x'"),
        (("--size", "4MB", "--model", "flux1-dev"), "Name the model that was measured with --model"),
        (("--size", "4MB", "--rule", "newest"), "Unknown rule 'newest'"),
        (("--size", "4MB", "-o", "none/p.json"), "--out none/p.json: there is no folder none. Make it"),
        (("--size", "4MB", "--report", "none/p.html"), "--report none/p.html: there is no folder none. Make it"),
        (("--size", "4MB", "--export-casting-cost", "none/c.csv"), "--export-casting-cost none/c.csv: there is no folder none"),
        (("--fits", "0.5GB"), "no room for the transformer"),
        (("--size", "4MB", "--refine", "1"), "--refine needs the captured states"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(costs, tmp_path, arguments, error):
    done = invoke("plan", costs, "-o", tmp_path / "plan.json", *arguments)
    assert done.exit_code == 1
    assert error in " ".join(done.output.split()) and "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["scipy", "matplotlib"])
def test_a_missing_package_is_named_with_what_installs_it(costs, tmp_path, missing):
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from flux_kernels.cli import app
from flux_kernels.generation.embedded import embedded_model_path
app(["plan", {str(costs)!r}, "--size", "4MB", "-o", {str(tmp_path / "plan.json")!r}, "--report", {str(tmp_path / "r.html")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert not list(tmp_path.iterdir())
    assert done.stderr.strip().endswith(f"Error: {missing} is not installed. Run: {install_command('plan')}")


def test_help_teaches_with_examples():
    text = invoke("plan", "--help").output
    assert "Examples" in text and "--fits" in text and "plan costs.csv --size 8GB" in text
