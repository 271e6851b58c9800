"""`flux-kernels quantize` as a person and a script meet it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

import flux_kernels as fk
from flux_kernels.cli import app
from flux_kernels.generation.embedded import embedded_model_path
from flux_kernels.mixed.plan_file import Plan

SOURCE = embedded_model_path()


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["quantize", *map(str, arguments)])


def test_a_file_is_made_and_said_to_be(tmp_path):
    out = tmp_path / "out.gguf"
    result = invoke(SOURCE, out, "--type", "Q8_0", "--engine", "libggml")
    assert result.exit_code == 0, result.output
    assert f"File: {out.stat().st_size:,} bytes" in result.output and "8.50 inside the blocks" in result.output
    assert f"Wrote {out}" in " ".join(result.output.split())
    assert fk.load_flux(out).x_embedder is not None


def test_a_dry_run_prints_what_writing_would_give(tmp_path):
    dry = invoke(SOURCE, "--type", "Q4_K_M", "--dry-run", "--json")
    assert dry.exit_code == 0, dry.output
    out = tmp_path / "out.gguf"
    wet = invoke(SOURCE, out, "--type", "Q4_K_M", "--json", "--engine", "libggml")
    planned, written = json.loads(dry.stdout), json.loads(wet.stdout)
    assert planned["output"] is None and written["output"] == str(out) and written["seconds"] > 0
    for key in ("bare_bytes", "types", "bits_per_weight", "block_bits_per_weight", "shares"):
        assert planned[key] == written[key], key
    assert written["bytes"] == out.stat().st_size
    assert written["metadata"] == fk.read_gguf(out).metadata


def test_bare_files_have_the_usual_keys_only(tmp_path):
    result = invoke(SOURCE, tmp_path / "out.gguf", "--type", "Q8_0", "--bare", "--engine", "libggml")
    assert result.exit_code == 0, result.output
    keys = ["general.architecture", "general.quantization_version", "general.file_type"]
    assert list(fk.read_gguf(tmp_path / "out.gguf").metadata) == keys


def test_plans_and_patterns_are_taken(tmp_path):
    Plan(types={"single_blocks.0.linear1.weight": "Q6_K"}, bytes=1, cost=0.0).save(tmp_path / "plan.json")
    result = invoke(SOURCE, "--plan", tmp_path / "plan.json", "--tensor-type", "*.linear2.weight=Q5_K", "--dry-run", "--json")
    types = json.loads(result.stdout)["types"]
    assert types["single_blocks.0.linear1.weight"] == "Q6_K" and types["single_blocks.1.linear2.weight"] == "Q5_K"
    assert types["double_blocks.0.img_attn.qkv.weight"] == "F16"
    (note,) = (note for note in json.loads(result.stdout)["notes"] if note.startswith("The plan does not name"))
    assert "double_blocks.0.img_attn.qkv.weight" in note and "linear2" not in note and "they stay in F16" in note


def test_a_type_that_a_whole_plan_leaves_nothing_is_refused(tmp_path):
    """It would be ignored; with a plan of some matrices it is the type of the others."""
    whole = json.loads(invoke(SOURCE, "--type", "Q8_0", "--dry-run", "--json").stdout)["types"]
    names = [name for name, kind in whole.items() if kind == "Q8_0"]
    for planned, refused in ((names, True), (names[1:], False)):
        Plan(dict.fromkeys(planned, "Q8_0"), bytes=1, cost=0.0).save(tmp_path / "plan.json")
        result = invoke(SOURCE, "--plan", tmp_path / "plan.json", "--type", "Q4_0", "--dry-run", "--json")
        assert result.exit_code == int(refused), result.output
        if refused:
            assert "The plan has a type for every matrix of the blocks, so --type Q4_0 has none left" in result.stderr
        else:
            assert json.loads(result.stdout)["types"][names[0]] == "Q4_0"


def test_covariances_without_corrections_are_refused(tmp_path):
    result = invoke(SOURCE, "--type", "Q4_K_S", "--covariance", tmp_path / "c.safetensors", "--dry-run")
    assert result.exit_code == 1 and "serve the low-rank corrections of a plan" in result.output


def test_a_terminated_command_leaves_no_half_file(tmp_path):
    """As systemd, a batch queue or `kill` stop it."""
    command = [sys.executable, "-m", "flux_kernels", "quantize", SOURCE, tmp_path / "out.gguf", "--type", "Q2_K"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert [path.suffix != ".gguf" for path in tmp_path.iterdir()] == [True], process.poll()
    process.terminate()
    _, messages = process.communicate(timeout=60)
    assert (process.returncode, list(tmp_path.iterdir())) == (128 + signal.SIGTERM, []), messages


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([SOURCE, "--type", "Q8_0"], 2, "name the file to write, or give --dry-run"),
        ([SOURCE, "--dry-run"], 1, "Nothing to do: give --type, --plan or --tensor-type."),
        ([SOURCE, "--dry-run", "--tensor-type", "Q6_K"], 2, "'Q6_K' is not PATTERN=TYPE"),
        ([SOURCE, "--dry-run", "--type", "Q5"], 1, "Unknown file type 'Q5'. Known: F32"),
        ([SOURCE, "--dry-run", "--type", "Q8_0", "--imatrix", "none.dat"], 1, "No such file or directory: none.dat"),
        ([SOURCE, "--dry-run", "--type", "Q8_0", "--engine", "fast"], 1, 'engine must be "auto", "torch" or "libggml"'),
        ([SOURCE / "none", "--dry-run", "--type", "Q8_0"], 1, "does not exist. Legal are a .safetensors"),
    ],
)
def test_mistakes_are_one_line(arguments, code, message):
    result = invoke(*arguments)
    assert result.exit_code == code and message in " ".join(result.output.split())


def test_an_existing_file_needs_force(tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    refused = invoke(SOURCE, out, "--type", "Q8_0")
    assert refused.exit_code == 1 and "exists. Give --force" in refused.output and out.read_text() == "mine"
    assert invoke(SOURCE, out, "--type", "Q8_0", "--force", "--engine", "libggml").exit_code == 0
    assert fk.read_gguf(out).tensors


def test_the_help_states_the_memory_and_shows_examples():
    text = " ".join(invoke("--help").output.split())
    assert "memory does not grow with the model" in text and "--type Q4_K_S" in text
