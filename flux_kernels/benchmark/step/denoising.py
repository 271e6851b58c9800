"""Time one denoising run of diffusers' FluxPipeline on the embedded model, also with model offload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...compute import dtype_name
from ...generation.base_pipeline import go_offline_quietly, load_pipeline
from ...generation.embedded import BLOCKS, EMBEDDED_PROMPTS, PIPELINE_KWARGS, embedded_model_path, embedded_transformer
from ...layers.linear import GGUFLinear
from ...layers.memory import memory_footprint
from ...machine.clock import interleaved
from ...swap import swap_linear
from ..memory import extra_peak
from ..names import DENOISING, OFFLOADED, wrong
from ..providers import Problem, why
from .timing import DENOISED, EMBEDDED_BATCH, LARGEST_GATE, is_ours_to_mend, new_row, relative, timed
from .weights import make_layer

_NEEDS_GPU = "model offload needs a GPU"
_NOTE = f"{PIPELINE_KWARGS['num_inference_steps']} steps, text encoders included, to latents"


def measure_denoising(
    name: str, providers: list[str], device: torch.device, dtype: torch.dtype, repeats: int, progress: Callable[[str], None]
) -> list[dict]:
    """Return a row for each provider, without and with model offload, all timed in turn.

    The transformer's linear layers are the providers' on the same packed weights; `error` is the relative RMS distance of the
    final latents to those of the first provider.
    """
    go_offline_quietly()
    rows: list[dict] = []
    # By position of the row.
    calls: dict[str, Callable[[], Tensor]] = {}
    expected: Tensor | None = None
    for provider in providers:
        progress(f"denoising, {name}: checking {provider}")
        for what in (DENOISING, OFFLOADED):
            row, offload = new_row(name, provider, what, DENOISED, dtype_name(dtype)), what == OFFLOADED
            rows.append(row)
            if offload and device.type == "cpu":
                row["note"] = _NEEDS_GPU
                continue
            try:
                call, weight_bytes = _pipeline_call(name, provider, device, dtype, offload)
                latents = call()
                extra = extra_peak(call, device)
            except Exception as problem:
                if is_ours_to_mend(provider, problem):
                    raise
                row["note"] = why(problem)
                continue
            expected = latents if expected is None else expected
            error = relative(latents, expected)
            row |= dict(weight_bytes=weight_bytes, error=f"{error:.3g}", note=_NOTE)
            if error <= LARGEST_GATE:
                calls[str(len(rows) - 1)] = call
                row["peak_bytes"] = "" if extra is None else extra + (0 if offload else weight_bytes)
            else:
                row["note"] = wrong(error, LARGEST_GATE)
    progress(f"denoising, {name}: timing")
    for index, times in interleaved(calls, repeats, device).items():
        rows[int(index)] |= timed(times)
    return rows


def _pipeline_call(
    name: str, provider: str, device: torch.device, dtype: torch.dtype, offload: bool
) -> tuple[Callable[[], Tensor], int]:
    """Return what denoises once, to latents, and the bytes of all weights of its pipeline."""
    pipeline = load_pipeline(embedded_model_path(), _transformer(name, provider, device, dtype), dtype)
    weight_bytes = sum(memory_footprint(part)["total"] for part in pipeline.components.values() if isinstance(part, nn.Module))
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)

    def call() -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(EMBEDDED_BATCH)]
        prompts = list(EMBEDDED_PROMPTS[:EMBEDDED_BATCH])
        return pipeline(prompt=prompts, generator=generators, output_type="latent", **PIPELINE_KWARGS).images

    return call, weight_bytes


def _transformer(name: str, provider: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the embedded transformer with the provider's layers on weights packed as `name`."""
    transformer: Any = embedded_transformer()
    transformer.to(device, dtype)
    swap_linear(transformer, format=name, include=BLOCKS)
    for path, layer in list(_packed(transformer)):
        problem = Problem(layer.packed._replace(data=layer.qweight.detach()), layer.bias.detach(), dtype)
        transformer.set_submodule(path, make_layer(provider, problem, path))
    return transformer


def _packed(model: nn.Module) -> Iterator[tuple[str, GGUFLinear]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, GGUFLinear))
