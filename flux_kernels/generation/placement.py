"""Put a pipeline where it runs: measure what it needs, choose an offload, pin host memory on request."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import BackendUnavailable
from ..layers.linear import GGUFLinear
from ..layers.memory import memory_footprint, pin_memory
from ..models.model_class import architecture_of_model
from .memory_plan import OFFLOADS, MemoryPlan, Part, plan_memory, text_working, transformer_working, vae_working

# What reads weights from host memory at every step, and gains by pinning it.
STREAMED = ("group", "sequential")
_NO_GPU = "torch sees no GPU: everything runs on the CPU, and nothing is offloaded."


def check_offload(offload: str, pin: bool) -> None:
    """Raise BackendUnavailable where an offload is unknown, or asks for what is not there."""
    if offload not in OFFLOADS:
        raise BackendUnavailable(f"Unknown offload {offload!r}. Known: {', '.join(OFFLOADS)}.")
    if not torch.cuda.is_available():
        if offload not in ("none", "auto"):
            raise BackendUnavailable(f"--offload {offload} moves weights to a GPU, and torch sees none. Use --offload none.")
        if pin:
            raise BackendUnavailable("--pin pins host memory for copies to a GPU, and torch sees none. Leave it out.")
    if pin and offload in ("none", "model"):
        raise BackendUnavailable(
            f"--pin is for weights that are copied at every step (--offload {' or '.join(STREAMED)}); --offload {offload} "
            "keeps them on the GPU while they work. Leave it out."
        )


def measured_parts(
    pipeline: Any, width: int, height: int, reference_tokens: int, text_tokens: int, batch: int = 1
) -> list[Part]:
    """Measure the models of a pipeline, in bytes, for one picture.

    Args:
        pipeline: a diffusers pipeline that draws a picture.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        reference_tokens: of pictures that the transformer sees besides the result.
        text_tokens: of the prompt, at most.
        batch: pictures that the transformer computes at once; 2 where a negative prompt runs beside the prompt.
    """
    parts = []
    for name, model in pipeline.components.items():
        if isinstance(model, nn.Module):
            working = _working(model, width, height, reference_tokens, text_tokens, batch)
            parts.append(Part(name, memory_footprint(model)["total"], _largest_layer(model), working))
    return parts


def _largest_layer(model: nn.Module) -> int:
    """Return the bytes of the module whose own parameters take most."""
    return max(sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)) for module in model.modules())


def _working(model: Any, width: int, height: int, reference_tokens: int, text_tokens: int, batch: int) -> int:
    """Return the bytes of the activations of one model of a pipeline."""
    config, itemsize = model.config, model.dtype.itemsize
    channels = _vae_channels(config)
    if channels is not None:
        return vae_working(channels, width, height, itemsize=itemsize)
    decoded = max((module.weight.numel() for module in model.modules() if isinstance(module, GGUFLinear)), default=0) * itemsize
    architecture = architecture_of_model(model)
    if architecture is not None:
        tokens = architecture.picture_tokens(architecture.settings(config), width, height) + reference_tokens + text_tokens
        return transformer_working(architecture.width(config), tokens, batch=batch, itemsize=itemsize, decoded=decoded)
    # Of a model of text and pictures, what reads the text.
    text = config.get_text_config()
    return text_working(text.hidden_size, text.num_attention_heads, text_tokens, itemsize=itemsize, decoded=decoded)


def _vae_channels(config: Any) -> int | None:
    """Return the channels that reach a VAE's full resolution, its second finest; None for another model."""
    if hasattr(config, "block_out_channels"):
        return config.block_out_channels[:2][-1]
    if hasattr(config, "dim_mult"):
        return config.base_dim * config.dim_mult[:2][-1]
    return None


def place(pipeline: Any, offload: str, parts: list[Part], width: int, height: int, *, pin: bool = False) -> MemoryPlan:
    """Put the pipeline where it runs; return what was chosen, with the reason.

    Args:
        pipeline: a diffusers pipeline on the CPU.
        offload: a key of OFFLOADS; "auto" measures the GPU's free memory.
        parts: of `measured_parts`.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        pin: whether weights that stay in host memory are pinned there first (a copy of what was mapped from a file).

    Raises:
        BackendUnavailable: where there is no GPU to offload to.
    """
    check_offload(offload, pin)
    if not torch.cuda.is_available():
        return MemoryPlan("none", False, True, {}, _NO_GPU)
    plan = plan_memory(parts, torch.cuda.mem_get_info()[0], width, height)
    if offload != "auto":
        plan = MemoryPlan(offload, plan.tile_vae, True, plan.needs, f"offload {offload}, as asked for.")
    if plan.tile_vae:
        pipeline.vae.enable_tiling()
    apply_offload(pipeline, plan.offload, torch.device("cuda"), pin)
    return plan


def apply_offload(pipeline: Any, offload: str, device: torch.device, pin: bool = False) -> None:
    """Apply an offload mode other than "auto" to a pipeline that is on the CPU."""
    if pin and offload in STREAMED:
        for model in pipeline.components.values():
            if isinstance(model, nn.Module):
                pin_memory(model)
    if offload == "none":
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        # Streams need pinned memory: pinned beforehand where asked for, otherwise layer by layer as they are copied
        stream = device.type == "cuda"
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=stream, low_cpu_mem_usage=stream)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
