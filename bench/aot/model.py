"""The model behind `bench.aot.predict`: what the busiest pipe and the memory would need, were nothing else in the way.

A call is what the library runs for it: the default choice's algorithm with its tile and chunks, the kernels around the product
(unpacking the weight, quantizing activations) and their traffic. Where a loop waits for all its products, products and
instructions add up; elsewhere they overlap. It needs neither typer nor rich, so that `bench.calibrate` can put its predictions beside
measurements on a bare GPU machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from flux_kernels.compute import DATACENTER, WEIGHT_ONLY_M, group_width
from flux_kernels.flux.calls import Call, step_calls
from flux_kernels.formats import FORMATS
from flux_kernels.kernels.choice import Choice, default_choice
from flux_kernels.kernels.chunks import chunk_sizes, wave_efficiency
from flux_kernels.kernels.tuning import Tile

from .cards import CARDS, CONVERT_RATES

MODES = ("exact", "fp16_accumulate", "int8")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ANY = "any"
_LEAST_K = 128  # rows of no more weights leave no loop to predict from
_KERNELS = {"fused": "fused_gemm", "split_k": "split_k"}


@dataclass(frozen=True)
class Model:
    """Hold one product as its vendor states it, or as it was measured.

    ghz: the boost clock that the peaks are stated for. bf16_tflops, fp16_tflops (fp16 accumulation), int8_tops: dense peaks.
    """

    name: str
    capability: int
    processors: int
    ghz: float
    bf16_tflops: float
    fp16_tflops: float
    int8_tops: float
    memory_gb_s: float


# Vendors' data sheets and whitepapers.
MODELS = (
    Model("RTX 3060", 86, 28, 1.777, 25.6, 51.2, 102, 360),
    Model("RTX 3090", 86, 82, 1.695, 71.2, 142, 285, 936),
    Model("RTX 4090", 89, 128, 2.52, 165.2, 330, 661, 1008),
    Model("RTX 5090", 120, 170, 2.407, 209.5, 419, 838, 1792),
    Model("A100", 80, 108, 1.41, 312, 312, 624, 2039),
    Model("H100", 90, 132, 1.83, 989, 989, 1979, 3350),
    Model("H200", 90, 132, 1.83, 989, 989, 1979, 4800),
)


class Record:
    """Find rows of the compile-time report, those of the newest Triton it has."""

    def __init__(self, rows: list[dict]):
        self.triton = max((row["triton"] for row in rows), key=_version, default="")
        self._rows: dict[tuple, list[dict]] = {}
        for row in rows:
            if row["triton"] == self.triton:
                self._rows.setdefault((row["kernel"], row["format"], int(row["capability"]), row["dtype"]), []).append(row)

    def find(self, kernel: str, format: str, capability: int, dtype: str, tile: str = "") -> dict:
        """Return a kernel's row: of a tile where one is named, else the one with the longest rows and steps.

        Raises:
            LookupError: where the record has none.
        """
        found = [
            row
            for key in (
                (kernel, format, capability, dtype),
                (kernel, format, capability, _ANY),
                (kernel, _ANY, capability, dtype),
            )
            for row in self._rows.get(key, [])
            if tile in ("", row["tile"]) and (int(row["k"]) == 0 or int(row["k"]) > _LEAST_K)
        ]
        if not found:
            raise LookupError(f"the record has no {kernel} {tile} of {format} with {dtype} x for capability {capability}")
        return max(found, key=lambda row: (int(row["k"]), _sizes(row)[-1]))


@dataclass(frozen=True)
class Case:
    """Hold what a prediction is for: a product, the record, a format, x's dtype, and results of conversions a clock and SM."""

    model: Model
    record: Record
    format: str
    dtype: str = "bf16"
    convert_rate: int = max(CONVERT_RATES)

    @property
    def itemsize(self) -> int:
        """Return the bytes of a value of x."""
        return _DTYPES[self.dtype].itemsize

    def row(self, kernel: str, tile: str = "") -> dict:
        """Return a kernel's row on this card."""
        return self.record.find(kernel, self.format, self.model.capability, self.dtype, tile)

    def packed(self, call: Call) -> int:
        """Return the bytes of the packed weight."""
        return call.n * FORMATS[self.format].row_bytes(call.k)

    def moving(self, nbytes: float) -> float:
        """Return the milliseconds of moving bytes to or from memory."""
        return nbytes / self.model.memory_gb_s / 1e6

    def running(self, row: dict, programs: int, steps: int = 1) -> float:
        """Return the milliseconds of the multiprocessor that has the most programs of a kernel."""
        return ceil(programs / self.model.processors) * steps * clocks(row, self.convert_rate) / (self.model.ghz * 1e6)


