"""Names and layers without the adapters around them."""

from __future__ import annotations

import pytest
from torch import nn

from flux_kernels.layers.adapters import adapter_parts, base_layer_of, is_merged_into, replace_base_layer, without_adapters


class Around(nn.Module):
    """Stand in for peft's layer: something of its own around a base layer."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer, self.lora_A, self.merged = base, nn.ModuleDict({"one": nn.Linear(4, 2)}), False


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("blocks.0.to_q", "blocks.0.to_q"),
        ("blocks.0.to_q.base_layer", "blocks.0.to_q"),
        ("blocks.0.to_q.base_layer.base_layer", "blocks.0.to_q"),
        ("_orig_mod.blocks.0.to_q.base_layer", "blocks.0.to_q"),
        ("blocks.0._orig_mod.to_q", "blocks.0.to_q"),
        ("blocks.base_layer_norm.linear", "blocks.base_layer_norm.linear"),
        ("base_layer", "base_layer"),
        ("", ""),
    ],
)
def test_names_lose_what_adapters_and_compilers_add(name, plain):
    assert without_adapters(name) == plain


def test_what_is_inside_and_what_belongs_to_the_adapter():
    layer = nn.Linear(4, 4)
    inner = Around(layer)
    model = nn.Sequential(Around(inner))
    assert base_layer_of(model[0]) is layer and base_layer_of(layer) is layer
    parts = adapter_parts(model)
    assert layer not in parts and inner not in parts
    assert {inner.lora_A["one"], model[0].lora_A["one"]} <= parts
    assert not is_merged_into(layer, inner)
    inner.merged = True
    assert is_merged_into(layer, inner) and not is_merged_into(inner, model[0])
    new = nn.Linear(4, 4)
    replace_base_layer(model, "0", new)
    assert inner.base_layer is new and model[0].base_layer is inner
