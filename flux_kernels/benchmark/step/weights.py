"""Make the weights of a whole step, packed or not, and the models on them, a model a side.

Packed rows are random where none are given: those of the first double and the first single block are made, every further
block has a copy with the rows moved on by one, so that its bytes are its own in memory and its matrix differs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compute import compute_of_layer
from ...formats import BlockFormat, Packed
from ...machine.random_rows import random_rows
from ...packing import quantizer
from ...torch_backend import reference
from ..names import OURS, TORCH, way_of
from ..providers import PROVIDERS, Problem, own_layer
from .inputs import StepConfig
from .model import StepModel

T = TypeVar("T")
_INDEX = re.compile(r"(?<=blocks\.)\d+")


@dataclass(frozen=True)
class StepWeights:
    """Hold a transformer's weights by module name: packed in the blocks, plain around them, norms."""

    config: StepConfig
    fmt: BlockFormat
    dtype: torch.dtype
    packed: dict[str, Problem]
    plain: dict[str, tuple[Tensor, Tensor]]
    norms: dict[str, Tensor]

    def nbytes(self, unquantized: bool = False) -> int:
        """Return the bytes of all weights, packed or as they would be unquantized."""
        blocks = sum(_packed_bytes(problem, self.dtype if unquantized else None) for problem in self.packed.values())
        around = [*(tensor for pair in self.plain.values() for tensor in pair), *self.norms.values()]
        return blocks + sum(tensor.nbytes for tensor in around)

    def first_blocks(self) -> StepWeights:
        """Return the weights of a model of the first double and the first single block, the same tensors."""
        config = replace(self.config, num_layers=1, num_single_layers=1)
        names = linear_shapes(config).keys() | _norms(config).keys()

        def kept(weights: dict[str, T]) -> dict[str, T]:
            return {name: weight for name, weight in weights.items() if name in names}

        return replace(self, config=config, packed=kept(self.packed), plain=kept(self.plain), norms=kept(self.norms))

    def to_file_order(self) -> None:
        """Undo field planes weight by weight; models made before must be gone, or both stay in memory."""
        for name, problem in self.packed.items():
            self.packed[name] = replace(problem, weight=problem.weight.arranged(planes=False))


def _packed_bytes(problem: Problem, unquantized: torch.dtype | None) -> int:
    weight = problem.weight
    weights = weight.data.nbytes if unquantized is None else weight.n * weight.k * unquantized.itemsize
    return weights + problem.bias.nbytes


def make_weights(
    config: StepConfig, fmt: BlockFormat, device: torch.device, dtype: torch.dtype, stored: Mapping[str, Tensor] | None = None
) -> StepWeights:
    """Make the weights of a whole step on `device`.

    Args:
        config: sizes; K of every layer inside the blocks must be whole blocks of `fmt`.
        fmt: type of the linear layers inside the blocks; those around them have `dtype`, as in published files.
        stored: a state dict to quantize, or None for random weights.
    """
    weights = StepWeights(config, fmt, dtype, {}, {}, {})
    planes = fmt.planes and device.type != "cpu"
    generator = torch.Generator().manual_seed(0)
    for name, (n, k) in linear_shapes(config).items():
        bias = 0.1 * torch.randn(n, generator=generator) if stored is None else stored[f"{name}.bias"]
        bias = bias.to(device, dtype)
        if "blocks." in name:
            weights.packed[name] = Problem(Packed(_rows(weights, name, n, k, planes, device, stored), fmt, planes), bias, dtype)
        else:
            spread = 1 / math.sqrt(k)
            plain = spread * torch.randn(n, k, generator=generator) if stored is None else stored[f"{name}.weight"]
            weights.plain[name] = (plain.to(device, dtype), bias)
    for name, size in _norms(config).items():
        weights.norms[name] = (torch.ones(size) if stored is None else stored[f"{name}.weight"]).to(device, dtype)
    return weights


