"""Build transformers' T5EncoderModel from a GGUF file.

Matrices and the token table stay packed and memory-mapped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..backends import check_activation_dtype, check_names, check_runnable, usable_device
from ..errors import GGUFError
from ..formats import FORMATS, Packed, PlainType
from ..gguf.check import check_weight_type, tensor_problems
from ..gguf.file import GGUFFile, GGUFTensor, read_gguf
from ..gguf.split import hint_of_part
from ..layers.embedding import GGUFEmbedding
from ..layers.linear import GGUFLinear
from ..layers.takeover import carry_over
from ..swap.model_quantizer import attach_quantizer
from ..torch_backend.reference import dequantize
from .config import infer_config
from .names import TABLE, parameter_names

if TYPE_CHECKING:
    from transformers import T5EncoderModel


@dataclass(frozen=True)
class StoredT5:
    """Hold what is known about a T5 encoder's file before any weight is read."""

    file: GGUFFile
    config: dict
    tensors: dict[str, GGUFTensor]


def load_t5(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    backend: str = "auto",
    compute: str = "exact",
) -> T5EncoderModel:
    """Load a T5 encoder from a GGUF file, for FluxPipeline's `text_encoder_2`.

    Takes llama.cpp's names (`enc.blk.0.attn_q.weight`) and transformers' own (`encoder.block.0.layer.0...`), with or without
    gate, with the decoder of a whole T5 left out. Quantized matrices become GGUFLinear and the token table GGUFEmbedding
    over the mapped bytes of the file; norms, the relative attention bias and plain matrices become `dtype`.

    As in transformers, the second projection of each block (`wo`) runs in float32 where `dtype` is float16, because its
    sums overflow there. Norm scales have `dtype`: in float32 they would turn all activations into float32.

    Args:
        path: the GGUF file.
        dtype: bfloat16, float32 or float16, of activations and of all that is not packed.
        device: where the model goes, tensor by tensor; None leaves it on the CPU, mapped.
        backend: "triton", "torch" or "auto", as in `swap_linear`.
        compute: "exact", "fp16_accumulate" or "int8", as in `swap_linear`.

    Returns:
        A T5EncoderModel in eval mode.

    Raises:
        GGUFError: for a damaged file, another model, and missing, superfluous or wrongly shaped tensors, which it names.
        BackendUnavailable: where the device, backend or compute mode cannot run here.
    """
    check_names(backend, compute)
    check_activation_dtype(dtype, "dtype")
    place = usable_device("cpu" if device is None else device)
    stored = open_t5(path)
    for format in {tensor.format for tensor in stored.tensors.values()} & FORMATS.keys():
        check_runnable(backend, compute, place, FORMATS[format])
    model = empty_t5(stored.config).eval()
    for name, module in list(model.encoder.named_modules(prefix="encoder")):
        wide = dtype is torch.float16 and name.rpartition(".")[2] in (model._keep_in_fp32_modules or ())
        own = torch.float32 if wide else dtype
        if isinstance(module, nn.Linear):
            model.set_submodule(name, _linear(name, module, stored, own, place, backend, compute))
        elif name != "encoder.embed_tokens":
            _fill(name, module, stored, own, place)
    model.set_input_embeddings(_table(stored, dtype, place, backend))
    model.config.dtype = dtype
    attach_quantizer(model)
    return model


def open_t5(path: str | os.PathLike) -> StoredT5:
    """Open a GGUF file and check that it is a complete T5 encoder; no weight is read.

    Raises:
        GGUFError: as `load_t5`.
    """
    file = read_gguf(path)
    try:
        return understand_t5(file)
    except GGUFError as error:
        raise GGUFError(f"{os.fspath(path)}: {error}") from None


def understand_t5(file: GGUFFile) -> StoredT5:
    """Locate every parameter of the encoder in an opened file.

    Raises:
        GGUFError: where it cannot be loaded, with the reason.
    """
    with hint_of_part(file.path, file.metadata):
        return _understood(file)


def _understood(file: GGUFFile) -> StoredT5:
    tensors = {parameter: file.tensors[name] for parameter, name in parameter_names(file.tensors).items()}
    shapes = {parameter: tuple(tensor.shape) for parameter, tensor in tensors.items()}
    config = infer_config(shapes, file.metadata)
    expected = {name: tuple(parameter.shape) for name, parameter in empty_t5(config).named_parameters()}
    problems = tensor_problems(shapes, expected)
    if problems:
        raise GGUFError(
            f"{problems}. A T5 encoder with {config['num_layers']} blocks holds exactly {len(expected)} tensors: the file is "
            "incomplete or another model."
        )
    for parameter, tensor in tensors.items():
        check_weight_type(parameter, tensor.format)
    return StoredT5(file, config, tensors)


def empty_t5(config: dict) -> T5EncoderModel:
    """Build a T5EncoderModel on the meta device; its table has one name, `shared`."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config))
    model.set_input_embeddings(model.shared)
    model.tie_weights = _stay_tied  # type: ignore[method-assign]
    return model


def _stay_tied(*args, **kwargs) -> None:
    """Stand in for `tie_weights`: the table is one module under both names.

    A packed one has no parameter `weight`.
    """


def _decoded(tensor: GGUFTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor in `dtype`; mapped where the file holds that type."""
    if isinstance(tensor.block_format, PlainType):
        return tensor.data.to(device, dtype)
    return dequantize(Packed(tensor.data, tensor.block_format)).to(device, dtype)


def _linear(
    name: str, module: nn.Linear, stored: StoredT5, dtype: torch.dtype, device: torch.device, backend: str, compute: str
) -> nn.Module:
    """Return `module` filled with plain weights, or the GGUFLinear over its packed rows."""
    tensor = stored.tensors[f"{name}.weight"]
    if tensor.format not in FORMATS:
        return _fill(name, module, stored, dtype, device)
    layer = GGUFLinear.from_packed(tensor.data.to(device), tensor.format, backend=backend, compute=compute, compute_dtype=dtype)
    return carry_over(module, layer if device.type == "cpu" else layer.arrange())


def _fill(name: str, module: nn.Module, stored: StoredT5, dtype: torch.dtype, device: torch.device) -> nn.Module:
    for kind, _ in list(module.named_parameters(recurse=False)):
        values = _decoded(stored.tensors[f"{name}.{kind}"], dtype, device)
        setattr(module, kind, nn.Parameter(values, requires_grad=False))
    return module


def _table(stored: StoredT5, dtype: torch.dtype, device: torch.device, backend: str) -> nn.Embedding:
    """Return the token table: packed rows where the file holds them packed."""
    tensor = stored.tensors[TABLE]
    if tensor.format in FORMATS:
        return GGUFEmbedding(tensor.data.to(device), tensor.format, backend=backend, compute_dtype=dtype).eval()
    return nn.Embedding.from_pretrained(_decoded(tensor, dtype, device), freeze=True).eval()
