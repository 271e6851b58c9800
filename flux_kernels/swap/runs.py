"""Say in words what computes a packed layer: backend, algorithm and tile by number of rows.

A layer that may be moved to an accelerator is described as it will run there.
"""

from __future__ import annotations

import torch

from ..backends import execution_devices, resolve
from ..compute import mode_of_call
from ..errors import BackendUnavailable
from ..formats import FORMATS
from ..layers.linear import GGUFLinear

# Modulation, text, and image plus text of a 1024 x 1024 Flux step.
SHOWN_ROWS = (1, 512, 4608)


def runs_as(layer: GGUFLinear) -> str:
    """Say what runs a layer, such as "triton on cuda:0: small_m at M=1, fused 128x128x256 ... above"."""
    fmt, device = FORMATS[layer.format], _execution_device(layer)
    try:
        backend = resolve(layer.backend, layer.compute, device, fmt).name
    except BackendUnavailable:
        return f"nothing on {device}"
    if backend != "triton":
        return f"{backend} on {device}"
    from ..kernels.choice import choose

    n, k = layer.out_features, layer.in_features
    modes = [(m, mode_of_call(layer.compute, m)) for m in SHOWN_ROWS]
    choices = [(m, str(choose(mode, fmt, m, n, k, device, layer.compute_dtype))) for m, mode in modes]
    parts = [f"{choice} at M={m}" for at, (m, choice) in enumerate(choices) if at == 0 or choice != choices[at - 1][1]]
    return f"triton on {device}: {', '.join(parts)}"


def _execution_device(layer: GGUFLinear) -> torch.device:
    """Return where the layer computes.

    Its hook's device, an accelerator that it may be moved to, or where it is.
    """
    hooked = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    if hooked is not None:
        return torch.device(hooked)
    return execution_devices(layer.qweight.device)[-1]
