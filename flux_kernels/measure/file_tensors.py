"""The matrices of a file as parameters of the model: a fused qkv is three of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..formats import Packed, get_format
from ..mixed.low_rank_fit import corrected
from ..mixed.option import Option
from ..models.model_class import architecture_of_model, parameter_shapes
from ..models.names import Source, sources, stored_shapes
from ..models.types import BLOCK, tensor_kind
from ..packing import quantize
from ..torch_backend.reference import dequantize


@dataclass(frozen=True)
class FileTensor:
    """Hold one matrix of the file.

    Attributes:
        name: in a file of original names.
        parts: parameter names of the model and where their rows lie in the file's tensor.
        shape: (N, K) of the file's tensor.
    """

    name: str
    parts: dict[str, Source]
    shape: tuple[int, int]

    @property
    def module(self) -> str:
        """Name of the first module that holds rows of it; all of them have the same input."""
        return next(iter(self.parts)).removesuffix(".weight")


def file_tensors(model: nn.Module) -> dict[str, FileTensor]:
    """List the blocks' matrices of the file a model would be written to, in the order of the file.

    Args:
        model: a transformer of plain layers.

    Raises:
        FormatError: where the model is of no known architecture, or has packed layers: costs are measured against 16 bit.
    """
    architecture = architecture_of_model(model)
    if architecture is None:
        raise FormatError(f"Costs are measured of transformers that flux_kernels knows, got {type(model).__name__}.")
    packed = [name for name, _ in model.named_parameters() if name.endswith(".qweight")]
    if packed:
        raise FormatError(
            f"{packed[0].removesuffix('.qweight')} is quantized already. Costs are measured against the 16-bit model: give that."
        )
    shapes = parameter_shapes(model)
    grouped: dict[str, dict[str, Source]] = {}
    located = sources(architecture, shapes, architecture.main_naming)
    stored = stored_shapes(located, shapes)
    for parameter, source in located.items():
        if tensor_kind(source.tensor, stored[source.tensor], architecture) == BLOCK:
            grouped.setdefault(source.tensor, {})[parameter] = source
    tensors = {}
    for name, parts in grouped.items():
        rows = max(stop for source in parts.values() for _, stop in source.rows)
        tensors[name] = FileTensor(name, parts, (rows, shapes[next(iter(parts))][1]))
    return tensors


def quantized(
    model: nn.Module,
    tensor: FileTensor,
    option: Option,
    importance: Tensor | None = None,
    covariance: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantize a tensor of the file and decode it again.

    Args:
        model: that holds its parts.
        tensor: of the file.
        option: a block type, with or without a low-rank correction.
        importance: [K] of the quantizer's weighting, or None.
        covariance: [K, K] of the inputs, which a low-rank correction is fitted to; None fits it to `importance`.

    Returns:
        Parameter name -> (its decoded weights in its dtype, its squared weight error as a float64 scalar).
    """
    fmt = get_format(option.type)
    own = {name: model.get_parameter(name).detach() for name in tensor.parts}

    def round_trip(weight: Tensor) -> Tensor:
        return dequantize(Packed(quantize(weight, fmt, importance, name=tensor.name), fmt))

    if option.rank:
        # The order of its rows does not matter to the fit.
        whole = torch.cat([weight.float() for weight in own.values()])
        decoded, down, up = corrected(whole, round_trip, option.rank, importance if covariance is None else covariance)
        pieces = (decoded + up.float() @ down.float()).split([len(weight) for weight in own.values()])
    else:
        # A row's bytes depend on that row alone, so the parts can be quantized one by one.
        pieces = tuple(map(round_trip, own.values()))
    weights = {}
    for (name, weight), piece in zip(own.items(), pieces, strict=True):
        weights[name] = piece.to(weight.dtype), (piece - weight.float()).square().sum(dtype=torch.float64)
    return weights


@contextmanager
def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other weights into a model's parameters, and the own ones back at the end."""
    own = {name: model.get_parameter(name).data for name in weights}
    try:
        for name, weight in weights.items():
            model.get_parameter(name).data = weight
        yield
    finally:
        for name, weight in own.items():
            model.get_parameter(name).data = weight
