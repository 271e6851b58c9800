"""memory_footprint: where a model's bytes are, by format."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .embedding import GGUFEmbedding
from .linear import GGUFLinear


def memory_footprint(model: nn.Module) -> dict[str, int]:
    """Sum the bytes of a model's parameters and buffers by format.

    Args:
        model: any module; tensors that several modules share count once.

    Returns:
        ggml type name or torch dtype (such as "bfloat16") -> bytes, largest first, and "total".
    """
    packed = {id(module.qweight): module.format for module in model.modules() if isinstance(module, GGUFLinear | GGUFEmbedding)}
    count: Counter[str] = Counter()
    for tensor in {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values():
        count[packed.get(id(tensor)) or dtype_name(tensor)] += tensor.numel() * tensor.element_size()
    return {**dict(count.most_common()), "total": count.total()}


def dtype_name(tensor) -> str:
    """Name a tensor's dtype without the "torch." before it."""
    return str(tensor.dtype).removeprefix("torch.")
