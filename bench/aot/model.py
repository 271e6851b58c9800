"""Model what the busiest pipe and the memory would need, were nothing else in the way.

A call is what the library runs for it: the default choice's algorithm with its tile and chunks, the kernels around the product
(unpacking the weight, quantizing activations) and their traffic. Where a loop waits for all its products, products and
instructions add up; elsewhere they overlap. That is a bound. A case that `waits` adds what a program that is alone on its
multiprocessor waits for shared memory, as an H200 was measured to. It needs neither typer nor rich, so that `bench.calibrate`
can compare its predictions with measurements on a bare GPU machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from flux_kernels.compute import DATACENTER, WEIGHT_ONLY_M, group_width, mode_of_call
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import modes
from flux_kernels.kernels.choice import Choice, default_choice, tile_of
from flux_kernels.kernels.chunks import chunk_sizes, wave_efficiency
from flux_kernels.kernels.tiles import Tile
from flux_kernels.models.calls import Call, step_calls

from .cards import CARDS, CONVERT_RATES, MEASURED_CONVERT_RATES, SHARED_WAIT
from .launches import ANY, DTYPES

MODES = tuple(modes.MODES)
_LEAST_K = 128  # rows of no more weights leave no loop to predict from
_KERNELS = {"fused": "fused_gemm", "split_k": "split_k"}
# Kernels whose operands both pass shared memory, and what decodes alike on the capability that was measured.
_PRODUCTS = {name: name for name in ("fused_gemm", "split_k", "int8_gemm", "int8_gemm_rows")} | dict(fp16_gemm="fused_gemm")
_MEASURED = 90  # the capability that SHARED_WAIT was measured on


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
_H200 = MODELS[-1]
# As `bench.run` measured it, and the clock of its longer kernels (bench/results/nvidia-h200/linear.csv, ncu.csv).
H200_MEASURED = replace(_H200, name="H200 as measured", ghz=1.784, bf16_tflops=795, memory_gb_s=4263)


class Record:
    """Find rows of the compile-time report, those of the newest Triton it has."""

    def __init__(self, rows: list[dict]):
        self.triton = max((row["triton"] for row in rows), key=_version, default="")
        self._rows: dict[tuple, list[dict]] = {}
        for row in rows:
            if row["triton"] == self.triton:
                self._rows.setdefault((row["kernel"], row["format"], int(row["capability"]), row["dtype"]), []).append(row)

    def find(self, kernel: str, format: str, capability: int, dtype: str, tile: str = "") -> dict:
        """Return a kernel's row: of a tile where it is named, else the row with the longest rows and steps.

        Raises:
            LookupError: where the record has none.
        """
        candidates = [
            row
            for key in (
                (kernel, format, capability, dtype),
                (kernel, format, capability, ANY),
                (kernel, ANY, capability, dtype),
            )
            for row in self._rows.get(key, [])
            if tile in ("", row["tile"]) and (int(row["k"]) == 0 or int(row["k"]) > _LEAST_K)
        ]
        if not candidates:
            raise LookupError(f"the record has no {kernel} {tile} of {format} with {dtype} x for capability {capability}")
        return max(candidates, key=lambda row: (int(row["k"]), _sizes(row)[-1]))

    def waits(self, row: dict) -> int:
        """Count the shared-memory instructions of a warp's loop, without those that load operands of mma.sync.

        Such operands are loaded ahead of the product, so they are no waits; on capability 90, whose products read shared
        memory themselves, there are none. So a product for another capability has those of the same kernel there, in proportion
        to the weights that a warp decodes.
        """
        if row["kernel"] not in _PRODUCTS or int(row["capability"]) == _MEASURED:
            return int(row["loop_shared"])
        twin = self.find(_PRODUCTS[row["kernel"]], row["format"], _MEASURED, row["dtype"])
        return round(int(twin["loop_shared"]) * _weights_of_a_warp(row) / _weights_of_a_warp(twin))


@dataclass(frozen=True)
class Case:
    """Hold what a prediction is for: a product, the record, a format, x's dtype, and assumptions.

    convert_rate: results of conversions a clock and SM, where nobody measured them. waits: whether programs wait for shared
    memory, and products of a warp's own instruction (mma.sync) do not overlap with decoding either.
    """

    model: Model
    record: Record
    format: str
    dtype: str = "bf16"
    convert_rate: int = max(CONVERT_RATES)
    waits: bool = False

    @property
    def itemsize(self) -> int:
        """Return the bytes of a value of x."""
        return DTYPES[self.dtype].itemsize

    def row(self, kernel: str, tile: str = "") -> dict:
        """Return a kernel's row on this card."""
        return self.record.find(kernel, self.format, self.model.capability, self.dtype, tile)

    def packed(self, call: Call) -> int:
        """Return the bytes of the packed weight."""
        return call.n * FORMATS[self.format].row_bytes(call.k)

    def moving(self, nbytes: float) -> float:
        """Return the milliseconds of moving bytes to or from memory."""
        return nbytes / self.model.memory_gb_s / 1e6

    @property
    def converts(self) -> int:
        """Return the results of conversions a clock and SM: as measured, else as the case assumes."""
        return MEASURED_CONVERT_RATES.get(self.model.capability, self.convert_rate)

    def running(self, row: dict, programs: int, steps: int = 1) -> float:
        """Return the milliseconds of the multiprocessor that has the most programs of a kernel.

        Programs that are there at a time share its pipes, and wait together.
        """
        most = ceil(programs / self.model.processors)
        turns = ceil(most / max(1, int(row["programs_per_sm"])))
        return steps * (most * clocks(row, self.converts) + turns * self.waited(row)) / (self.model.ghz * 1e6)

    def waited(self, row: dict) -> int:
        """Return the clocks that one iteration of a program alone takes beyond those of its busiest pipe."""
        if not self.waits:
            return 0
        products, rest = int(row["tensor_clocks"]), _rest(row, self.converts)
        in_turn = 0 if int(row["mma_waits"]) else min(products, rest)
        return in_turn + SHARED_WAIT * self.record.waits(row)


