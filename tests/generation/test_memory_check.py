"""What weights take once loaded, counted from headers, and the sentence where that does not fit."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from flux_kernels.errors import FormatError
from flux_kernels.generation import memory_check
from flux_kernels.generation.inspect_file import FileFacts
from flux_kernels.generation.memory_check import Weights, check_pipeline_memory, companion_files, loaded_weights, require_memory

from ..sparse_files import FLUX_DEV, sparse_base, sparse_safetensors

CPU, GPU, GIB = torch.device("cpu"), torch.device("cuda", 0), 2**30
# Parameters, as published.
DEV, COMPANIONS = 11_901_408_320, 123_060_480 + 4_762_310_656 + 83_819_683


def test_weights_of_another_dtype_are_held_and_those_of_the_same_stay_mapped(tmp_path):
    file = sparse_safetensors(tmp_path / "flux1-dev.safetensors", FLUX_DEV.bfl_shapes())
    assert loaded_weights([file], torch.float32, CPU) == Weights(held=4 * DEV)
    assert loaded_weights([file], torch.bfloat16, CPU) == Weights(mapped=2 * DEV)
    assert loaded_weights([file], torch.float16, CPU) == Weights(held=2 * DEV)
    assert loaded_weights([file], torch.bfloat16, GPU) == Weights(held=2 * DEV)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status tells anonymous and mapped memory apart")
@pytest.mark.parametrize(("dtype", "held"), [("bfloat16", 0), ("float32", 4 * 2**26)])
def test_what_is_counted_is_what_the_process_takes(tmp_path, dtype, held):
    """128 MiB of bfloat16 weights, read as `measure` does in a process of its own."""
    file = sparse_safetensors(tmp_path / "w.safetensors", {"w": (2**13, 2**13)})
    code = f"""
import re, torch
from safetensors import safe_open
def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
with safe_open({str(file)!r}, framework="pt") as opened:
    stored = opened.get_slice("w")
    stored[0:1].to("cpu", torch.{dtype}).sum()
    before = anonymous()
    weight = stored[0 : 2**13].to("cpu", torch.{dtype})
    assert weight[:, ::64].sum() == 0  # a page at least of every row
    print(anonymous() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded_weights([file], getattr(torch, dtype), CPU).held == held
    # Allocator and interpreter; 6 % of the larger number.
    assert int(done.stdout) == pytest.approx(held, abs=2**24)


def test_companions_are_the_text_encoders_and_the_vae(tmp_path):
    base = sparse_base(tmp_path / "FLUX.1-dev")
    sparse_safetensors(base / "transformer" / "model.safetensors", {"w": (5,)})
    sparse_safetensors(base / "vae" / "diffusion_pytorch_model.fp16.safetensors", {"w": (83_819_683,)}, "F16")
    assert loaded_weights(companion_files(base), torch.float32, CPU).held == 4 * COMPANIONS
    small = loaded_weights(companion_files(base, left_out=("text_encoder_2",)), torch.float32, CPU)
    assert small.held == 4 * (COMPANIONS - 4_762_310_656)


def test_the_refusal_has_the_numbers_and_the_ways_out(monkeypatch):
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 3 * GIB)
    needs = {"the transformer": 2 * GIB, "nothing": 0, "activations": GIB}
    require_memory("Work", needs, CPU, "")
    with pytest.raises(FormatError) as error:
        require_memory("Work", {**needs, "activations": GIB + 2**27}, CPU, "Take less.")
    expected = (
        "Work needs about 3.1 GiB of memory (2.0 for the transformer, 1.1 for activations), and 3.0 GiB are free. Take less."
    )
    assert str(error.value) == expected
    with pytest.raises(FormatError, match=re.escape("4.0 GiB of memory on cuda:0 (4.0 for it)")):
        require_memory("Work", {"it": 4 * GIB}, GPU, "")


def test_several_processes_share_what_the_computer_has(monkeypatch):
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 3 * GIB)
    monkeypatch.setattr(memory_check, "total_bytes", lambda: 4 * GIB)
    require_memory("Work", {"it": 2 * GIB}, CPU, "", processes=2)
    with pytest.raises(FormatError, match=re.escape("and 3 processes on this computer need 6.0 GiB of its 4.0")):
        require_memory("Work", {"it": 2 * GIB}, CPU, "", processes=3)
    # Each on a GPU of its own.
    require_memory("Work", {"it": 2 * GIB}, GPU, "", processes=3)


def test_a_system_that_tells_nothing_is_not_asked_further(monkeypatch):
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: None)
    monkeypatch.setattr(memory_check, "total_bytes", lambda: None)
    require_memory("Work", {"it": 2**60}, CPU, "", processes=3)


def check_drawing(tmp_path, dtype=torch.bfloat16, pin=False, t5=None) -> None:
    gguf, base = tmp_path / "flux1-dev-Q4_K_S.gguf", tmp_path / "FLUX.1-dev"
    with gguf.open("wb") as file:
        file.truncate(6 * GIB)
    check_pipeline_memory(gguf, base if base.exists() else sparse_base(base), t5, dtype, pin, t5_part="text_encoder_2")


def test_drawing_holds_what_is_not_in_the_dtype_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 12 * GIB)
    check_drawing(tmp_path)
    with pytest.raises(
        FormatError, match=r"Q4_K_S.gguf needs about 18\.5 GiB of memory \(18\.5 for text encoders and VAE in float32\)"
    ):
        check_drawing(tmp_path, torch.float32)
    check_drawing(tmp_path, torch.float32, t5=tmp_path / "t5.gguf")


def test_pinning_copies_what_is_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 12 * GIB)
    with pytest.raises(FormatError, match=r"15\.3 for what is pinned\), and 12\.0 GiB are free\. Take no --pin, or --t5"):
        check_drawing(tmp_path, pin=True)


def test_generate_checks_before_it_loads(tmp_path, monkeypatch):
    """In float32 the embedded pipeline's files, which are 16 bit, would be copied to memory."""
    from flux_kernels.generation import generate as module
    from flux_kernels.generation.embedded import embedded_model_path

    class Loaded(Exception):
        pass

    def load(*_):
        raise Loaded

    request = module.Request(tmp_path / "demo.gguf", embedded_model_path(), "a red seven", dtype=torch.float32)
    facts = FileFacts("demo.gguf", 0, architecture="FLUX.1", config={})
    monkeypatch.setattr(module, "check_request", lambda request: module.Job(facts))
    monkeypatch.setattr(module, "_load", load)
    with pytest.raises(Loaded):
        module.generate(request)
    monkeypatch.setattr(memory_check, "free_bytes", lambda device: 0)
    with pytest.raises(FormatError, match=r"Drawing with demo\.gguf needs about .* for text encoders and VAE in float32"):
        module.generate(request)
