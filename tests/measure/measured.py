"""The embedded model on a few states: a Measurer for all tests of this folder, and requests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flux_kernels.measure.measured_model import find_source
from flux_kernels.measure.measurer import Measurer
from flux_kernels.measure.request import Request
from flux_kernels.measure.states import States
from flux_kernels.mixed.option import Option

from ..mixed.captured import embedded_pipeline, states

QKV, LINEAR1 = "double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear1.weight"
TYPES = (Option("Q8_0"), Option("Q4_K"))
# The same float32 arithmetic on batches of other sizes: sums of 24 tokens or of 1280 products differ in the last bits,
# relative to an error of 1e-2 of the velocity that is 1e-4, squared twice that.
CLOSE = 1e-3


@cache
def measurer() -> Measurer:
    return Measurer(embedded_pipeline().transformer, states())


def request_in(folder: Path, **more) -> Request:
    """Make a request into a folder, with the states that are captured already."""
    source = find_source()
    States(states(), source.name, source.sha256()).save(folder / "costs.states.safetensors")
    return Request(out=folder / "costs.csv", source=source, **{"types": TYPES, **more})