def clocks(row: dict, convert_rate: int) -> int:
    """Return the clocks of one iteration of a kernel: of its busiest pipe, or products and then the rest."""
    products, rest = int(row["tensor_clocks"]), _rest(row, convert_rate)
    return products + rest if int(row["mma_waits"]) else max(products, rest)


def _rest(row: dict, convert_rate: int) -> int:
    return max(pipes_of(row, convert_rate).values())


def pipes_of(row: dict, convert_rate: int) -> dict[str, int]:
    """Return the clocks of one iteration by pipe, all but the tensor cores."""
    return {name: int(row[f"{name}_clocks"]) for name in ("issue", "int")} | dict(
        convert=int(row[f"convert_clocks_{convert_rate}"])
    )


def busiest_pipe(row: dict, convert_rate: int) -> str:
    """Name the pipe that decides: "tensor + issue", say, where a loop waits for its products."""
    pipes, products = pipes_of(row, convert_rate), int(row["tensor_clocks"])
    busiest = max(pipes, key=pipes.__getitem__)
    if int(row["mma_waits"]):
        return f"tensor + {busiest}"
    return "tensor" if products >= pipes[busiest] else busiest


def tile_from(text: str) -> Tile:
    """Read what str(Tile) wrote."""
    sizes, *words = text.split()
    given = dict(pairwise(words))
    whole = {name: int(given[name]) for name in ("warps", "stages")}
    return Tile(*map(int, sizes.split("x")), *whole.values(), int(given.get("split", 1)), "ldmatrix" in words)


def choice_of(case: Case, mode: str, call: Call) -> tuple[str, Choice]:
    """Return the compute mode a call runs in (few rows run as exact), and the default table's choice."""
    compute = mode_of_call(mode, call.m)
    fmt, capability = FORMATS[case.format], divmod(case.model.capability, 10)
    processors, dtype = case.model.processors, DTYPES[case.dtype]
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
    """Predict torch's own product: waves of 128 x 128 tiles at the peak rate, or the memory traffic."""
    return _torch_product_ms(case, call.m, call.n, call.k)


def _sizes(row: dict) -> list[int]:
    return [int(size) for size in row["tile"].split()[0].split("x")]


def _weights_of_a_warp(row: dict) -> float:
    *_, rows, k = _sizes(row)
    return rows * k / tile_from(row["tile"]).num_warps


def _product_ms(case: Case, call: Call, row: dict, tile: Tile, x_bytes: int) -> float:
    """Return the time of a kernel that reads packed rows: its programs, or its traffic."""
    # Programs; small M's splits are warps of one program.
    shared_k = tile.splits if row["kernel"] == "split_k" else 1
    programs = ceil(call.m / tile.block_m) * ceil(call.n / tile.block_n) * shared_k
    traffic = case.packed(call) + x_bytes * call.m * call.k + case.itemsize * call.m * call.n
    # Float32, written by one kernel and read by another.
    sums = 2 * 4 * shared_k * call.m * call.n if shared_k > 1 else 0
    return max(case.running(row, programs, ceil(call.k / tile.tile_k / tile.splits)), case.moving(traffic)) + case.moving(sums)


