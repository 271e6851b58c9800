"""Make packed rows for timing and warm-up: random codes with the scales of a plausible weight.

It takes no time, for any format.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..formats import BlockFormat, Field, Packed
from ..torch_backend.reference import decode_rows

# Of the decoded weights, within a factor of two; large enough that no half-precision scale is subnormal.
RMS = 1 / 16
_PROBE_BLOCKS = 256


def random_rows(fmt: BlockFormat, n: int, k: int, planes: bool = False, seed: int = 0) -> Tensor:
    """Make uint8 [n, row bytes] on the CPU, every byte random but those of scales.

    The decoded weights have a mean near 0 and an RMS near RMS. A scale is an f16 field, or has `scale_bits` that say what it
    may be. Random bytes (not zeros) keep a GPU's power draw, and so its clock, as real weights would.
    """
    data = _random(fmt, n, fmt.row_bytes(k), seed)
    _set_scales(data, fmt, _half_scales(fmt))
    return Packed(data, fmt).arranged(planes).data


def random_weight(
    fmt: BlockFormat,
    n: int,
    k: int,
    planes: bool | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Packed:
    """Make a weight [N, K] of `random_rows` on a device.

    It is arranged as kernels want it unless `planes` says otherwise.
    """
    planes = fmt.planes if planes is None else planes
    return Packed(random_rows(fmt, n, k, planes, seed).to(device), fmt, planes)


def _random(fmt: BlockFormat, n: int, row_bytes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (n, row_bytes), dtype=torch.uint8, generator=generator)
    for field in fmt.layout.fields:
        if field.scale_bits:
            pairs = torch.tensor(field.scale_bits, dtype=torch.uint8).repeat(field.size // len(field.scale_bits), 1)
            any_value, is_set = pairs.unbind(1)
            _field(data, fmt, field).bitwise_and_(any_value).bitwise_or_(is_set)
    return data


def _field(data: Tensor, fmt: BlockFormat, field: Field) -> Tensor:
    start = fmt.layout.offsets[field.name]
    return data.view(data.shape[0], -1, fmt.type_size)[..., start : start + field.size]


def _set_scales(data: Tensor, fmt: BlockFormat, halves: tuple[float, ...]) -> None:
    for field in fmt.layout.fields:
        if field.dtype == "f16":
            _field(data, fmt, field).copy_(torch.tensor(halves[: field.count], dtype=torch.float16).view(torch.uint8))


@cache
def _half_scales(fmt: BlockFormat) -> tuple[float, ...]:
    """Find the half-precision scale, and that of the minimum, which give mean 0 and the RMS.

    Both act linearly.
    """
    count = max((field.count for field in fmt.layout.fields if field.dtype == "f16"), default=0)
    if not count:
        return ()
    parts = []
    for which in range(count):
        data = _random(fmt, 1, _PROBE_BLOCKS * fmt.type_size, 0)
        _set_scales(data, fmt, tuple(float(which == other) for other in range(count)))
        parts.append(decode_rows(Packed(data, fmt)).double())
    ratio = -(parts[0].mean() / parts[1].mean()).item() if count == 2 else 0.0
    scale = RMS / (parts[0] + ratio * parts[-1] * (count == 2)).pow(2).mean().sqrt().item()
    return (scale, scale * ratio)[:count]
