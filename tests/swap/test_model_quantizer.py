"""Which quantizer a swapped model gets: its library's, by a hook, or the stand-in."""

from __future__ import annotations

import pytest
from torch import nn

import flux_kernels as fk
from flux_kernels.swap import model_quantizer
from flux_kernels.swap.model_quantizer import SwappedModelQuantizer, set_attach_hook


class Saved(nn.Sequential):
    """Stand in for a model of some library that can save itself."""

    def save_pretrained(self, path: str) -> None:
        raise AssertionError("not called")


@pytest.fixture(autouse=True)
def no_hook(monkeypatch):
    """Start without a hook, and put the one that was set back afterwards."""
    monkeypatch.setattr(model_quantizer, "_library_hook", None)


def swapped(model: nn.Module) -> nn.Module:
    fk.swap_linear(model, format="Q8_0")
    return model


@pytest.mark.parametrize("hooked", [False, True])
def test_a_model_that_no_library_takes_gets_the_stand_in(hooked):
    if hooked:
        set_attach_hook(lambda model: False)
    model = swapped(Saved(nn.Linear(64, 64)))
    assert isinstance(model.hf_quantizer, SwappedModelQuantizer) and model.is_quantized is False
    with pytest.raises(fk.GGUFError, match="cannot be written with save_pretrained yet"):
        _ = model.hf_quantizer.quantization_config.quant_method
    assert type(model.hf_quantizer.dequantize(model)[0]) is nn.Linear and not hasattr(model, "hf_quantizer")


def test_a_library_goes_first_and_the_last_hook_counts():
    taken = []
    set_attach_hook(lambda model: pytest.fail("this hook was replaced"))
    set_attach_hook(lambda model: taken.append(model) or True)
    model = swapped(Saved(nn.Linear(64, 64)))
    assert taken == [model] and not hasattr(model, "hf_quantizer")


def test_models_without_packed_layers_or_save_pretrained_are_left_alone():
    set_attach_hook(lambda model: pytest.fail("nothing to attach"))
    fk.swap_linear(Saved(nn.Linear(64, 64)))
    assert not hasattr(swapped(nn.Sequential(nn.Linear(64, 64))), "hf_quantizer")