def clocks(row: dict, convert_rate: int) -> int:
    """Return the clocks of one iteration of a kernel's loop: of its busiest pipe, or of products and then the rest."""
    tensor, issue = int(row["tensor_clocks"]), int(row["issue_clocks"])
    together = tensor + issue if int(row["mma_waits"]) else max(tensor, issue)
    return max(together, int(row["int_clocks"]), int(row[f"convert_clocks_{convert_rate}"]))


def busiest_pipe(row: dict, convert_rate: int) -> str:
    """Name the pipe that decides: "tensor + issue" where a loop waits for its products."""
    pipes = {name: int(row[f"{name}_clocks"]) for name in ("tensor", "issue", "int")}
    pipes["convert"] = int(row[f"convert_clocks_{convert_rate}"])
    if int(row["mma_waits"]):
        pipes["tensor + issue"] = pipes.pop("tensor") + pipes.pop("issue")
    return max(pipes, key=pipes.__getitem__)


def choice_of(case: Case, mode: str, call: Call) -> tuple[str, Choice]:
    """Return the compute mode that a call really runs in (few rows run as exact), and the default table's choice."""
    compute = "exact" if call.m <= WEIGHT_ONLY_M else mode
    fmt, capability = FORMATS[case.format], divmod(case.model.capability, 10)
    processors, dtype = case.model.processors, _DTYPES[case.dtype]
    return compute, default_choice(compute, fmt, call.m, call.n, call.k, capability, dtype, False, processors)


def call_ms(case: Case, mode: str, call: Call, choice: Choice | None = None) -> float:
    """Predict the milliseconds of one call in a mode, with the default choice or another.

    Raises:
        LookupError: where the record lacks a kernel of it.
    """
    compute, default = choice_of(case, mode, call)
    choice = choice or default
    row = product_row(case, compute, choice)
    if compute == "int8":
        return _int8_ms(case, call, choice, row)
    if row is None:
        return _two_stage_ms(case, call, choice)
    if compute == "fp16_accumulate":
        return case.moving(call.m * call.k * (case.itemsize + 2)) + _product_ms(case, call, row, choice.tile, x_bytes=2)
    return _product_ms(case, call, row, choice.tile, x_bytes=case.itemsize)


def product_row(case: Case, compute: str, choice: Choice) -> dict | None:
    """Return the row of the kernel that multiplies, None where torch does."""
    text = str(choice.tile)
    if compute == "int8":
        return case.row("int8_gemm_rows" if choice.algorithm == "row_scales" else "int8_gemm", text)
    if compute == "fp16_accumulate":
        return case.row("fp16_gemm", text)
    if choice.algorithm == "small_m":
        return case.row("small_m_codes" if choice.tile.block_m > 1 else "small_m")
    return case.row(_KERNELS[choice.algorithm], text) if choice.algorithm in _KERNELS else None


def torch_ms(case: Case, call: Call) -> float:
    """Predict torch's own product with an unpacked weight: waves of 128 x 128 tiles at the peak rate, or the memory traffic."""
    return _torch_product_ms(case, call.m, call.n, call.k)


def _sizes(row: dict) -> list[int]:
    return [int(size) for size in row["tile"].split()[0].split("x")]


def _product_ms(case: Case, call: Call, row: dict, tile: Tile, x_bytes: int) -> float:
    """Return the time of a kernel that reads packed rows: its programs, or its traffic."""
    shared_k = tile.splits if row["kernel"] == "split_k" else 1  # programs; small M's splits are warps of one program
    programs = ceil(call.m / tile.block_m) * ceil(call.n / tile.block_n) * shared_k
    traffic = case.packed(call) + x_bytes * call.m * call.k + case.itemsize * call.m * call.n
    return max(case.running(row, programs, ceil(call.k / tile.tile_k / tile.splits)), case.moving(traffic))


