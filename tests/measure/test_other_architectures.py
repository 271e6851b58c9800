"""Measuring any architecture: stages are the model's own forward pass, costs those of a plain run."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.formats import Packed, get_format
from flux_kernels.measure.file_tensors import file_tensors
from flux_kernels.measure.measurer import Measurer
from flux_kernels.measure.stages import Stages
from flux_kernels.measure.state_inputs import as_arguments, call_inputs, velocity_of
from flux_kernels.measure.states import State, States
from flux_kernels.mixed.option import Option
from flux_kernels.packing import quantize
from flux_kernels.torch_backend.reference import dequantize

from ..models.cases import CASES, Case

all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@torch.no_grad()
def states_of(case: Case, model, count: int = 2) -> list[State]:
    items = []
    for number in range(count):
        inputs = case.inputs(torch.Generator().manual_seed(number))
        tensors, others = call_inputs(model, (), {**inputs, "return_dict": False})
        velocity = velocity_of(model(**inputs, return_dict=False)).contiguous()
        facts = dict(prompt="p", seed=number, width=64, height=64, step=number, steps=2, sigma=0.5, dsigma=0.5)
        items.append(State(tensors, velocity, **facts, others=others))
    return items


@all_cases
@torch.no_grad()
def test_stages_are_the_forward_pass(case):
    model = case.random_model()
    stages = Stages(model)
    for state in states_of(case, model):
        hidden = stages.embed(as_arguments(state.inputs, state.others))
        for stage in range(1, stages.last):
            hidden = stages.block(stage, hidden)
        assert torch.equal(stages.velocity(hidden), state.velocity)
        assert hidden.tokens().dim() == 3
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@all_cases
def test_states_come_back_from_their_file(tmp_path, case):
    model = case.random_model()
    States(states_of(case, model), "m", "s").save(tmp_path / "states.safetensors")
    for got, put in zip(States.load(tmp_path / "states.safetensors").items, states_of(case, model), strict=True):
        assert got.facts() == put.facts() and got.inputs.keys() == put.inputs.keys()
        assert all(torch.equal(got.inputs[name], put.inputs[name]) for name in put.inputs)


@all_cases
def test_a_cost_is_that_of_a_plain_run(case):
    """The first, a middle and the last matrix of the file, each against a run of the whole model."""
    model = case.random_model()
    items = states_of(case, model)
    measurer = Measurer(model, items)
    assert set(measurer.importance) == set(file_tensors(model))
    names, costs = list(file_tensors(model)), []
    for name in (names[0], names[len(names) // 2], names[-1]):
        row = measurer.measure_one(name, Option("Q4_0"))
        other = case.random_model()
        with torch.no_grad():
            for parameter in file_tensors(model)[name].parts:
                weight, fmt = other.get_parameter(parameter), get_format("Q4_0")
                weight.copy_(dequantize(Packed(quantize(weight, fmt, measurer.channel_weights(name)), fmt)))
            pairs = [
                (velocity_of(other(**as_arguments(state.inputs, state.others), return_dict=False)), state) for state in items
            ]
        error = sum(state.dsigma**2 * (got - state.velocity).double().square().mean() for got, state in pairs)
        signal = sum(state.dsigma**2 * state.velocity.double().square().mean() for _, state in pairs)
        assert row.cost == pytest.approx((error / signal).item(), rel=1e-3)
        costs.append(row.cost)
    # What the last block does to text tokens changes no picture.
    assert sum(cost > 0 for cost in costs) >= 2
