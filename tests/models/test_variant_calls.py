"""The linear calls of any model: what reaches a layer, and FLUX.1-dev's as typed by hand."""

from __future__ import annotations

from collections import Counter

import diffusers
import pytest
import torch
from torch import nn

from flux_kernels.compute import compute_of_layer
from flux_kernels.errors import FormatError
from flux_kernels.models.architectures import ARCHITECTURES
from flux_kernels.models.calls import step_calls
from flux_kernels.models.names import block_of, tensor_class
from flux_kernels.models.variant_calls import BATCH, BOTH, IMAGE, TEXT, VARIANTS, derived_calls, reaching, variant_calls

from .cases import CASES

ROWS = {row.name: row for row in ARCHITECTURES}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_flux1_dev_has_the_calls_that_were_typed_by_hand():
    for size in ({}, {"width": 1360, "height": 768}, {"batch": 2}):
        typed, derived = Counter(), Counter()
        for call in step_calls(**size):
            typed[call.m, call.n, call.k] += call.calls
        for call in derived_calls("flux1-dev", **size):
            derived[call.m, call.n, call.k] += call.calls
        assert derived == typed


@all_cases
@torch.no_grad()
def test_rows_say_what_reaches_each_layer(case):
    """Run the small model and compare the rows that each linear layer of its blocks got."""
    model = getattr(diffusers, case.model_class)(**case.config).eval()
    reached: dict[str, set[int]] = {}

    def note(name):
        return lambda _module, arguments: reached.setdefault(name, set()).add(arguments[0].numel() // arguments[0].shape[-1])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and block_of(f"{name}."):
            module.register_forward_pre_hook(note(name))
    inputs = case.inputs(torch.Generator().manual_seed(0))
    model(**inputs, return_dict=False)
    batch = next((len(value) for value in inputs.values() if isinstance(value, list) and isinstance(value[0], torch.Tensor)), 1)
    by_kind: dict[str, set[int]] = {}
    for name, rows in reached.items():
        layer = tensor_class(f"{name}.").rstrip(".")
        kind, _, times = reaching(ROWS[case.name].tokens, layer).partition("*")
        by_kind.setdefault(kind, set()).update(count / int(times or 1) for count in rows)
    assert by_kind.get(BATCH, {batch}) == {batch}
    for kind in (IMAGE, BOTH):
        assert len(by_kind.get(kind, {1})) == 1, by_kind
    if {IMAGE, TEXT, BOTH} <= by_kind.keys():
        assert {a + b for a in by_kind[IMAGE] for b in by_kind[TEXT]} >= by_kind[BOTH]


@pytest.mark.parametrize("slug", VARIANTS)
def test_every_published_model_has_calls(slug):
    calls = variant_calls(slug)
    row, variant = VARIANTS[slug]
    assert max(call.m for call in calls) >= row.picture_tokens(variant) and all(call.calls > 0 for call in calls)
    assert calls == sorted(calls, key=lambda call: -call.flops * call.calls)
    assert len({call.where for call in calls}) == len(calls)


def test_an_unknown_model_is_named():
    with pytest.raises(FormatError, match="Unknown model 'flux9'. Known: flux1-dev, flux1-schnell, flux2-dev"):
        variant_calls("flux9")


@all_cases
def test_one_mode_for_a_whole_model_leaves_out_what_reaches_every_token(case):
    """Embedders, modulation and the last projection stay exact; the blocks' other layers take the mode."""
    row = ROWS[case.name]
    model = getattr(diffusers, case.model_class)(**case.config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            block = block_of(f"{name}.")
            layer = tensor_class(f"{name}.").rstrip(".")
            inside = block is not None and reaching(row.tokens, layer) != BATCH
            assert compute_of_layer("int8", [name]) == ("int8" if inside else "exact"), name


@pytest.mark.parametrize(
    ("name", "changed", "variant"),
    [
        ("Qwen-Image", {"num_layers": 20}, "Qwen-Image"),
        ("FLUX.2", {"num_layers": 3, "guidance_embeds": False, "num_attention_heads": 32}, "FLUX.2-klein-9B"),
        ("FLUX.1", {"num_layers": 8, "guidance_embeds": False}, "FLUX.1-schnell"),
    ],
)
def test_a_model_of_another_size_takes_the_settings_that_fit_best(name, changed, variant):
    published = next(row for row in ROWS[name].variants if row.name == variant)
    assert ROWS[name].settings({**published.config, **changed}).name == variant
