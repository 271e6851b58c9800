"""The matrices of a Flux file as they lie in the model: one file tensor, such as a fused qkv, is several parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..flux.names import BFL, Source, sources
from ..formats import PLAIN_TYPES, Packed, get_format
from ..mixed.file_layout import parse_option
from ..mixed.low_rank_fit import STORED, corrected
from ..packing import quantize
from ..torch_backend.reference import dequantize

BLOCKS = ("double_blocks.*", "single_blocks.*")


@dataclass(frozen=True)
class FileTensor:
    """Hold one matrix of the file.

    Attributes:
        name: in a file of BFL names.
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

    def types(self, wanted: Iterable[str]) -> list[str]:
        """Return those of the wanted types (also "Q4_K+r16") that this tensor's rows are whole blocks of."""
        split = {name: parse_option(name) for name in wanted}
        return [
            name
            for name, (kind, rank) in split.items()
            if self.shape[1] % get_format(kind).block_size == 0 and rank <= min(self.shape)
        ]

    def packed_bytes(self, type_name: str) -> int:
        """Return the bytes of the tensor in a block type or a plain one, its correction included, without padding."""
        kind, rank = parse_option(type_name)
        fmt = PLAIN_TYPES[kind] if kind in PLAIN_TYPES else get_format(kind)
        return self.shape[0] * self.shape[1] // fmt.block_size * fmt.type_size + rank * sum(self.shape) * STORED.itemsize


def file_tensors(model: nn.Module, include: Iterable[str] = BLOCKS) -> dict[str, FileTensor]:
    """List the matrices of the file a model would be written to, by name, in the order of the file.

    Args:
        model: a FluxTransformer2DModel of plain layers.
        include: fnmatch patterns of file names; by default the matrices of the blocks.

    Raises:
        FormatError: where the model has packed layers: costs are measured against 16 bit.
    """
    packed = [name for name, _ in model.named_parameters() if name.endswith(".qweight")]
    if packed:
        raise FormatError(
            f"{packed[0].removesuffix('.qweight')} is quantized already. Costs are measured against the 16-bit model: give that."
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    grouped: dict[str, dict[str, Source]] = {}
    for parameter, source in sources(shapes, BFL).items():
        if len(shapes[parameter]) == 2 and any(fnmatchcase(source.tensor, pattern) for pattern in include):
            grouped.setdefault(source.tensor, {})[parameter] = source
    found = {}
    for name, parts in grouped.items():
        rows = max(stop for source in parts.values() for _, stop in source.rows)
        found[name] = FileTensor(name, parts, (rows, shapes[next(iter(parts))][1]))
    return found


def file_names(model: nn.Module) -> set[str]:
    """Return the names of all tensors of the file that a plain model would be written to."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {source.tensor for source in sources(shapes, BFL).values()}


def quantized(
    model: nn.Module,
    tensor: FileTensor,
    type_name: str,
    importance: Tensor | None = None,
    covariance: Tensor | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Quantize a tensor of the file and decode it again.

    Args:
        model: that holds its parts.
        tensor: of the file.
        type_name: a ggml type, or one with a low-rank correction such as "Q4_K+r16".
        importance: [K] of the quantizer's weighting, or None.
        covariance: [K, K] of the inputs, which a low-rank correction is fitted to; None fits it to `importance`.

    Returns:
        Parameter name -> (its decoded weights in its dtype, its squared weight error as a float64 scalar).
    """
    kind, rank = parse_option(type_name)
    own = {name: model.get_parameter(name).detach() for name in tensor.parts}

    def round_trip(weight: Tensor) -> Tensor:
        return dequantize(Packed(quantize(weight, kind, importance, name=tensor.name), get_format(kind)))

    if rank:
        whole = torch.cat([weight.float() for weight in own.values()])  # the order of its rows does not matter to the fit
        decoded, down, up = corrected(whole, round_trip, rank, importance if covariance is None else covariance)
        pieces = (decoded + up.float() @ down.float()).split([len(weight) for weight in own.values()])
    else:  # a row's bytes depend on that row alone, so the parts can be quantized one by one
        pieces = map(round_trip, own.values())
    found = {}
    for (name, weight), piece in zip(own.items(), pieces, strict=True):
        found[name] = piece.to(weight.dtype), (piece - weight.float()).square().sum(dtype=torch.float64)
    return found


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
