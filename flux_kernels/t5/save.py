"""Write a T5 encoder as a GGUF file under llama.cpp's names.

Packed rows are written as they are, plain matrices are quantized on the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import GGUFError
from ..formats import FORMATS, PLAIN_TYPES, get_format
from ..gguf.file import write_gguf
from ..layers.embedding import GGUFEmbedding
from ..layers.linear import GGUFLinear
from ..packing import quantize, quantizer
from .names import TABLE, written_name

if TYPE_CHECKING:
    from transformers import T5EncoderModel

ARCHITECTURE = "t5encoder"
# GGML_QNT_VERSION, the only one there is for these types.
_QUANTIZATION_VERSION = 2
# Tokens that FLUX.1 and T5 v1.1 use; readers that ask for it only reserve memory by it.
_CONTEXT = 512
# Type of norm scales and the relative bias, as llama.cpp's converter writes them.
_EXACT = "F32"
_PLAIN_NAMES = {PLAIN_TYPES[name].dtype: name for name in ("F32", "F16", "BF16")}


def save_t5(
    model: T5EncoderModel,
    path: str | os.PathLike,
    *,
    format: str | None = "Q8_0",
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a T5 encoder as a GGUF file that `load_t5`, llama.cpp and ComfyUI-GGUF read.

    Matrices that are packed are written as they are: load, save and load again gives the same bytes. Norm scales and the
    relative attention bias become F32. One tensor is in work at a time.

    Args:
        model: a T5EncoderModel, such as `FluxPipeline.from_pretrained(...).text_encoder_2`.
        path: the file to write; one that is there is replaced.
        format: ggml type that plain matrices and the token table are quantized to; None keeps them in their dtype.
        progress: called after every tensor with its name, the bytes written so far, and those in all.

    Raises:
        TypeError: where `model` is no T5 encoder.
        FormatError: where `format` is unknown, has no quantizer here, or does not divide the width of a matrix.
        GGUFError: where weights are missing (offloaded, or never loaded).
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "t5" or not hasattr(model, "encoder") or hasattr(model, "decoder"):
        raise TypeError(f"save_t5 takes a T5EncoderModel such as pipe.text_encoder_2, got {type(model).__name__}.")
    if format is not None:
        quantizer(get_format(format))
    layers = {f"{name}.weight": module for name, module in model.encoder.named_modules(prefix="encoder") if _holds(module)}
    layers = {TABLE: model.shared, **{name: layer for name, layer in layers.items() if layer is not model.encoder.embed_tokens}}
    tensors = []
    for parameter, layer in layers.items():
        kind = _stored_type(parameter, layer, format)
        shape = tuple(layer.weight.shape)
        if kind in FORMATS:
            get_format(kind).row_bytes(shape[-1], parameter)
        tensors.append((written_name(parameter), kind, shape, partial(_data, parameter, layer, kind)))
    write_gguf(path, tensors, _metadata(config), progress=progress)


def _holds(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _stored_type(parameter: str, layer: Any, format: str | None) -> str:
    """Return the ggml type a weight is written in."""
    if isinstance(layer, GGUFLinear | GGUFEmbedding):
        return layer.format
    if layer.weight.dim() == 1 or "relative_attention_bias" in parameter:
        return _EXACT
    if format is None and layer.weight.dtype not in _PLAIN_NAMES:
        raise GGUFError(f"{parameter!r} is {layer.weight.dtype}; legal is {', '.join(map(str, _PLAIN_NAMES))}.")
    return _PLAIN_NAMES[layer.weight.dtype] if format is None else get_format(format).name


def _data(parameter: str, layer: Any, kind: str) -> Tensor:
    """Return a weight as the file holds it, on the CPU."""
    if layer.weight.device.type == "meta":
        raise GGUFError(f"{parameter!r} is on the meta device (offloaded, or never loaded). Save before offload is enabled.")
    if isinstance(layer, GGUFLinear):
        return layer.file_bytes().cpu()
    if isinstance(layer, GGUFEmbedding):
        return layer.qweight.detach().cpu()
    weight = layer.weight.detach()
    return weight.to("cpu", PLAIN_TYPES[kind].dtype) if kind in PLAIN_TYPES else quantize(weight, kind, name=parameter).cpu()


def _metadata(config: Any) -> dict[str, tuple[str, Any]]:
    """Return the key-values that llama.cpp's converter writes for the model, without the tokenizer's."""
    keys = {
        "context_length": ("UINT32", _CONTEXT),
        "embedding_length": ("UINT32", config.d_model),
        "feed_forward_length": ("UINT32", config.d_ff),
        "block_count": ("UINT32", config.num_layers),
        "vocab_size": ("UINT32", config.vocab_size),
        "attention.head_count": ("UINT32", config.num_heads),
        "attention.key_length": ("UINT32", config.d_kv),
        "attention.value_length": ("UINT32", config.d_kv),
        "attention.layer_norm_epsilon": ("FLOAT32", config.layer_norm_epsilon),
        "attention.layer_norm_rms_epsilon": ("FLOAT32", config.layer_norm_epsilon),
        "attention.relative_buckets_count": ("UINT32", config.relative_attention_num_buckets),
    }
    return {
        "general.architecture": ("STRING", ARCHITECTURE),
        "general.quantization_version": ("UINT32", _QUANTIZATION_VERSION),
        **{f"{ARCHITECTURE}.{key}": value for key, value in keys.items()},
    }
