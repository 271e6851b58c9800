"""Compare the compile-time model's predictions with measured kernels of the same card.

    python -m bench.calibrate results/linear.csv --write results/calibration.csv     # on the card itself
    python -m bench.calibrate bench/results/nvidia-h200 --write calibration.csv      # without a GPU

The model (bench/aot/model.py) gives a bound, and a time in which programs wait for shared memory; measured / predicted tells how
far a card is from each. Like is compared with like: a row of a mode with what the default table runs for its call, a row of one
algorithm with that algorithm and tile, torch's own product with torch's. What bench/results/aot.csv lacks is left out. Given a
folder of `bench.gpu_session`, the card's rates are those measured there.

Predictions are for the kernels and the table of today: rows of an older `commit` may have run others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from statistics import median

import torch

from bench.aot import model as compile_time
from bench.aot.cards import CARDS
from bench.aot.model import MODELS, MODES, Case, Model, Record, both_cases, call_ms, choice_of, clocks, tile_from, torch_ms
from bench.record import AOT, read_csv, write_csv
from flux_kernels.benchmark.ceilings import measure_ceilings
from flux_kernels.benchmark.linears import least_bytes
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import modes
from flux_kernels.kernels.choice import Choice, tile_of
from flux_kernels.models.calls import Call

TABLES = ("linear", "sweep", "two_stage", "int8", "small_m")  # of a session, those whose rows the model predicts
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_LONG_NS = 50_000  # kernels of the profiler that tell the clock under load
_ORIGIN = ("device", "driver", "torch", "triton", "commit", "date")

Predicted = tuple[str, Callable[[Case], float]]  # what ran, as text, and its milliseconds in a case


def this_card() -> Model:
    """Describe this machine's GPU: multiprocessors and clock by its driver, rates as measured now."""
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    ceilings = measure_ceilings(device, torch.bfloat16)
    capability, ghz = 10 * properties.major + properties.minor, properties.clock_rate / 1e6
    card = CARDS[capability]
    peak = lambda products: 2 * products * properties.multi_processor_count * ghz / 1e3
    return Model(
        name=properties.name,
        capability=capability,
        processors=properties.multi_processor_count,
        ghz=ghz,
        bf16_tflops=ceilings.matmul_tflops,
        fp16_tflops=peak(card.fp16_sums),
        int8_tops=peak(card.int8_products),
        memory_gb_s=ceilings.copy_gb_s,
    )


def measured_card(linear: list[dict], counters: list[dict]) -> Model:
    """Describe a session's card by what it measured: ceilings of its calls, clock of its long kernels.

    Args:
        linear: rows of linear.csv, whose shares are of a copy's GB/s and of a large product's TFLOP/s.
        counters: rows of ncu.csv.
    """
    model = next(model for model in MODELS if model.name in linear[0]["device"])
    long = {row["what"] for row in counters if row["metric"] == "Duration" and float(row["value"]) > _LONG_NS}
    hertz = [float(row["value"]) for row in counters if row["metric"] == "SM Frequency" and row["what"] in long]
    matmul, copy = (
        max(linear, key=lambda row, name=name: float(row[name] or 0)) for name in ("share_of_matmul", "share_of_copy")
    )
    moved = least_bytes(copy["format"], copy["provider"], _call(copy), torch.bfloat16.itemsize)
    return replace(
        model,
        name=f"{model.name} as measured",
        ghz=round(median(hertz) / 1e9, 3),
        bf16_tflops=round(float(matmul["tflops"]) / float(matmul["share_of_matmul"])),
        memory_gb_s=round(moved / float(copy["p50_ms"]) / 1e6 / float(copy["share_of_copy"])),
    )


