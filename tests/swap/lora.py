"""LoRAs for the tiny Flux, as peft and pipelines take them."""

from __future__ import annotations

import pytest
import torch

from ..conftest import TINY_FLUX

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

RANK = 4


def lora_config(**options):
    """Make peft's config of a LoRA on some layers of the tiny Flux."""
    return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "proj_mlp"], **options)


def lora_state_dict(seed: int, name: str = "to_q") -> dict[str, torch.Tensor]:
    """Make a LoRA file for every attention projection `name`, under the names of a pipeline."""
    generator = torch.Generator().manual_seed(seed)
    width = TINY_FLUX["attention_head_dim"] * TINY_FLUX["num_attention_heads"]
    state = {}
    for stack, count in (("transformer_blocks", 2), ("single_transformer_blocks", 2)):
        for index in range(count):
            prefix = f"transformer.{stack}.{index}.attn.{name}"
            state[f"{prefix}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * 0.1
            state[f"{prefix}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) * 0.1
    return state


def pipeline(model):
    """Make a FluxPipeline of a transformer alone, which loads and fuses LoRAs."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxPipeline(scheduler=scheduler, transformer=model, **empty)
