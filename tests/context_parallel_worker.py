"""Be one of the processes of test_context_parallel.py.

python -m tests.context_parallel_worker RANK WORLD RENDEZVOUS_FILE FOLDER

It computes a tiny swapped Flux, in every mode, and the small files of the other architectures in FOLDER, alone and with their
tokens split over the processes. What came of it is printed as JSON.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import ContextParallelConfig
from torch import distributed

import flux_kernels as fk
from flux_kernels.compute import COMPUTE_MODES

from .conftest import TINY_FLUX, flux_inputs
from .models.cases import CASES

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


def split(model, inputs: dict) -> dict:
    """Return by how much a model's output differs when its tokens are split.

    Beside it, how many tokens the last block saw before and then.
    """
    tokens: list[int] = []
    blocks = [module for module in model.children() if isinstance(module, torch.nn.ModuleList)][-1]
    blocks[-1].register_forward_pre_hook(
        lambda block, args, kwargs: tokens.append((*args, *kwargs.values())[0].shape[1]), with_kwargs=True
    )
    alone = model(**inputs)[0]
    try:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=distributed.get_world_size()))
    except ValueError as error:
        return {"refused": str(error)}
    together = model(**inputs)[0]
    return {"difference": float((together - alone).norm() / alone.norm()), "tokens": tokens}


def others(folder: Path) -> dict[str, dict]:
    """Return what came of the small file of each architecture."""
    results = {}
    for case in CASES.values():
        model = fk.load_transformer(folder / f"{case.name}.gguf", dtype=torch.float32, backend="torch")
        results[case.name] = split(model, {**case.inputs(torch.Generator().manual_seed(1)), "return_dict": False})
    return results


@torch.no_grad()
def main(rank: int, world: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{rendezvous}")
    torch.accelerator.device_count = lambda: 1  # 0 without a GPU; diffusers takes the rank modulo it
    torch.manual_seed(0)
    packed = diffusers.FluxTransformer2DModel(**{**TINY_FLUX, "num_layers": 1, "num_single_layers": 1}).eval()
    fk.swap_linear(packed, format={"*transformer_blocks*": "Q4_K"})
    modes = {name: split(model, flux_inputs(**INPUTS)) for name, model in variants(packed).items()}
    print(json.dumps({"modes": modes, "others": others(Path(folder))}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
