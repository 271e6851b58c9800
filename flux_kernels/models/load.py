"""Build a diffusers transformer from a GGUF file.

Block matrices stay packed and memory-mapped; nothing is decoded.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backends import check_activation_dtype, check_names, check_runnable, usable_device
from ..compute import compute_of_layer
from ..formats import FORMATS
from ..gguf.spec import shown_path
from ..layers.fuse import fuse_projections, offer_fusing
from ..layers.linear import GGUFLinear
from ..layers.takeover import carry_over
from ..swap.model_quantizer import attach_quantizer
from .architecture import Architecture
from .architectures import ARCHITECTURES
from .architectures.flux1 import FLUX1
from .architectures.flux2 import FLUX2
from .model_class import unfilled_model
from .stored import StoredLayer, StoredTransformer, open_stored

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

_FLUX = (FLUX1, FLUX2)


def load_transformer(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    config: object | None = None,
    backend: str = "auto",
    compute: str = "exact",
    fuse: str | None = None,
) -> Any:
    """Load the transformer of a GGUF file: FLUX.1, FLUX.2, Chroma, Krea 2, Z-Image, Qwen-Image and others.

    The tensors tell the model, whatever the file says of itself. Original or diffusers names, with or without prefix, any
    width and number of blocks. Quantized matrices become GGUFLinear layers over the mapped bytes of the file; everything else
    (norm scales, biases, plain matrices) becomes `dtype`, and stays mapped where the file has that type. One tensor is in work
    at a time. A file with fewer blocks than a published model, and otherwise its values, loads with a warning.

    Args:
        path: the GGUF file.
        dtype: floating dtype of the activations and of all that is not a quantized matrix.
        device: where the model goes, tensor by tensor; None leaves it on the CPU, mapped. Layers arrange their packed rows
            as a GPU wants them when `.to(device)` moves them; before sequential or group offloading, which move parameters
            behind the layers' backs, call `swap_linear(model)` once.
        config: overrides of the inferred config: a mapping, a model, or the path of a config.json or its directory. Needed
            only where the tensors do not show all (see `infer_config`).
        backend: "triton", "torch" or "auto", as in `swap_linear`.
        compute: "exact", "fp16_accumulate" or "int8", as in `swap_linear`.
        fuse: "qkv" or "linear1" to fuse layers that share an input, as `fuse_projections` does; rows that the file stores
            together stay mapped.

    Returns:
        A model of diffusers' class in eval mode, to be passed to the pipeline as `transformer`.

    Raises:
        GGUFError: for a damaged file, another model (it says which), and missing, superfluous or wrongly shaped tensors.
        BackendUnavailable: where the device, backend or compute mode cannot run here.
    """
    return _load(path, ARCHITECTURES, dtype, device, config, backend, compute, fuse)


def load_flux(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    config: object | None = None,
    backend: str = "auto",
    compute: str = "exact",
    fuse: str | None = None,
) -> FluxTransformer2DModel:
    """Load the transformer of a FLUX.1 or FLUX.2 GGUF file, as `load_transformer` does.

    Arguments, result and errors are those of `load_transformer`; a file of another model is refused, with its name.

    Returns:
        A diffusers FluxTransformer2DModel or Flux2Transformer2DModel in eval mode.

    Raises:
        GGUFError: for a damaged file, another model (it says which), and missing, superfluous or wrongly shaped tensors.
        BackendUnavailable: where the device, backend or compute mode cannot run here.
    """
    return _load(path, _FLUX, dtype, device, config, backend, compute, fuse)


def _load(
    path: str | os.PathLike,
    wanted: tuple[Architecture, ...],
    dtype: torch.dtype,
    device: torch.device | str | None,
    config: object | None,
    backend: str,
    compute: str,
    fuse: str | None,
) -> Any:
    check_names(backend, compute)
    check_activation_dtype(dtype, "dtype")
    place = usable_device("cpu" if device is None else device)
    stored = open_stored(path, config, wanted)
    lacking = stored.lacking
    if lacking:
        warnings.warn(f"{shown_path(os.fspath(path))}: {lacking}", stacklevel=3)
    for format in {tensor.format for tensor in stored.file.tensors.values()} & FORMATS.keys():
        check_runnable(backend, compute, place, FORMATS[format])
    model = unfilled_model(stored.architecture, stored.config).eval()
    # Modules and parameters that diffusers keeps in 32 bit in every dtype.
    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in list(model.named_modules()):
        own = torch.float32 if wide.intersection(name.split(".")) else dtype
        packed = stored.packed_layer(name, own) if isinstance(module, nn.Linear) else None
        if packed is None:
            _fill(name, module, stored, own, wide, place)
        else:
            mode = compute_of_layer(compute, [name])
            model.set_submodule(name, _packed_linear(module, packed, own, place, backend, mode))
    offer_fusing(model)
    attach_quantizer(model)
    if fuse is not None:
        fuse_projections(model, fuse, rows_of=stored.rows_together if place.type == "cpu" else None)
    return model


def _packed_linear(
    module: nn.Linear, stored: StoredLayer, dtype: torch.dtype, device: torch.device, backend: str, compute: str
) -> nn.Module:
    """Return the GGUFLinear over a layer's packed rows that takes the place of the empty `module`."""
    rows, fmt = stored.weight.data.to(device), stored.weight.fmt
    bias = None if stored.bias is None else nn.Parameter(stored.bias.to(device))
    layer = GGUFLinear.from_packed(rows, fmt, bias, backend=backend, compute=compute, compute_dtype=dtype)
    if stored.low_rank is not None:
        down, up = stored.low_rank
        layer.set_low_rank(down.to(device), up.to(device))
    # On the CPU the rows stay mapped as they are; a layer arranges them itself when it is moved.
    return carry_over(module, layer if device.type == "cpu" else layer.arrange())


def _fill(
    name: str, module: nn.Module, stored: StoredTransformer, dtype: torch.dtype, wide: set[str], device: torch.device
) -> None:
    """Give a module its parameters and saved buffers from the file.

    What it computed itself moves to the device.
    """
    for kind, empty in list(module.named_parameters(recurse=False)):
        values = stored.decoded(f"{name}.{kind}" if name else kind, torch.float32 if kind in wide else dtype).to(device)
        setattr(module, kind, nn.Parameter(values, requires_grad=empty.requires_grad))
    for kind, buffer in list(module.named_buffers(recurse=False)):
        saved = f"{name}.{kind}" if name else kind
        module._buffers[kind] = (stored.decoded(saved, dtype) if saved in stored.sources else buffer).to(device)
