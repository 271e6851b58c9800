"""Random packed rows: weights are finite and of a plausible size, and the codes are all in use."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.formats import FORMATS
from flux_kernels.machine.random_rows import RMS, random_rows, random_weight
from flux_kernels.torch_backend import reference


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_finite_and_of_a_plausible_size(name):
    fmt = FORMATS[name]
    weight = reference.dequantize(random_weight(fmt, 64, 1024, planes=False, seed=3)).double()
    rms = weight.pow(2).mean().sqrt().item()
    assert weight.isfinite().all()
    assert RMS / 2 < rms < 2 * RMS
    assert weight.mean().abs() < 0.5 * rms  # the codes -1 to 2 of TQ2_0 and Q2_0 have a mean of 0.41 RMS
    assert weight.abs().max() < 16 * rms
    assert weight.unique().numel() > 1


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.planes])
def test_planes_hold_the_same_weights(name):
    fmt = FORMATS[name]
    rows, planes, wanted = (random_weight(fmt, 4, 512, planes, seed=1) for planes in (False, True, None))
    assert torch.equal(reference.dequantize(rows), reference.dequantize(planes))
    assert wanted.planes and torch.equal(wanted.data, planes.data) and not torch.equal(rows.data, planes.data)


def test_rows_repeat_for_a_seed_and_differ_between_seeds():
    first, again, other = (random_rows(FORMATS["Q4_K"], 4, 512, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
