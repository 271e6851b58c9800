"""diffusers' context parallelism (Ulysses) on a swapped model, over two processes.

They talk by gloo, without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flux_kernels as fk
from flux_kernels.models.architectures import ARCHITECTURES

from .conftest import TINY_FLUX
from .models.cases import CASES
from .models.test_architectures import small_file

diffusers = pytest.importorskip("diffusers")

WORLD = 2
# Float32 sums in another order. Where activations are rounded, a value on a tie can fall to the other side: one step of a few
# values, far below the 1 % that int8 costs.
BOUNDS = {"exact": 1e-5, "fused": 1e-5, "fp16_accumulate": 1e-3, "int8": 1e-3}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_give_the_numbers_of_one(tmp_path):
    """FLUX.1 in every mode, and the small model of each architecture whose class says how to split it."""
    for name in CASES:
        small_file(name).write(tmp_path / f"{name}.gguf")
    command = [sys.executable, "-m", "tests.context_parallel_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(tmp_path / "rendezvous"), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        for rank in range(WORLD)
    ]
    try:
        results = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (output, errors) in zip(workers, results, strict=True):
        assert worker.returncode == 0, errors
        measured = json.loads(output.splitlines()[-1])
        assert measured["modes"].keys() == BOUNDS.keys() and measured["others"].keys() == CASES.keys()
        for mode, bound in BOUNDS.items():
            assert measured["modes"][mode]["difference"] <= bound, measured
        split = {name: result for name, result in measured["others"].items() if "refused" not in result}
        assert all(result["difference"] <= BOUNDS["exact"] for result in split.values()), measured
        for whole, part in (result["tokens"] for result in (*measured["modes"].values(), *split.values())):
            assert part * WORLD == whole, "a process worked on all tokens"
        planned = {row.name for row in ARCHITECTURES if getattr(diffusers, row.model_class)._cp_plan is not None}
        assert split.keys() | {"FLUX.1"} == planned
        # diffusers' sentence names what is missing.
        assert all("_cp_plan" in result["refused"] for name, result in measured["others"].items() if name not in planned)


def test_the_notes_name_the_models_without_a_plan():
    notes = (Path(__file__).parents[1] / "docs/decisions/architectures.md").read_text(encoding="utf-8")
    ((version, listed),) = re.findall(r"diffusers ([0-9.]+) has no plan for ([^;.]+);", notes)
    if diffusers.__version__ != version:
        pytest.skip(f"the notes are about diffusers {version}")
    without = [row.name for row in ARCHITECTURES if getattr(diffusers, row.model_class)._cp_plan is None]
    assert sorted(re.split(", | and ", listed)) == sorted(without)


def test_tensor_parallelism_is_refused_by_diffusers_with_a_sentence(swapped_flux):
    config = diffusers.TensorParallelConfig(tp_degree=2)
    with pytest.raises(ValueError, match="quantized"):
        swapped_flux.enable_parallelism(config=config)
    assert swapped_flux._parallel_config is None and isinstance(swapped_flux.transformer_blocks[0].attn.to_q, fk.GGUFLinear)
    assert TINY_FLUX["num_attention_heads"] % config.tp_degree == 0, "the refusal must not be about the heads"
