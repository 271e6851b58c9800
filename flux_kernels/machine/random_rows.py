"""Packed rows for timing and warm-up: random codes with the scales of a plausible weight, made in no time for any format."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..formats import BlockFormat, Packed
from ..torch_backend.reference import decode_rows

RMS = 1 / 16  # of the decoded weights, within a factor of two; large enough that no half-precision scale is subnormal
_PROBE_BLOCKS = 256
# Scales that are not half-precision fields. Field: for each of its bytes in turn, the bits that stay random and those that are set.
_ODD_SCALES = {
    "MXFP4": ("e", ((0x01, 0x78),)),  # exponents of 2^-8 and 2^-7, of values whose RMS is 5.9
    "NVFP4": ("d", ((0x07, 0x08),)),  # E4M3 from 2^-6 to 2^-5
    "IQ1_M": ("scales", ((0xFF, 0x00), (0x0F, 0x00)) * 3 + ((0xFF, 0x00), (0x0F, 0x20))),  # top nibbles: the half 2^-7
}


def random_rows(fmt: BlockFormat, n: int, k: int, planes: bool = False, seed: int = 0) -> Tensor:
    """Make uint8 [n, row bytes] on the CPU: every byte random but the scales, so that weights have a mean near 0 and an RMS near RMS.

    Random bytes (not zeros) keep a GPU's power draw, and so its clock, as real weights would.
    """
    data = _random(fmt, n, fmt.row_bytes(k), seed)
    _set_scales(data, fmt, _half_scales(fmt))
    return fmt.layout.to_planes(data) if planes else data


def _random(fmt: BlockFormat, n: int, row_bytes: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (n, row_bytes), dtype=torch.uint8, generator=generator)
    if fmt.name in _ODD_SCALES:
        name, rule = _ODD_SCALES[fmt.name]
        field = next(field for field in fmt.layout.fields if field.name == name)
        keep, bits = torch.tensor(rule, dtype=torch.uint8).repeat(field.size // len(rule), 1).unbind(1)
        _field(data, fmt, field).bitwise_and_(keep).bitwise_or_(bits)
    return data


def _field(data: Tensor, fmt: BlockFormat, field) -> Tensor:
    start = fmt.layout.offsets[field.name]
    return data.view(data.shape[0], -1, fmt.type_size)[..., start : start + field.size]


def _set_scales(data: Tensor, fmt: BlockFormat, halves: tuple[float, ...]) -> None:
    for field in fmt.layout.fields:
        if field.dtype == "f16":
            _field(data, fmt, field).copy_(torch.tensor(halves[: field.count], dtype=torch.float16).view(torch.uint8))


@cache
def _half_scales(fmt: BlockFormat) -> tuple[float, ...]:
    """Find the half-precision scale, and the minimum's where there is one, that give mean 0 and the RMS: both act linearly."""
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