def calibrate(rows: list[dict], model: Model, record: list[dict], table: str = "linear") -> list[dict]:
    """Return a row for each time the model predicts: what ran, measured, bound, waiting, origin."""
    recorded, predicted = Record(record), []
    for row in rows:
        dtype = _DTYPES.get(row.get("dtype") or "bfloat16")
        if dtype is None or not row["p50_ms"]:
            continue
        cases, call, measured = both_cases(model, recorded, row["format"], dtype), _call(row), float(row["p50_ms"])
        try:
            ran, milliseconds = _ran(row, cases[0], call)
            bound, waiting = (milliseconds(case) for case in cases)
        except LookupError:
            continue
        predicted.append(
            dict(table=table, ran=ran, format=row["format"], m=call.m, n=call.n, k=call.k, dtype=dtype)
            | dict(provider=row.get("provider", ""), measured_ms=f"{measured:.5f}")
            | dict(bound_ms=f"{bound:.5f}", over_bound=f"{measured / bound:.3f}")
            | dict(waiting_ms=f"{waiting:.5f}", over_waiting=f"{measured / waiting:.3f}", model=model.name)
            | {name: row.get(name, "") for name in _ORIGIN}
        )
    return predicted


def summarize(times: list[dict]) -> list[dict]:
    """Return a row for each kernel, format and table: median and range of measured / predicted."""
    groups: dict[tuple, list[dict]] = {}
    for row in times:
        groups.setdefault((row["table"], row["ran"].split(" ")[0], row["format"], row["dtype"]), []).append(row)
    return [
        dict(zip(("table", "ran", "format", "dtype"), key, strict=True))
        | dict(rows=len(group), **_spread(group, "over_bound"), **_spread(group, "over_waiting"), model=group[0]["model"])
        | {name: group[0][name] for name in _ORIGIN}
        for key, group in groups.items()
    ]


def fitted_wait(
    rows: list[dict], model: Model, record: list[dict], format: str = "Q4_K", n: int = 3072, k: int = 3072
) -> float:
    """Return the clocks a program waits for a shared-memory instruction: SHARED_WAIT of cards.py.

    The median over the fused rows of one format and shape in sweep.csv, of its wide tile: one program a multiprocessor, so that
    all that is measured beyond the bound is wait.
    """
    case, waits = Case(model, Record(record), format), []
    for row in rows:
        if (row["algorithm"], row["format"], int(row["n"]), int(row["k"])) != ("fused", format, n, k) or int(row["m"]) < 128:
            continue
        tile, code = tile_from(row["tile"]), case.row("fused_gemm", row["tile"])
        turns = ceil(tile.programs(int(row["m"]), n) / model.processors) * ceil(k / tile.tile_k)
        measured = float(row["p50_ms"]) * model.ghz * 1e6 / turns
        waits.append((measured - clocks(code, case.converts)) / case.record.waits(code))
    return median(waits)


def _spread(rows: list[dict], column: str) -> dict[str, str]:
    ratios = [float(row[column]) for row in rows]
    kinds = (("median", median), ("least", min), ("most", max))
    return {f"{column}_{name}": f"{of(ratios):.2f}" for name, of in kinds}


def _call(row: dict) -> Call:
    return Call(int(row["m"]), int(row["n"]), int(row["k"]), int(row.get("calls") or 1), row.get("where", ""))


def _ran(row: dict, case: Case, call: Call) -> Predicted:
    """Return what a measured row ran and how to predict it.

    Raises:
        LookupError: for what the model does not know.
    """
    if "provider" in row:
        return _provider(row["provider"], case, call)
    if "scales" in row:
        return _int8_piece(row, call)
    # two_stage.csv: chunks, biases and kinds of scratch; the library's own is "shipped".
    if "scratch" in row:
        named = {"torch": "torch", "shipped": "two_stage"}
        return _algorithm(named.get(row["rows"], ""), "", call)
    return _algorithm(row["algorithm"], row["tile"], call)


def _provider(provider: str, case: Case, call: Call) -> Predicted:
    own = provider.removeprefix("ours ")
    if provider == "torch":
        return _algorithm("torch", "", call)
    if own in MODES:
        ran, choice = choice_of(case, own, call)
        text = str(choice) if ran == "exact" else f"{ran} {choice}"
        return text, lambda case: call_ms(case, own, call)
    if own == provider or own not in modes.MODES["exact"].algorithms:
        raise LookupError(f"the model does not know {provider}")
    tile = tile_of(own, FORMATS[case.format], call.m, call.n, call.k, divmod(case.model.capability, 10))
    return _algorithm(own, str(tile or ""), call)