def _rows(weights: StepWeights, name: str, n: int, k: int, planes: bool, device: torch.device, stored) -> Tensor:
    fmt, first, index = weights.fmt, first_block(name), _INDEX.search(name)
    if stored is not None:
        weight = stored[f"{name}.weight"].float()
        # libggml's quantizers of some types insist on an importance.
        even = None if fmt.quantize is not None else torch.ones_like(weight[:1]).expand_as(weight)
        return Packed(quantizer(fmt)(weight, even), fmt).arranged(planes).data.to(device)
    if first in weights.packed and index is not None:
        return weights.packed[first].weight.data.roll(int(index[0]), 0)
    return random_rows(fmt, n, k, planes, seed=len(weights.packed)).to(device)


def first_block(name: str) -> str:
    """Return the name of the same layer in the first block of its kind."""
    return _INDEX.sub("0", name)


def _empty_model(config: StepConfig) -> StepModel:
    with torch.device("meta"):
        return StepModel(config)


def linear_shapes(config: StepConfig) -> dict[str, tuple[int, int]]:
    """Return name -> (N, K) of every linear layer."""
    return {name: (linear.out_features, linear.in_features) for name, linear in _empty_model(config).linears().items()}


def _norms(config: StepConfig) -> dict[str, int]:
    modules = _empty_model(config).named_modules()
    return {name: module.weight.numel() for name, module in modules if isinstance(module, nn.RMSNorm)}


class _Calling(nn.Module):
    """Make a layer of a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def build(weights: StepWeights, provider: str, first_blocks_only: bool = False) -> StepModel:
    """Build one provider's model; only "torch" and, with field planes, "diffusers" need more memory.

    Args:
        provider: "torch", "ours " and a compute mode, or another of PROVIDERS.
        first_blocks_only: whether the first block of each kind stands for all (a model that would not fit otherwise).

    Raises:
        Unavailable: where the provider cannot run here.
    """
    layers: dict[str, nn.Module] = {}

    def make(name: str) -> nn.Module:
        key = first_block(name) if first_blocks_only else name
        if key not in layers:
            layers[key] = make_layer(provider, weights.packed[key], name)
        return layers[key]

    return _assemble(weights, make)


def _assemble(weights: StepWeights, make: Callable[[str], nn.Module], dtype: torch.dtype | None = None) -> StepModel:
    model = _empty_model(weights.config)
    for name in model.linears():
        plain = (tensor.to(dtype or tensor.dtype) for tensor in weights.plain.get(name, ()))
        model.set_submodule(name, make(name) if name in weights.packed else _linear(*plain))
    for name, weight in weights.norms.items():
        model.get_submodule(name).weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
    return model.eval()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias))
    return linear


def make_layer(provider: str, problem: Problem, name: str) -> nn.Module:
    """Make one provider's layer for a packed weight; `name` decides whether a mode spares it.

    Raises:
        Unavailable: where the provider cannot run here.
    """
    if provider == TORCH:
        return _linear(reference.dequantize(problem.weight, problem.dtype), problem.bias)
    if not provider.startswith(OURS):
        layer = PROVIDERS[provider].make(problem)
        return layer if isinstance(layer, nn.Module) else _Calling(layer)
    return own_layer(problem, compute_of_layer(way_of(provider), [name]))


def build_reference(
    weights: StepWeights, dtype: torch.dtype = torch.float32, noise: float = 0.0, first_blocks_only: bool = False
) -> StepModel:
    """Build the model that decodes its weights without Triton at every call: in float32, the oracle.

    Args:
        dtype: of activations and decoded weights.
        noise: relative RMS of noise added to what each packed layer returns: how far such errors carry through a step.
        first_blocks_only: as in `build`.
    """
    generator = torch.Generator(next(iter(weights.packed.values())).weight.data.device).manual_seed(0)

    def make(name: str) -> nn.Module:
        problem = weights.packed[first_block(name) if first_blocks_only else name]

        def call(x: Tensor) -> Tensor:
            weight = reference.dequantize(problem.weight, dtype)
            y = F.linear(x, weight, problem.bias.to(dtype))
            if not noise:
                return y
            size = noise * y.float().square().mean().sqrt()
            return (y + size * torch.randn(y.shape, generator=generator, device=y.device)).to(dtype)

        return _Calling(call)

    return _assemble(weights, make, dtype)
