"""Compile the kernels a model needs, so that its first image does not stall.

They go into Triton's cache on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .. import ops
from ..backends import execution_devices, resolve, wants_planes
from ..compute import mode_of_call
from ..errors import BackendUnavailable
from ..formats import FORMATS
from ..kernels.choice import Choice, choose
from ..layers.linear import GGUFLinear
from ..models.architectures.flux1 import FLUX1
from ..models.model_class import architecture_of_model
from .random_rows import random_rows


@dataclass(frozen=True)
class Signature:
    """Name what decides which kernels are compiled: x [M, K] of `dtype` times packed rows [N, K]."""

    format: str
    compute: str
    m: int
    n: int
    k: int
    dtype: torch.dtype
    bias: torch.dtype | None
    backend: str = "auto"


@dataclass(frozen=True)
class Compiled:
    """Hold what a signature runs, and how long it took until it ran.

    Attributes:
        signature: the call.
        choice: algorithm and tile.
        seconds: until it ran; far below 1 where it was compiled before.
    """

    signature: Signature
    choice: Choice
    seconds: float


def warmup(
    model: nn.Module,
    sizes: Iterable[tuple[int, int]] = ((1024, 1024),),
    *,
    batch: int = 1,
    text_tokens: int | None = None,
    rows: Iterable[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    on_compiled: Callable[[int, int, Compiled], None] = lambda done, total, compiled: None,
) -> list[Compiled]:
    """Compile what the packed layers of a model will launch, by launching it once on random data.

    The model itself is not touched and may be offloaded or on the meta device: only shapes, types and modes are read.

    Args:
        model: a swapped model.
        sizes: (width, height) of the pictures to come, in pixels.
        batch: pictures at once (2 with true classifier-free guidance).
        text_tokens: of the prompt, the pipeline's max_sequence_length; None takes the most that the model's makers use.
        rows: M of the calls; overrides sizes, batch and text_tokens. Needed where the model is none that flux_kernels loads.
        dtype: of the activations; by default each layer's `compute_dtype`.
        device: to compile for; by default the accelerator that the layers are on or may be moved to.
        on_compiled: called with (done, total, what was compiled) after each.

    Returns:
        What was launched, in order. Empty where the layers run on the CPU: the torch backend compiles nothing.

    Raises:
        BackendUnavailable: where a layer's backend or mode cannot run on the device.
        ValueError: where the model has no packed layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GGUFLinear)]
    if not layers:
        raise ValueError("The model has no packed layers to warm up. Call flux_kernels.swap_linear(model) or load_flux first.")
    target = _target(layers) if device is None else torch.device(device)
    counts = sorted(set(_rows(model, sizes, batch, text_tokens) if rows is None else rows))
    wanted = [signature for signature in _signatures(layers, counts, dtype) if _runs_triton(signature, target)]
    done = []
    for signature in wanted:
        done.append(_compile(signature, target))
        on_compiled(len(done), len(wanted), done[-1])
    return done


def _target(layers: list[GGUFLinear]) -> torch.device:
    """Return the accelerator that layers on the CPU may be moved to, or the device they are on."""
    return execution_devices(layers[0].qweight.device)[-1]


def _rows(model: nn.Module, sizes: Iterable[tuple[int, int]], batch: int, text_tokens: int | None) -> set[int]:
    """Return the M of a transformer's calls: modulation, text, image, and both together.

    Other models count as a FLUX.1.
    """
    known = architecture_of_model(model)
    architecture = known or FLUX1
    usual = architecture.settings(model.config if known else {})  # type: ignore[arg-type]
    text = batch * (text_tokens or architecture.text_tokens)
    counts = {batch, text}
    for width, height in sizes:
        image = batch * architecture.picture_tokens(usual, width, height)
        counts |= {image, image + text}
    return counts


def _signatures(layers: list[GGUFLinear], counts: list[int], dtype: torch.dtype | None) -> Iterator[Signature]:
    """Yield each distinct call once.

    A kernel's code depends on N and M only through the tile and divisibility by 16.
    """
    seen = set()
    for layer in layers:
        for m in counts:
            signature = Signature(
                *(layer.format, layer.compute, m, layer.out_features, layer.in_features),
                dtype=dtype or layer.compute_dtype,
                bias=None if layer.bias is None else layer.bias.dtype,
                backend=layer.backend,
            )
            if signature not in seen:
                seen.add(signature)
                yield signature


def _runs_triton(signature: Signature, device: torch.device) -> bool:
    return resolve(signature.backend, signature.compute, device, FORMATS[signature.format]).name == "triton"


def _compile(signature: Signature, device: torch.device) -> Compiled:
    fmt, started = FORMATS[signature.format], time.perf_counter()
    planes = wants_planes(signature.backend, device, fmt)
    data = random_rows(fmt, signature.n, signature.k, planes).to(device)
    bias = None if signature.bias is None else torch.zeros(signature.n, dtype=signature.bias, device=device)
    x = torch.zeros(signature.m, signature.k, dtype=signature.dtype, device=device)
    try:
        ops.linear(x, data, fmt, bias, backend=signature.backend, compute=signature.compute, planes=planes)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
    except torch.OutOfMemoryError as error:
        raise BackendUnavailable(
            f"Not enough memory on {device} to run one layer of {signature.m} x {signature.k} x {signature.n}. Compile before "
            "the model is moved there, or for smaller pictures."
        ) from error
    choice = choose(
        mode_of_call(signature.compute, signature.m), fmt, signature.m, signature.n, signature.k, device, signature.dtype
    )
    return Compiled(signature, choice, time.perf_counter() - started)