def _algorithm(algorithm: str, tile: str, call: Call) -> Predicted:
    if algorithm == "torch":
        return "torch", lambda case: torch_ms(case, call)
    # small_m.csv, whose tile starts with the algorithm.
    if algorithm == "shipped":
        algorithm, _, tile = tile.partition(" ")
    if algorithm not in modes.MODES["exact"].algorithms:
        raise LookupError(f"the model does not know {algorithm!r}")
    choice = Choice(algorithm, tile_from(tile) if tile else None, "named")
    return str(choice), lambda case: call_ms(case, "exact", call, choice)


def _int8_piece(row: dict, call: Call) -> Predicted:
    """Return the prediction of a row of int8.csv: the mode as shipped, or one kernel of it."""
    what, by_rows = row["what"], row["scales"] == "rows"
    if what == "bf16 torch":
        return _algorithm("torch", "", call)
    if what == "shipped":
        return "int8", lambda case: call_ms(case, "int8", call)
    if what == "quantize x":
        return "quantize_activation", lambda case: compile_time.quantizer_ms(case, call)
    kernel = {"unpack w": "unpack_int8", "product": "int8_gemm"}.get(what)
    if kernel is None or row["scales"] not in ("rows", "groups"):
        raise LookupError(f"the model does not know {what} with scales {row['scales']}")
    kernel += "_rows" * by_rows
    if what == "unpack w":
        return kernel, lambda case: compile_time.unpack_int8_ms(case, call, call.n, by_rows)
    text = f"{kernel} {row['tile']}"
    return text, lambda case: compile_time.int8_product_ms(case, call, call.n, case.row(kernel, row["tile"]))


def _inputs(path: Path, named: str | None) -> tuple[Model, dict[str, list[dict]]]:
    """Return the card and measured rows by table, of a session's folder or one CSV of `bench.run`."""
    names = {model.name: model for model in MODELS}
    if path.is_dir():
        tables = {name: read_csv(path / f"{name}.csv") for name in TABLES if (path / f"{name}.csv").exists()}
        card = names[named] if named else measured_card(tables["linear"], read_csv(path / "ncu.csv"))
        return card, tables
    return names[named] if named else this_card(), {path.stem: read_csv(path)}


def main() -> None:
    """Calibrate, write a row for each kernel, and print medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="CSV of bench.run, or a folder of bench.gpu_session")
    parser.add_argument("--write", type=Path, required=True, help="CSV of medians and ranges")
    parser.add_argument("--rows", type=Path, help="CSV of every time")
    parser.add_argument(
        "--model", choices=[model.name for model in MODELS], help="rates by a card's data sheet, instead of measured rates"
    )
    arguments = parser.parse_args()
    (model, tables), record = _inputs(arguments.measured, arguments.model), read_csv(AOT)
    times = [row for name, rows in tables.items() for row in calibrate(rows, model, record, name)]
    if not times:
        raise SystemExit(f"no measured call that the record predicts for capability {model.capability}")
    if arguments.rows:
        write_csv(times, arguments.rows)
    summary = summarize(times)
    write_csv(summary, arguments.write)
    print(f"{model.name}: {model.bf16_tflops} TFLOP/s, {model.memory_gb_s} GB/s, {model.ghz} GHz; measured / predicted")
    for row in summary:
        sides = (
            f"{row[f'{side}_median']} ({row[f'{side}_least']} to {row[f'{side}_most']})"
            for side in ("over_bound", "over_waiting")
        )
        print(
            f"{row['table']:10} {row['ran']:20} {row['format']:6} {row['rows']:4}  bound {next(sides):22} waiting {next(sides)}"
        )
    if "sweep" in tables:
        print(f"a wait, fitted: {fitted_wait(tables['sweep'], model, record):.1f} clocks")


if __name__ == "__main__":
    main()
