"""Where a model's bytes are, by format, and holding them in page-locked memory."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from ..compute import dtype_name
from ..errors import BackendUnavailable
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
        count[packed.get(id(tensor)) or dtype_name(tensor.dtype)] += tensor.numel() * tensor.element_size()
    return {**dict(count.most_common()), "total": count.total()}


def pin_memory(model: nn.Module) -> int:
    """Move a model's CPU parameters and buffers into page-locked memory, in place, one tensor at a time.

    For models that are then offloaded: sequential offloading and group offloading with streams copy from where the tensors
    lie. Packed rows are arranged as the GPU wants them first. Mapped files are read into memory; page-locked memory cannot be
    swapped out, so leave room for the system. `.to("cpu")`, and with it model offloading, makes pageable copies again.

    Returns:
        Bytes in page-locked memory.

    Raises:
        BackendUnavailable: where torch sees no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "Page-locked memory is for copies to a GPU, and torch sees no CUDA GPU here. Leave pin_memory out; mapped weights "
            "need no memory of their own."
        )
    for module in model.modules():
        if isinstance(module, GGUFLinear):
            module.arrange()
    total = 0
    for tensor in {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values():
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.pin_memory()
            total += tensor.numel() * tensor.element_size()
    return total
