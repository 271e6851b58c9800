"""What the commands share: options with a choice, lists of names, silence of the libraries, progress."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console
from rich.progress import MofNCompleteColumn
from typer.testing import CliRunner

from flux_kernels.cli import app
from flux_kernels.cli._options import comma_separated
from flux_kernels.cli._progress import progress
from flux_kernels.generation.memory_plan import OFFLOADS


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("generate", ("--gguf", "x", "-p", "y")), ("warmup", ("--gguf", "x")), ("tune", ()), ("measure", ())],
)
def test_a_dtype_that_is_unknown_is_refused_in_one_way(command, arguments):
    result = invoke(command, *arguments, "--dtype", "fp16")
    sentence = "Invalid value for '--dtype': 'fp16' is not one of float16, bfloat16, float32."
    assert result.exit_code == 2 and sentence in result.stderr
    assert "float16, bfloat16 or float32" in " ".join(invoke(command, "--help").stdout.split())


def test_offloads_are_those_of_the_arithmetic():
    result = invoke("generate", "--gguf", "x", "-p", "y", "--offload", "disk")
    assert f"'disk' is not one of {', '.join(OFFLOADS)}." in result.stderr


def test_lists_of_names_forgive_spaces_and_repeats():
    assert comma_separated(" Q4_K, Q8_0,Q4_K ") == ["Q4_K", "Q8_0"]


SILENT = """
import os, sys
from typer.testing import CliRunner
from flux_kernels.cli import app
CliRunner().invoke(app, ["inspect", "nowhere.gguf"])
assert not {"diffusers", "transformers", "huggingface_hub"} & set(sys.modules)
import diffusers.utils.logging as diffusers, transformers.utils.logging as transformers
import huggingface_hub.constants
assert diffusers.get_verbosity() == transformers.get_verbosity() == 40 and huggingface_hub.constants.HF_HUB_OFFLINE
assert not diffusers.is_progress_bar_enabled() and not transformers.is_progress_bar_enabled()
"""


def test_libraries_are_silent_and_offline_without_being_imported():
    subprocess.run([sys.executable, "-c", SILENT], check=True)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_for_terminals_and_vanishes(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with progress(console, MofNCompleteColumn()) as bar:
        task = bar.add_task("drawing [1]", total=3)
        bar.update(task, completed=2)
        bar.refresh()
        shown = console.file.getvalue()
    assert ("drawing [1]" in shown and "2/3" in shown and "left" in shown) == terminal
    assert terminal or not console.file.getvalue()
    assert not terminal or console.file.getvalue().endswith("\x1b[1A\x1b[2K")
