"""Be one of the processes of test_context_parallel.py.

python -m tests.context_parallel_worker RANK WORLD RENDEZVOUS_FILE

It computes a tiny swapped Flux alone and with its tokens split over the processes, in every mode, and prints the relative
differences as JSON.
"""

from __future__ import annotations

import copy
import json
import sys

import diffusers
import torch
from diffusers import ContextParallelConfig
from torch import distributed

import flux_kernels as fk
from flux_kernels.compute import COMPUTE_MODES

from .conftest import TINY_FLUX, flux_inputs

# Half of either is more than WEIGHT_ONLY_M, so that every mode runs as itself
INPUTS = {"tokens": 96, "text": 64}


def variants(packed) -> dict[str, torch.nn.Module]:
    """Return the model in every compute mode, and fused."""
    models = {}
    for compute in COMPUTE_MODES:
        models[compute] = copy.deepcopy(packed)
        fk.swap_linear(models[compute], compute=compute)
    models["fused"] = copy.deepcopy(packed)
    fk.fuse_projections(models["fused"], "linear1")
    return models


@torch.no_grad()
def main(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{rendezvous}")
    torch.accelerator.device_count = lambda: 1  # 0 without a GPU; diffusers takes the rank modulo it
    torch.manual_seed(0)
    packed = diffusers.FluxTransformer2DModel(**{**TINY_FLUX, "num_layers": 1, "num_single_layers": 1}).eval()
    fk.swap_linear(packed, format={"*transformer_blocks*": "Q4_K"})
    differences, tokens = {}, []
    for name, model in variants(packed).items():
        alone = model(**flux_inputs(**INPUTS))[0]
        model.single_transformer_blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: tokens.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
        together = model(**flux_inputs(**INPUTS))[0]
        differences[name] = float((together - alone).norm() / alone.norm())
    print(json.dumps({"differences": differences, "tokens": tokens}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
