"""The model that predicts from compiled code: its rates are the vendors', its calls are those that the library runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.aot.cards import CARDS, tensor_clocks
from bench.aot.model import MODELS, Case, Model, Record, call_ms, choice_of, clocks, predict, torch_ms
from bench.calibrate import RECORD, calibrate
from flux_kernels.benchmark.record import read_csv
from flux_kernels.flux.calls import Call, step_calls

LINEAR = Call(4608, 12288, 3072, 1, "single proj_mlp")
BY_NAME = {model.name: model for model in MODELS}


@pytest.fixture(scope="module")
def record() -> Record:
    return Record(read_csv(RECORD))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize(
    "rate, peak", [("fp32_sums", "bf16_tflops"), ("fp16_sums", "fp16_tflops"), ("int8_products", "int8_tops")]
)
def test_a_rate_times_multiprocessors_and_clock_is_the_vendor_s_peak(model: Model, rate: str, peak: str):
    """Data sheets round to three digits: 1 % apart is another rate, 1 in 200 is rounding."""
    tera = 2 * getattr(CARDS[model.capability], rate) * model.processors * model.ghz / 1e3
    assert tera == pytest.approx(getattr(model, peak), rel=0.005)


@pytest.mark.parametrize(
    "opcode, capability, expected",
    [
        ("HMMA.16816.F32.BF16", 80, 8),
        ("HMMA.16816.F16", 80, 8),  # no faster unit for fp16 sums on a data-center card
        ("IMMA.16832.S8.S8.SAT", 80, 8),  # 4,096 products at 512 a clock and quadrant
        ("HMMA.16816.F32", 86, 32),
        ("HMMA.16816.F16", 86, 16),
        ("IMMA.16832.S8.S8.SAT", 86, 16),
        ("HGMMA.64x128x16.F32.BF16", 90, 64),
        ("HGMMA.64x64x16.F16", 90, 32),
        ("IGMMA.64x128x32.S8.S8", 90, 64),
        ("IMMA.16832.S8.S8.SAT", 120, 16),
    ],
)
def test_clocks_of_a_tensor_core_instruction(opcode: str, capability: int, expected: int):
    assert tensor_clocks(opcode, CARDS[capability]) == expected


@pytest.mark.parametrize("opcode", ["HMMA.884.F16", "QGMMA.64x128x32.F32.E4M3.E4M3", "FFMA", "DMMA.884"])
def test_an_instruction_of_unknown_rate_is_refused(opcode: str):
    with pytest.raises(ValueError, match="known"):
        tensor_clocks(opcode, CARDS[90])


def test_a_loop_that_waits_for_its_products_adds_up():
    row = dict(
        tensor_clocks="512",
        issue_clocks="788",
        int_clocks="300",
        convert_clocks_16="2048",
        convert_clocks_64="512",
        mma_waits="0",
    )
    assert clocks(row, 64) == 788
    assert clocks(row | dict(mma_waits="1"), 64) == 1300
    assert clocks(row | dict(mma_waits="1"), 16) == 2048


def test_the_call_that_really_runs_is_predicted(record):
    """Modulation is exact in every mode; a large call of exact mode is two-stage on an H200 and fused on an RTX 4090."""
    small = Call(1, 18432, 3072, 1, "")
    for model, algorithm in (("H200", "two_stage"), ("RTX 4090", "fused")):
        case = Case(BY_NAME[model], record, "Q4_K")
        assert choice_of(case, "int8", small)[0] == "exact"
        assert choice_of(case, "exact", LINEAR)[1].algorithm == algorithm
        assert call_ms(case, "int8", small) == call_ms(case, "exact", small)
    float32 = Case(BY_NAME["RTX 4090"], record, "Q4_K", "fp32")
    assert choice_of(float32, "exact", LINEAR)[1].algorithm == "two_stage"


def test_waves_are_counted_over_the_chunks(record):
    """128 rows at a time are 36 tiles on an RTX 3090's 82 multiprocessors: 96 waves where the whole weight has 43."""
    case = Case(BY_NAME["RTX 3090"], record, "Q4_K")
    whole = choice_of(case, "int8", LINEAR)[1]
    assert whole.rows is None
    product = 24 * clocks(case.row("int8_gemm", str(whole.tile)), 64) / case.model.ghz / 1e6
    slower = call_ms(case, "int8", LINEAR, replace(whole, rows=128)) - call_ms(case, "int8", LINEAR, whole)
    assert slower > 0.9 * (96 - 43) * product


def test_the_scratch_is_paid_for(record):
    """Two-stage takes longer than torch's product by at least what writing the unpacked weight and reading the packed one takes."""
    case = Case(BY_NAME["H200"], record, "Q4_K")
    traffic = 2 * LINEAR.n * LINEAR.k + case.packed(LINEAR)
    extra = call_ms(case, "exact", LINEAR) - torch_ms(case, LINEAR)
    assert extra == pytest.approx(case.moving(traffic), rel=1e-6) or extra > case.moving(traffic)


def test_no_mode_beats_its_peak(record):
    """A step is never predicted to be faster than all its products at the peak rate of the unit that does them."""
    for model in MODELS:
        for mode, peak in (("exact", model.bf16_tflops), ("fp16_accumulate", model.fp16_tflops), ("int8", model.int8_tops)):
            try:
                row = predict(model, mode, "Q4_K", record)
            except LookupError:
                continue
            assert row["predicted_ms"] > sum(call.calls * call.flops for call in step_calls()) / peak / 1e9
            assert row["predicted_ms"] <= row["predicted_ms_slow_convert"]


def test_float16_accumulation_is_not_predicted_where_it_is_refused(record):
    with pytest.raises(LookupError, match="refused"):
        predict(BY_NAME["A100"], "fp16_accumulate", "Q4_K", record)


MEASURED = dict(format="Q4_K", m="4608", n="3072", k="3072", calls="1", where="a test", dtype="bfloat16", p50_ms="2.0")


def test_like_is_calibrated_with_like():
    """On an H200 exact mode is compared with two-stage at M = 4608, on an A100 with the fused kernel at 512, torch with torch."""
    names = ("ours exact", "ours fused", "ours int8", "torch", "ours two_stage", "bitsandbytes NF4")
    rows = [MEASURED | dict(provider=name) for name in names]
    found = {row["provider"]: row for row in calibrate(rows, BY_NAME["H200"], read_csv(RECORD))}
    assert set(found) == set(names) - {"bitsandbytes NF4"}
    assert found["ours exact"]["ran"] == found["ours two_stage"]["ran"] == "two_stage"
    assert found["ours exact"]["predicted_ms"] == found["ours two_stage"]["predicted_ms"]
    assert found["ours fused"]["ran"].startswith("fused 128x128")
    assert found["ours int8"]["ran"].startswith("int8 row_scales")
    few = calibrate([MEASURED | dict(provider="ours exact", m="512")], BY_NAME["A100"], read_csv(RECORD))
    assert few[0]["ran"].startswith("fused 128x128")
    assert not calibrate([MEASURED | dict(provider="ours exact", p50_ms="")], BY_NAME["H200"], read_csv(RECORD))
