"""Build transformers' class of a text encoder from a GGUF file.

Matrices and the token table stay packed and memory-mapped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backends import check_activation_dtype, check_names, check_runnable, usable_device
from ..formats import FORMATS, Packed, PlainType
from ..gguf.file import GGUFTensor
from ..layers.embedding import GGUFEmbedding
from ..layers.linear import GGUFLinear
from ..layers.takeover import carry_over
from ..swap.model_quantizer import attach_quantizer
from ..torch_backend.reference import dequantize
from .encoder import TextEncoder
from .encoders import TEXT_ENCODERS
from .encoders.t5 import T5
from .model_class import unfilled_model
from .rotary_rows import deinterleave
from .stored import StoredEncoder, open_stored

if TYPE_CHECKING:
    from transformers import T5EncoderModel


def load_text_encoder(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    backend: str = "auto",
    compute: str = "exact",
) -> Any:
    """Load the text encoder of a GGUF file into transformers' class, for a pipeline's `text_encoder`.

    The tensors tell the encoder; `general.architecture` chooses only where they show several. Takes llama.cpp's names
    (`blk.0.attn_q.weight`) and transformers' own. Quantized matrices become GGUFLinear and the token table GGUFEmbedding over
    the mapped bytes of the file; norms, biases and plain matrices become `dtype`. Rows that llama.cpp's converter permutes are
    put back, which copies them. An output head that is tied to a packed table is a layer over the same bytes.

    Modules that transformers keeps in float32 run so where `dtype` is float16. Norm scales have `dtype`: in float32 they would
    turn all activations into float32.

    Args:
        path: the GGUF file.
        dtype: bfloat16, float32 or float16, of activations and of all that is not packed.
        device: where the model goes, tensor by tensor; None leaves it on the CPU, mapped.
        backend: "triton", "torch" or "auto", as in `swap_linear`.
        compute: "exact", "fp16_accumulate" or "int8", as in `swap_linear`.

    Returns:
        A model of transformers in eval mode.

    Raises:
        GGUFError: for a damaged file, another model (it says what is known and what was seen), and missing, superfluous or wrongly
            shaped tensors, which it names.
        BackendUnavailable: where the device, backend or compute mode cannot run here.
    """
    return _load(path, TEXT_ENCODERS, dtype, device, backend, compute)


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
    return _load(path, (T5,), dtype, device, backend, compute)


@dataclass(frozen=True)
class _Loading:
    """Hold a file and how its layers are built."""

    stored: StoredEncoder
    device: torch.device
    backend: str
    compute: str

    def rows(self, parameter: str) -> Tensor:
        """Return a tensor as the file holds it, on the CPU, its rows in transformers' order."""
        encoder, data = self.stored.encoder, self.stored.tensors[parameter].data
        heads = encoder.permuted_heads(parameter, self.stored.config)
        return data if heads is None else deinterleave(data, heads)

    def decoded(self, parameter: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor in `dtype`; mapped where the file holds that type."""
        fmt = self.stored.tensors[parameter].block_format
        rows = self.rows(parameter)
        values = rows if isinstance(fmt, PlainType) else dequantize(Packed(rows, fmt))
        return values.to(self.device, dtype)

    def linear(self, name: str, module: nn.Linear, dtype: torch.dtype) -> nn.Module:
        """Return `module` filled with plain weights, or the GGUFLinear over its packed rows."""
        tensor = self.stored.tensors[f"{name}.weight"]
        if tensor.format not in FORMATS:
            return self.fill(name, module, dtype)
        bias = None if module.bias is None else nn.Parameter(self.decoded(f"{name}.bias", dtype), requires_grad=False)
        return self.packed_linear(module, self.rows(f"{name}.weight"), tensor.format, bias, dtype)

    def packed_linear(self, module: nn.Linear, rows: Tensor, format: str, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        """Return the GGUFLinear over packed rows that takes the place of the empty `module`."""
        layer = GGUFLinear.from_packed(
            rows.to(self.device), format, bias, backend=self.backend, compute=self.compute, compute_dtype=dtype
        )
        return carry_over(module, layer if self.device.type == "cpu" else layer.arrange())

    def fill(self, name: str, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Give a module its parameters from the file; what it computed itself moves to the device."""
        for kind, _ in list(module.named_parameters(recurse=False)):
            setattr(module, kind, nn.Parameter(self.decoded(f"{name}.{kind}", dtype), requires_grad=False))
        for kind, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[kind] = buffer.to(self.device)
        return module

    def table(self, dtype: torch.dtype) -> nn.Embedding:
        """Return the token table: packed rows where the file holds them packed."""
        parameter = self.stored.encoder.table
        tensor: GGUFTensor = self.stored.tensors[parameter]
        if tensor.format in FORMATS:
            rows = tensor.data.to(self.device)
            return GGUFEmbedding(rows, tensor.format, backend=self.backend, compute_dtype=dtype).eval()
        return nn.Embedding.from_pretrained(self.decoded(parameter, dtype), freeze=True).eval()

    def tied_output(self, module: nn.Linear, table: nn.Embedding, dtype: torch.dtype) -> nn.Module:
        """Return the output head that multiplies with the token table: over its bytes, or with its parameter."""
        if isinstance(table, GGUFEmbedding):
            return self.packed_linear(module, table.qweight.data, table.format, None, dtype)
        module.weight = table.weight
        return module


def _load(
    path: str | os.PathLike,
    wanted: tuple[TextEncoder, ...],
    dtype: torch.dtype,
    device: torch.device | str | None,
    backend: str,
    compute: str,
) -> Any:
    check_names(backend, compute)
    check_activation_dtype(dtype, "dtype")
    place = usable_device("cpu" if device is None else device)
    stored = open_stored(path, wanted)
    for format in {tensor.format for tensor in stored.tensors.values()} & FORMATS.keys():
        check_runnable(backend, compute, place, FORMATS[format])
    loading, model = _Loading(stored, place, backend, compute), unfilled_model(stored.encoder, stored.config)
    table, output = loading.table(dtype), model.get_output_embeddings()
    empty_table = model.get_input_embeddings()
    tied = output is not None and model.config.tie_word_embeddings
    for name, module in list(model.named_modules()):
        wide = dtype is torch.float16 and name.rpartition(".")[2] in (model._keep_in_fp32_modules or ())
        own = torch.float32 if wide else dtype
        if module is empty_table:
            continue
        if tied and module is output:
            model.set_output_embeddings(loading.tied_output(module, table, own))
        elif isinstance(module, nn.Linear):
            model.set_submodule(name, loading.linear(name, module, own))
        else:
            loading.fill(name, module, own)
    model.set_input_embeddings(table)
    model.config.dtype = dtype
    attach_quantizer(model)
    return model
