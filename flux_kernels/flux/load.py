"""Build a FluxTransformer2DModel from a GGUF file: block matrices stay packed and memory-mapped, nothing is decoded."""

from __future__ import annotations

import os

import torch
from torch import nn

from ..backends import check_activation_dtype, check_names
from ..formats import FORMATS
from ..linear import GGUFLinear
from .stored import StoredFlux, empty_model, open_flux


def load_flux(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    config: object | None = None,
    backend: str = "auto",
    compute: str = "exact",
) -> nn.Module:
    """Load the transformer of a FLUX.1 GGUF file.

    Any layout and variant: BFL or diffusers names, with or without prefix, any width and number of blocks. Quantized
    matrices become GGUFLinear layers over the mapped bytes of the file; everything else (norm scales, biases, plain
    matrices) becomes `dtype`, and stays mapped where the file has that type. One tensor is in work at a time.

    Args:
        path: the GGUF file.
        dtype: floating dtype of the activations and of all that is not a quantized matrix.
        device: where the model goes, tensor by tensor; None leaves it on the CPU, mapped.
        config: overrides of the inferred config: a mapping, a model, or the path of a config.json or its directory. Needed
            only where heads are not a multiple of 32 wide (see `infer_config`).
        backend: "triton", "torch" or "auto", as in `swap_linear`.
        compute: "exact", "fp16_accumulate" or "int8", as in `swap_linear`.

    Returns:
        A diffusers FluxTransformer2DModel in eval mode, to be passed to FluxPipeline as `transformer`.

    Raises:
        GGUFError: for a damaged file, another model (it says which), and missing, superfluous or wrongly shaped tensors.
    """
    check_names(backend, compute)
    check_activation_dtype(dtype, "dtype")
    stored = open_flux(path, config)
    model = empty_model(stored.config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            _load_linear(model, name, module, stored, dtype, device, backend, compute)
        else:
            for kind, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, kind, _plain(stored, f"{name}.{kind}", dtype, device, parameter.requires_grad))
    return model.eval()


def _load_linear(model, name, module, stored: StoredFlux, dtype, device, backend, compute) -> None:
    """Give one linear its weights: in place where they are plain, by a GGUFLinear where they are packed."""
    bias = _plain(stored, f"{name}.bias", dtype, device, module.bias.requires_grad)
    format = stored.format(f"{name}.weight")
    if format not in FORMATS:
        module.weight = _plain(stored, f"{name}.weight", dtype, device, module.weight.requires_grad)
        module.bias = bias
        return
    packed = stored.packed(f"{name}.weight").to(device)
    layer = GGUFLinear.from_packed(packed, format, bias, backend=backend, compute=compute, compute_dtype=dtype)
    model.set_submodule(name, layer)


def _plain(stored: StoredFlux, parameter: str, dtype, device, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(stored.decoded(parameter, dtype).to(device), requires_grad=requires_grad)
