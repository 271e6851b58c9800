"""What `bench` says where a package is missing: which one, and the command that gets it."""

from __future__ import annotations

import sys
import tomllib

import pytest
import torch
from typer.testing import CliRunner

from flux_kernels.benchmark.linears import measure
from flux_kernels.benchmark.providers import PROVIDERS
from flux_kernels.benchmark.record import CHECKOUT
from flux_kernels.benchmark.step.jobs import denoising_job
from flux_kernels.cli import app
from flux_kernels.install_hints import install_command
from flux_kernels.models.calls import Call

CPU = torch.device("cpu")
COMMAND = install_command("bench")


def note(provider: str) -> str:
    (row,) = measure("Q8_0", Call(1, 64, 256, 1, "a test"), [provider], CPU, torch.float32, repeats=1)
    assert row["p50_ms"] == ""
    return row["note"]


def test_the_main_comparison_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert note("diffusers") == f"not installed: gguf. Run: {COMMAND}"
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (row,) = denoising_job(CPU, 1).measure("Q8_0", lambda _: None)
    assert row["note"] == f"not installed: diffusers, gguf. Run: {COMMAND}"


@pytest.mark.parametrize("peer", ["bitsandbytes nf4", "torchao int8 dynamic", "sdnq int8", "quanto int8"])
def test_other_libraries_are_named_as_they_are_installed(monkeypatch, peer):
    package = PROVIDERS[peer].package
    monkeypatch.setitem(sys.modules, package.removesuffix("-quanto"), None)
    assert note(peer).endswith(f"Run: pip install '{package}'")


def test_the_extra_has_what_the_default_comparison_needs():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["bench"]]
    assert {"diffusers", "transformers", "gguf", "matplotlib"} <= {text.partition(">")[0] for text in named}


def test_a_report_without_matplotlib_names_the_extra_of_bench(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", "--report", str(tmp_path / "a.html")])
    assert done.exit_code == 1 and COMMAND in done.stderr and not list(tmp_path.iterdir())
