"""Test the sentences about whole steps: ratios of rows, nothing where spreads overlap, reasons."""

from __future__ import annotations

from flux_kernels.benchmark.step.timing import COLUMNS
from flux_kernels.benchmark.verdict import step_verdict


def row(provider, milliseconds, gigabytes=6.9, spread=0.01, **more):
    """Make a row; `spread` is how far p20 and p80 lie from the median, as a share of it."""
    base = dict.fromkeys(COLUMNS, "") | dict(format="Q4_K", provider=provider, what="step", size="1024x1024")
    base |= dict(weight_bytes=str(int(gigabytes * 1e9)))
    if milliseconds:
        times = (milliseconds * (1 - spread), milliseconds, milliseconds * (1 + spread))
        base |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), map(str, times)))
    return base | more


def test_ratios_and_bytes_come_from_the_rows():
    rows = [row("torch", 1000, 24.0), row("ours exact", 1030), row("ours int8", 500), row("diffusers", 2060)]
    (sentence,) = step_verdict(rows)
    assert sentence == (
        "One whole step at 1024x1024 with Q4_K takes 1.03 times as long as the unquantized model, and its weights are 17.1 GB "
        "smaller; int8 mode is 2.00 times as fast as the unquantized model; exact mode is 2.00 times as fast as "
        "diffusers' GGUF layers."
    )


def test_a_slower_side_is_called_slower():
    (sentence,) = step_verdict([row("torch", 1000, 24.0), row("ours exact", 1500), row("ours int8", 3000)])
    assert "takes 1.50 times" in sentence and "int8 mode takes 3.00 times as long as the unquantized model" in sentence


def test_overlapping_spreads_are_no_difference_and_few_repeats_no_comparison():
    (sentence,) = step_verdict(
        [row("torch", 1000, 24.0, 0.1), row("ours exact", 1100, spread=0.1), row("ours int8", 500, repeats=2)]
    )
    assert "with Q4_K: no difference seen from the unquantized model, and its weights" in sentence
    unknown = "int8 mode: not compared with the unquantized model (spread unknown with fewer than 3 repeats)"
    assert unknown in sentence and "times" not in sentence


def test_what_is_saved_is_told_with_what_it_is_less_than():
    (sentence,) = step_verdict([row("torch", 1000, 24.0, dtype="float32"), row("ours exact", 1030, dtype="float32")])
    assert "its weights are 17.1 GB smaller than in float32" in sentence


def test_what_is_missing_is_said_with_the_reason():
    wrong = row("ours int8", None, note="wrong result: relative error 0.9, at most 0.1")
    sentences = step_verdict([row("torch", None, 24.0, note="out of memory"), row("ours exact", 1000), wrong])
    assert "takes 1000 ms in exact mode, with no unquantized model" in sentences[0]
    assert sentences[1:] == ["No time is given for: Q4_K, ours int8, step (wrong result: relative error 0.9, at most 0.1)."]
    offloads = [
        row("torch", None, what="denoising, model offload", format=name, note="needs a GPU") for name in ("Q4_K", "Q8_0")
    ]
    assert step_verdict(offloads) == [
        "A denoising run of the embedded model with model offload was not measured with Q4_K, Q8_0: needs a GPU."
    ]
    assert "has no time in exact mode" in step_verdict([row("torch", 1000), row("ours exact", None, note="out of memory")])[0]
    assert step_verdict([]) == []


def test_a_stand_in_for_the_unquantized_model_is_called_one():
    rows = [row("torch", 1000, 24.0, note="23.8 GB does not fit: one double and one single block"), row("ours exact", 1200)]
    assert "which does not fit here and ran on the weights of two blocks" in step_verdict(rows)[0]
