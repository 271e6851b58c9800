"""`measure` of a model that does not fit ends with a sentence, before anything of it is read."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from flux_kernels.cli import app
from flux_kernels.generation import memory_check
from flux_kernels.measure import measured_model
from flux_kernels.measure import run as measure_run
from flux_kernels.measure.measured_model import find_source
from flux_kernels.measure.memory import check_memory, memory_needs
from flux_kernels.measure.states import States

from ..mixed.captured import states
from ..sparse_files import FLUX_DEV, sparse_base, sparse_safetensors

CPU, GPU, GIB = torch.device("cpu"), torch.device("cuda", 0), 2**30
DEV, COMPANIONS = 11_901_408_320, 123_060_480 + 4_762_310_656 + 83_819_683
CONFIG = dict(num_attention_heads=24, attention_head_dim=128, guidance_embeds=True)
SQUARE = [(1024, 1024)] * 64


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """FLUX.1-dev as a file and a folder without data; whatever reads weights fails."""

    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(measured_model, "file_sha256", read)
    monkeypatch.setattr(measure_run, "open_transformer", read)
    file = sparse_safetensors(tmp_path / "flux1-dev.safetensors", FLUX_DEV.bfl_shapes())
    (tmp_path / "prompts.txt").write_text("a lighthouse\n")
    return file, sparse_base(tmp_path / "FLUX.1-dev")


def measure(folder, *arguments) -> str:
    done = CliRunner().invoke(app, ["measure", "--out", str(folder / "costs.csv"), "--device", "cpu", *map(str, arguments)])
    assert done.exit_code == 1, done.output
    return " ".join(done.output.split())


def with_free(monkeypatch, gib: float) -> None:
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: int(gib * GIB))


def test_the_needs_are_those_of_the_drawing_or_of_the_hidden_states(dev):
    file, base = dev
    source = find_source(model=file, base=base)
    needs = memory_needs(source, CONFIG, CPU, torch.float32, SQUARE, capturing=True)
    assert needs["the transformer"] == 4 * DEV and needs["text encoders and VAE"] == 4 * COMPANIONS
    later = memory_needs(source, CONFIG, CPU, torch.float32, SQUARE, capturing=False)
    assert later["hidden states of 64 pictures"] == 3 * 64 * (4096 + 512) * 3072 * 4
    assert later.keys() == {"the transformer", "hidden states of 64 pictures", "activations"}
    gpu = memory_needs(source, CONFIG, GPU, torch.bfloat16, SQUARE, capturing=True)
    assert gpu["the transformer"] == 2 * DEV and gpu["text encoders and VAE"] == 2 * COMPANIONS


def test_too_little_memory_is_said_before_anything_is_read(dev, tmp_path, monkeypatch):
    with_free(monkeypatch, 23)
    said = measure(tmp_path, "--model", dev[0], "--base", dev[1], "--prompts", tmp_path / "prompts.txt")
    assert "Error: Measuring flux1-dev.safetensors in float32 on the CPU needs about 64.0 GiB of memory" in said
    assert "44.3 for the transformer" in said and "18.5 for text encoders and VAE" in said and "and 23.0 GiB are free." in said
    assert "Take --dtype bfloat16 (about " in said and "casting_cost table" in said
    assert {file.name for file in tmp_path.iterdir()} == {"flux1-dev.safetensors", "FLUX.1-dev", "prompts.txt"}


def test_bfloat16_on_the_cpu_needs_little_beside_the_file(dev, monkeypatch, tmp_path):
    source = find_source(model=dev[0], base=dev[1])
    with_free(monkeypatch, 8)
    how = dict(states=tmp_path / "none", capturing=True)
    check_memory(source, CPU, torch.bfloat16, [(1024, 1024)], 64, **how)
    with pytest.raises(measure_run.FormatError, match=r"in bfloat16 on cuda:0 needs about 3\d\.\d GiB of memory on cuda:0"):
        check_memory(source, GPU, torch.bfloat16, [(1024, 1024)], 64, **how)


@pytest.mark.parametrize("lacking", ["base", "prompts"])
def test_what_capturing_lacks_is_said_first(dev, tmp_path, monkeypatch, lacking):
    """The folder that is missing counts before the memory that is not."""
    with_free(monkeypatch, 1)
    arguments = dict(base=tmp_path / "missing" if lacking == "base" else dev[1], prompts=tmp_path / "prompts.txt")
    if lacking == "prompts":
        del arguments["prompts"]
    said = measure(tmp_path, "--model", dev[0], *(word for name, path in arguments.items() for word in (f"--{name}", path)))
    assert {"base": "missing is not a folder", "prompts": "give --prompts FILE"}[lacking] in said


def test_captured_states_say_what_they_take(dev, tmp_path, monkeypatch):
    """Six small ones: the transformer in bfloat16 stays in its file, so 1 GiB is enough."""
    source, path = find_source(model=dev[0]), tmp_path / "costs.states.safetensors"
    States(states(), source.name, "0" * 64).save(path)
    with_free(monkeypatch, 1)
    check_memory(source, CPU, torch.bfloat16, [(1024, 1024)], 64, states=path, capturing=False)
    with pytest.raises(measure_run.FormatError, match="hidden states of 6 pictures"):
        check_memory(source, CPU, torch.float32, [(1024, 1024)], 64, states=path, capturing=False)


def test_the_embedded_model_is_not_asked(monkeypatch, tmp_path):
    with_free(monkeypatch, 0)
    check_memory(find_source(), CPU, torch.float32, [(64, 64)], 64, states=tmp_path / "none", capturing=True)


def test_processes_on_one_computer_are_counted(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert measure_run.World.from_environment().local_size == 4
