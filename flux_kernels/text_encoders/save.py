"""Write a text encoder as a GGUF file under llama.cpp's names.

Packed rows are written as they are, plain matrices are quantized on the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import GGUFError
from ..formats import FORMATS, PLAIN_TYPES, get_format
from ..gguf.conventions import KeyValues, general_keys
from ..gguf.file import write_gguf
from ..layers.embedding import GGUFEmbedding
from ..layers.linear import GGUFLinear
from ..packing import quantize, quantizer
from .encoder import TextEncoder
from .encoders import TEXT_ENCODERS
from .encoders.t5 import T5
from .rotary_rows import interleave

if TYPE_CHECKING:
    from transformers import T5EncoderModel

Progress = Callable[[str, int, int], None]
# Type of norm scales, biases and what a row names, as llama.cpp's converter writes them.
_EXACT = "F32"
_PLAIN_NAMES = {PLAIN_TYPES[name].dtype: name for name in ("F32", "F16", "BF16")}


def save_text_encoder(
    model: nn.Module, path: str | os.PathLike, *, format: str | None = "Q8_0", progress: Progress | None = None
) -> None:
    """Write a text encoder as a GGUF file that `load_text_encoder` reads, under llama.cpp's names.

    Matrices that are packed are written as they are: load, save and load again gives the same bytes. Norm scales and biases
    become F32. One tensor is in work at a time. The tokenizer is not written, which llama.cpp's own programs ask for.

    Args:
        model: of a class that `load_text_encoder` returns.
        path: the file to write; one that is there is replaced.
        format: ggml type that plain matrices and the token table are quantized to; None keeps them in their dtype.
        progress: called after every tensor with its name, the bytes written so far, and those in all.

    Raises:
        TypeError: where `model` is no such text encoder.
        FormatError: where `format` is unknown, has no quantizer here, or does not divide the width of a matrix.
        GGUFError: where weights are missing (offloaded, or never loaded).
    """
    _save("save_text_encoder", TEXT_ENCODERS, model, path, format, progress)


def save_t5(
    model: T5EncoderModel,
    path: str | os.PathLike,
    *,
    format: str | None = "Q8_0",
    progress: Progress | None = None,
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
    _save("save_t5", (T5,), model, path, format, progress)


def _save(
    caller: str,
    wanted: tuple[TextEncoder, ...],
    model: Any,
    path: str | os.PathLike,
    format: str | None,
    progress: Progress | None,
) -> None:
    encoder = next((row for row in wanted if _is_one(model, row)), None)
    if encoder is None:
        legal = " or ".join(f"a {row.model_class} such as {row.example}" for row in wanted)
        raise TypeError(f"{caller} takes {legal}, got {type(model).__name__}.")
    if format is not None:
        quantizer(get_format(format))
    tensors, config = [], model.config.to_dict()
    for parameter, layer in _parameters(model, encoder):
        kind = _stored_type(encoder, parameter, layer, format)
        shape = tuple(_value(parameter, layer).shape)
        if kind in FORMATS:
            get_format(kind).row_bytes(shape[-1], parameter)
        heads = encoder.permuted_heads(parameter, config)
        tensors.append((encoder.written_name(parameter), kind, shape, partial(_data, parameter, layer, kind, heads)))
    write_gguf(path, tensors, _metadata(encoder, model.config), progress=progress)


def _is_one(model: Any, encoder: TextEncoder) -> bool:
    """Tell whether a model, or what is wrapped around it, is of a row."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != encoder.model_type or any(hasattr(model, name) for name in encoder.never):
        return False
    return all(hasattr(model, name) for name in encoder.parts)


def _parameters(model: Any, encoder: TextEncoder) -> Iterator[tuple[str, Any]]:
    """Yield (parameter, its module) of all that is written: of tied ones, the token table alone."""
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    for part in encoder.parts:
        for name, module in getattr(model, part).named_modules(prefix=part):
            for kind in ("weight", "bias"):
                parameter = f"{name}.{kind}"
                held = module is not tied and parameter not in encoder.twins and isinstance(getattr(module, kind, None), Tensor)
                if held:
                    yield parameter, module


def _value(parameter: str, layer: Any) -> Tensor:
    return getattr(layer, parameter.rpartition(".")[2])


def _stored_type(encoder: TextEncoder, parameter: str, layer: Any, format: str | None) -> str:
    """Return the ggml type a weight is written in."""
    value = _value(parameter, layer)
    if isinstance(layer, GGUFLinear | GGUFEmbedding) and value.dim() > 1:
        return layer.format
    if value.dim() == 1 or encoder.is_exact(parameter):
        return _EXACT
    if format is None and value.dtype not in _PLAIN_NAMES:
        raise GGUFError(f"{parameter!r} is {value.dtype}; legal is {', '.join(map(str, _PLAIN_NAMES))}.")
    return _PLAIN_NAMES[value.dtype] if format is None else get_format(format).name


def _data(parameter: str, layer: Any, kind: str, heads: int | None) -> Tensor:
    """Return a weight as the file holds it, on the CPU."""
    rows = _rows(parameter, layer, kind)
    return rows if heads is None else interleave(rows, heads)


def _rows(parameter: str, layer: Any, kind: str) -> Tensor:
    """Return a weight in the type that is written, on the CPU, its rows in transformers' order."""
    value = _value(parameter, layer)
    if value.device.type == "meta":
        raise GGUFError(f"{parameter!r} is on the meta device (offloaded, or never loaded). Save before offload is enabled.")
    if isinstance(layer, GGUFLinear) and value.dim() > 1:
        return layer.file_bytes().cpu()
    if isinstance(layer, GGUFEmbedding):
        return layer.qweight.detach().cpu()
    weight = value.detach()
    return weight.to("cpu", PLAIN_TYPES[kind].dtype) if kind in PLAIN_TYPES else quantize(weight, kind, name=parameter).cpu()


def _metadata(encoder: TextEncoder, config: Any) -> KeyValues:
    """Return the key-values that llama.cpp's converter writes for the model, without the tokenizer's."""
    architecture = encoder.gguf_names[0]
    keys = encoder.written_keys(config)
    return {**general_keys(architecture), **{f"{architecture}.{key}": value for key, value in keys.items()}}