def _two_stage_ms(case: Case, call: Call, choice: Choice) -> float:
    """Return the time of unpacking a weight to x's dtype, and of torch's product, chunk by chunk."""
    total = 0.0
    for rows in chunk_sizes(call.n, choice.rows):
        total += unpack_ms(case, "dequantize", call, rows, case.itemsize)
        total += _torch_product_ms(case, call.m, rows, call.k)
    return total


def unpack_ms(case: Case, kernel: str, call: Call, rows: int, itemsize: float) -> float:
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
    """Return the time of quantizing x, and by chunks of unpacking the weight to int8 and multiplying.

    The scales of weight rows are computed once per layer, not in each call.
    """
    total = quantizer_ms(case, call)
    for rows in chunk_sizes(call.n, choice.rows):
        total += unpack_int8_ms(case, call, rows, choice.algorithm == "row_scales") + int8_product_ms(case, call, rows, row)
    return total


def unpack_int8_ms(case: Case, call: Call, rows: int, row_scales: bool) -> float:
    """Return the time of decoding `rows` weight rows to int8, with a scale for each group or row."""
    kernel, written = ("unpack_int8_rows", 1) if row_scales else ("unpack_int8", 1 + 4 / group_width(call.k))
    return unpack_ms(case, kernel, call, rows, written)


def int8_product_ms(case: Case, call: Call, rows: int, row: dict) -> float:
    """Return the time of the int8 product with `rows` rows of the weight."""
    block_m, block_n, group = _sizes(row)
    programs = ceil(call.m / block_m) * ceil(rows / block_n)
    traffic = call.m * call.k + rows * call.k + case.itemsize * call.m * rows
    return max(case.running(row, programs, ceil(call.k / group)), case.moving(traffic))


def quantizer_ms(case: Case, call: Call) -> float:
    """Return the time of quantizing x to int8."""
    row = case.row("quantize_activation")
    block_m, group = _sizes(row)
    programs = ceil(call.m / block_m) * ceil(call.k / group_width(call.k))
    return max(case.running(row, programs), case.moving(call.m * call.k * (case.itemsize + 1 + 4 / group)))


def both_cases(model: Model, record: Record, format: str, dtype: str = "bf16") -> tuple[Case, Case]:
    """Return the case of the bound, and the case in which programs wait."""
    slow, fast = CONVERT_RATES
    return Case(model, record, format, dtype, fast), Case(model, record, format, dtype, slow, waits=True)


def predict(model: Model, mode: str, format: str, record: Record, fused: bool = False) -> dict:
    """Predict the linears of one 1024 x 1024 step in a mode: the bound, and the time with waits.

    fused: whether exact mode decodes inside the product in every call of many rows, whatever the default.

    Raises:
        LookupError: where the record lacks a kernel, or the card refuses the mode.
    """
    if mode == "fp16_accumulate" and divmod(model.capability, 10) in DATACENTER:
        raise LookupError(f"{mode} is refused on {model.name}")
    cases, named = both_cases(model, record, format), {}
    if fused:
        fmt, capability = FORMATS[format], divmod(model.capability, 10)
        many = [call for call in step_calls() if call.m > WEIGHT_ONLY_M]
        named = {call: Choice("fused", tile_of("fused", fmt, call.m, call.n, call.k, capability), "named") for call in many}
    best, worst = (sum(call.calls * call_ms(case, mode, call, named.get(call)) for call in step_calls()) for case in cases)
    torch_total = sum(call.calls * torch_ms(cases[0], call) for call in step_calls())
    largest = max(step_calls(), key=lambda call: call.flops)
    compute, choice = choice_of(cases[0], mode, largest)
    choice = named.get(largest, choice)
    row = product_row(cases[0], compute, choice)
    return dict(
        card=model.name,
        format=format,
        compute=f"{mode}, fused" if fused else mode,
        runs=str(choice),
        predicted_ms=round(best, 1),
        predicted_ms_waiting=round(worst, 1),
        bf16_ms=round(torch_total, 1),
        ratio=round(torch_total / best, 2),
        ratio_waiting=round(torch_total / worst, 2),
        busiest_pipe=busiest_pipe(row, cases[0].converts) if row else "torch",
        triton=record.triton,
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
