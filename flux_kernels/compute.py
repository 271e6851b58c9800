"""The compute modes as data: what each does, and what its Triton kernels and torch twin share."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import Tensor

from .errors import FormatError

COMPUTE_MODES = {
    "exact": "weights decoded in float32, rounded once to the activation dtype, float32 accumulation",
    "fp16_accumulate": "fp16 operands and accumulation, promoted to float32 every 64 of K",
    "int8": "activations and weights as int8 with scales, int32 accumulation",
}
# How many weights or activations along K share one int8 scale, where K allows it.
GROUP = 128
# How many products are summed in fp16 before the sum is added in float32.
PROMOTE_K = 64
# Calls of so few rows (modulation, time embedding) are bound by reading the weight: every mode runs them as "exact".
WEIGHT_ONLY_M = 16
# A low-rank branch: hidden [M, r] and up [N, r], both of x's dtype; in a layer down [r, K] and up [N, r].
Branch = tuple[Tensor, Tensor]
# Bytes: the alignment that kernels assume of the address of the first packed row.
WIDEST_LOAD = 16
# NVIDIA compute capability from which Triton has tensor-core code.
TENSOR_CORE_CAPABILITY = (8, 0)
HOPPER = (9, 0)  # H100, H200
# Cards whose tensor cores leave few arithmetic instructions per product, and which multiply fp16 as fast with float32 accumulation
# as with fp16: A100, H100 and H200, B200, B300, Thor.
DATACENTER = frozenset({(8, 0), (9, 0), (10, 0), (10, 3), (11, 0)})
# Layers that one compute mode for a whole model leaves as "exact": modulation, embedders and the final projection, where an
# error reaches every token and little time is spent. A map of patterns overrides this.
WEIGHT_ONLY_LAYERS = (
    *("x_embedder", "context_embedder", "time_text_embed.*", "*_embedder.*", "img_in", "txt_in", "txt_in.*", "time_embed.*"),
    *("*norm*.linear", "*modulation*", "*.img_mod.*", "*.txt_mod.*", "time_mod_proj", "distilled_guidance_layer.*"),
    *("proj_out", "final_layer.*", "all_final_layer.*", "text_fusion.projector"),
)


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype without the "torch." before it."""
    return str(dtype).removeprefix("torch.")


@cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return an NVIDIA card's compute capability, or None on other devices."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device)


def group_width(k: int) -> int:
    """Return how many of K share one int8 scale: the largest power of two up to GROUP that divides K."""
    return min(GROUP, k & -k)


def check_mode(compute: str, k: int) -> None:
    """Raise FormatError where rows of `k` weights cannot run in a compute mode."""
    if compute == "fp16_accumulate" and k % PROMOTE_K:
        raise FormatError(
            f'compute="fp16_accumulate" needs K % {PROMOTE_K} == 0, got K={k}. Use compute="exact" for this layer, by a pattern '
            'such as compute={"layer_name": "exact", "*": "fp16_accumulate"}.'
        )


def mode_of_call(compute: str, m: int) -> str:
    """Return the mode in which a call of `m` rows runs.

    Calls of few rows are exact: only reading the weight counts in them.
    """
    return compute if m > WEIGHT_ONLY_M else "exact"


def compute_of_layer(compute: str, names: Iterable[str]) -> str:
    """Return the mode of a layer of these names under one mode for the whole model."""
    spared = any(fnmatchcase(name, pattern) for name in names for pattern in WEIGHT_ONLY_LAYERS)
    return "exact" if spared else compute


def join(first: Branch | None, second: Branch) -> Branch:
    """Put two branches side by side: their ranks add up."""
    if first is None:
        return second
    return torch.cat([first[0], second[0]], 1), torch.cat([first[1], second[1]], 1)


def outlier_branch(x: Tensor, outliers: tuple[Tensor, Tensor]) -> Branch:
    """Return the branch of the input channels that stay in x's dtype.

    `outliers` are (index [k], weight [N, k]), x is [M, K].
    """
    index, weight = outliers
    return x.index_select(1, index), weight.to(x.dtype)
