"""Test that the step in plain torch is FLUX.1's: diffusers' numbers, and the calls of the tables."""

from __future__ import annotations

from collections import Counter
from inspect import signature

import pytest
import torch
from torch import nn

from flux_kernels.benchmark.step.inputs import StepConfig, step_inputs
from flux_kernels.benchmark.step.model import StepModel
from flux_kernels.models.calls import STEPS, image_tokens, step_calls

from ..conftest import TINY_FLUX
from .whole_step_calls import whole_step

CPU = torch.device("cpu")


def test_the_step_is_that_of_diffusers():
    """Compare in float64, but for float32 parts that both have: norms' and rotation's roundings differ."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.FluxTransformer2DModel(**TINY_FLUX).double().eval()
    # Norms' weights are ones and biases small; a swap of two would not be seen.
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    config = StepConfig.read(TINY_FLUX)
    ours = StepModel(config).double()
    ours.load_state_dict(theirs.state_dict())
    inputs = step_inputs(config, 64, 96, 2, CPU, torch.float64, text=7)
    with torch.no_grad():
        expected = theirs(
            hidden_states=inputs.image,
            encoder_hidden_states=inputs.text,
            pooled_projections=inputs.pooled,
            timestep=inputs.time,
            guidance=inputs.guidance,
            txt_ids=inputs.positions[:7],
            img_ids=inputs.positions[7:],
        ).sample
        got = ours(inputs)
    # The angles are rounded to float32 alike; what may differ is the order of float32 operations there: 2^-24 each, a
    # handful a block, four blocks, each followed by layers that pass errors on at most about tenfold.
    assert ((got - expected).norm() / expected.norm()).item() < 4 * 10 * 2**-24 * 10
    assert expected.std() > 0.1


class Recorder(nn.Module):
    """Stand for a linear layer: notes its call and returns the shape that the layer would."""

    def __init__(self, n: int, k: int, calls: Counter):
        super().__init__()
        self.n, self.k, self.calls = n, k, calls

    def forward(self, x):
        assert x.shape[-1] == self.k
        self.calls[x.numel() // self.k, self.n, self.k] += 1
        return x.new_empty(*x.shape[:-1], self.n)


@pytest.mark.parametrize("size", STEPS)
def test_the_calls_are_those_of_the_tables(size):
    """Every linear call of FLUX.1-dev at its true size, on the meta device."""
    recorded: Counter = Counter()
    meta = torch.device("meta")
    with meta:
        model = StepModel().to(torch.bfloat16)
    for name, linear in model.linears().items():
        model.set_submodule(name, Recorder(linear.out_features, linear.in_features, recorded))
    inputs = step_inputs(StepConfig(), **{"batch": 1, **STEPS[size]}, device=meta, dtype=torch.bfloat16)
    assert model(inputs).shape == (inputs.image.shape[0], inputs.image.shape[1], 64)
    listed: Counter = Counter()
    for call in whole_step(**STEPS[size]):
        listed[call.m, call.n, call.k] += call.calls
    assert recorded == listed and recorded.total() == 504


def test_a_picture_is_named_by_its_width_first():
    """A token's position is (0, row, column): a wide picture has more columns."""
    assert list(signature(step_calls).parameters)[:2] == list(signature(image_tokens).parameters) == ["width", "height"]
    positions = step_inputs(StepConfig.read(TINY_FLUX), 96, 64, 1, CPU, torch.float32, text=7).positions[7:]
    assert positions.amax(0).tolist() == [0, 64 // 16 - 1, 96 // 16 - 1]
