"""diffusers' context parallelism (Ulysses) on a swapped model, over two processes.

They talk by gloo, without a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flux_kernels as fk

from .conftest import TINY_FLUX

diffusers = pytest.importorskip("diffusers")

WORLD = 2
# Float32 sums in another order. Where activations are rounded, a value on a tie can fall to the other side: one step of a few
# values, far below the 1 % that int8 costs.
BOUNDS = {"exact": 1e-5, "fused": 1e-5, "fp16_accumulate": 1e-3, "int8": 1e-3}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_give_the_numbers_of_one_in_every_mode(tmp_path):
    command = [sys.executable, "-m", "tests.context_parallel_worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        for rank in range(WORLD)
    ]
    try:
        results = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (output, errors) in zip(workers, results, strict=True):
        assert worker.returncode == 0, errors
        measured = json.loads(output.splitlines()[-1])
        assert set(measured["tokens"]) == {96 // WORLD}, "a process worked on all tokens"
        assert measured["differences"].keys() == BOUNDS.keys()
        assert all(measured["differences"][name] <= bound for name, bound in BOUNDS.items()), measured


def test_tensor_parallelism_is_refused_by_diffusers_with_a_sentence(swapped_flux):
    config = diffusers.TensorParallelConfig(tp_degree=2)
    with pytest.raises(ValueError, match="quantized"):
        swapped_flux.enable_parallelism(config=config)
    assert swapped_flux._parallel_config is None and isinstance(swapped_flux.transformer_blocks[0].attn.to_q, fk.GGUFLinear)
    assert TINY_FLUX["num_attention_heads"] % config.tp_degree == 0, "the refusal must not be about the heads"