def _two_stage_ms(case: Case, call: Call, choice: Choice) -> float:
    """Return the time of unpacking a weight to x's dtype, and of torch's product, chunk by chunk."""
    total = 0.0
    for rows in chunk_sizes(call.n, choice.rows):
        total += _unpack_ms(case, "dequantize", call, rows, case.itemsize)
        total += _torch_product_ms(case, call.m, rows, call.k)
    return total


def _unpack_ms(case: Case, kernel: str, call: Call, rows: int, itemsize: float) -> float:
    """Return the time of decoding `rows` rows of a weight, `itemsize` bytes written for each weight."""
    row = case.row(kernel)
    block_n, tile_k = _sizes(row)
    traffic = case.packed(call) * rows / call.n + itemsize * rows * call.k
    return max(case.running(row, ceil(rows / block_n) * ceil(call.k / tile_k)), case.moving(traffic))


def _torch_product_ms(case: Case, m: int, n: int, k: int) -> float:
    # Operations of the multiprocessors, busy or not.
    padded = 2 * m * n * k / wave_efficiency(m, n, None, case.model.processors)
    card = CARDS[case.model.capability]
    slower = card.fp32_sums / card.fp32_rate if case.dtype == "fp32" else 1
    return max(slower * padded / case.model.bf16_tflops / 1e9, case.moving(case.itemsize * (m * k + n * k + m * n)))


def _int8_ms(case: Case, call: Call, choice: Choice, row: dict) -> float:
    """Return the time of quantizing x, and chunk by chunk of unpacking the weight to int8 and of the product.

    The scales of weight rows are found once per layer, not in each call.
    """
    block_m, block_n, group = _sizes(row)
    unpack, written = ("unpack_int8_rows", 1) if choice.algorithm == "row_scales" else ("unpack_int8", 1 + 4 / group)
    total = _quantizer_ms(case, call)
    for rows in chunk_sizes(call.n, choice.rows):
        total += _unpack_ms(case, unpack, call, rows, written)
        programs = ceil(call.m / block_m) * ceil(rows / block_n)
        traffic = call.m * call.k + rows * call.k + case.itemsize * call.m * rows
        total += max(case.running(row, programs, ceil(call.k / group)), case.moving(traffic))
    return total


def _quantizer_ms(case: Case, call: Call) -> float:
    row = case.row("quantize_activation")
    block_m, group = _sizes(row)
    programs = ceil(call.m / block_m) * ceil(call.k / group_width(call.k))
    return max(case.running(row, programs), case.moving(call.m * call.k * (case.itemsize + 1 + 4 / group)))


def predict(model: Model, mode: str, format: str, record: Record) -> dict:
    """Predict the linears of one 1024 x 1024 step of FLUX.1-dev in a mode, with both rates of conversion.

    Raises:
        LookupError: where the record lacks a kernel, or the card refuses the mode.
    """
    if mode == "fp16_accumulate" and divmod(model.capability, 10) in DATACENTER:
        raise LookupError(f"{mode} is refused on {model.name}")
    cases = [Case(model, record, format, convert_rate=rate) for rate in sorted(CONVERT_RATES, reverse=True)]
    best, worst = (sum(call.calls * call_ms(case, mode, call) for call in step_calls()) for case in cases)
    torch_total = sum(call.calls * torch_ms(cases[0], call) for call in step_calls())
    compute, choice = choice_of(cases[0], mode, max(step_calls(), key=lambda call: call.flops))
    row = product_row(cases[0], compute, choice)
    return dict(
        card=model.name,
        format=format,
        compute=mode,
        runs=str(choice),
        predicted_ms=round(best, 1),
        predicted_ms_slow_convert=round(worst, 1),
        bf16_ms=round(torch_total, 1),
        ratio=round(torch_total / best, 2),
        ratio_slow_convert=round(torch_total / worst, 2),
        busiest_pipe=busiest_pipe(row, cases[0].convert_rate) if row else "torch",
        triton=record.triton,
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
