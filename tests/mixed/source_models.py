"""Source models: FLUX.1 checkpoints in safetensors, written by the safetensors package alone."""

from __future__ import annotations

import inspect
import json

import torch
from safetensors.torch import save_file

from ..flux_files import WIDTH, Architecture

SMALL = Architecture(1, 1)


def bfl_tensors(architecture=SMALL, dtype=torch.bfloat16, seed=0):
    """Draw the tensors of a checkpoint under BFL's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 10)).to(dtype)
        for name, shape in architecture.bfl_shapes().items()
    }


def narrow_conversion():
    """Return diffusers' own conversion of BFL's names, with its one fixed number, the width, replaced."""
    from diffusers.loaders import single_file_utils

    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    names = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {WIDTH}"), names)  # noqa: S102 - of an installed package
    return names["convert_flux_transformer_checkpoint_to_diffusers"]


def diffusers_tensors(tensors):
    """Split and rename a checkpoint as diffusers does."""
    return {name: tensor.contiguous() for name, tensor in narrow_conversion()(dict(tensors)).items()}


def save_shards(folder, tensors, count, stem="model", index=True):
    """Write shards, and the index beside them, as huggingface_hub lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for shard in range(count):
        file = f"{stem}-{shard + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
