"""Files of published sizes that take no room: true headers, and data that is a hole in the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path

from flux_kernels.generation.embedded import embedded_model_path

from .flux_files import Architecture

FLUX_DEV = Architecture(19, 38, width=3072, head=128, text=4096, pooled=768)
ITEMSIZES = {"F32": 4, "BF16": 2, "F16": 2}


def sparse_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """Write a safetensors file by hand: 8 bytes of length, the header as JSON, and a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * ITEMSIZES[dtype]
        header[name] = dict(dtype=dtype, shape=list(shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def sparse_base(folder: Path, dtype: str = "BF16") -> Path:
    """Lay out a FLUX.1-dev pipeline folder.

    Its text encoders and VAE have the published numbers of parameters.
    """
    (folder / "model_index.json").parent.mkdir(parents=True)
    plain, models = ("scheduler", "tokenizer", "tokenizer_2"), ("text_encoder", "text_encoder_2", "transformer", "vae")
    index = json.loads((embedded_model_path() / "model_index.json").read_text())
    parts = {part: index[part] for part in (*plain, *models)}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    for part in plain:
        shutil.copytree(embedded_model_path() / part, folder / part)
    for part, sizes in {
        "text_encoder": {"hidden_size": 768},
        "text_encoder_2": {"d_model": 4096},
        "vae": {"latent_channels": 16},
    }.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(sizes))
    sparse_safetensors(folder / "text_encoder" / "model.safetensors", {"w": (123_060_480,)}, dtype)
    sparse_safetensors(folder / "text_encoder_2" / "model-00001-of-00002.safetensors", {"a": (4_000_000_000,)}, dtype)
    sparse_safetensors(folder / "text_encoder_2" / "model-00002-of-00002.safetensors", {"b": (762_310_656,)}, dtype)
    sparse_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", {"w": (83_819_683,)}, dtype)
    return folder
