"""Put the compile-time model's predictions beside measured calls of the same card, with the error of each.

    python -m bench.calibrate --csv results/linear.csv --write results/calibration.csv

The model (bench/aot/model.py) gives a lower bound; measured / predicted tells how far a card is from it, and where the
model is wrong. Like is compared with like: a row of a mode with what the default table runs for its call, a row of one algorithm
("ours fused") with that algorithm, torch's own product with torch's. What bench/results/aot.csv lacks is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch

from bench.aot.cards import CARDS, CONVERT_RATES
from bench.aot.model import MODELS, MODES, Case, Model, Record, call_ms, choice_of, torch_ms
from flux_kernels.benchmark.ceilings import measure_ceilings
from flux_kernels.benchmark.record import read_csv, write_csv
from flux_kernels.flux.calls import Call
from flux_kernels.formats import FORMATS
from flux_kernels.kernels.choice import ALGORITHMS, Choice, tile_of

RECORD = Path(__file__).parent / "results" / "aot.csv"
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def this_card() -> Model:
    """Describe the GPU of this machine: multiprocessors and clock as its driver says, bf16 rate and memory as measured now."""
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


def calibrate(rows: list[dict], model: Model, record: list[dict]) -> list[dict]:
    """Return a row for each measured call that the model predicts: what ran, both times, their ratio, and where they come from.

    A time is predicted with both rates of conversion; the ratio is that to the smaller one.
    """
    recorded, found = Record(record), []
    for row in rows:
        call = Call(int(row["m"]), int(row["n"]), int(row["k"]), int(row["calls"]), row["where"])
        dtype = _DTYPES.get(row.get("dtype") or "bfloat16")
        cases = [Case(model, recorded, row["format"], dtype, rate) for rate in sorted(CONVERT_RATES, reverse=True)]
        try:
            ran, predicted = _predicted(cases, row["provider"], call)
        except LookupError:
            continue
        if not row["p50_ms"]:
            continue
        measured = float(row["p50_ms"])
        found.append(
            {name: row[name] for name in ("format", "m", "n", "k", "calls", "where")}
            | dict(dtype=dtype, provider=row["provider"], ran=ran)
            | dict(predicted_ms=f"{predicted[0]:.4f}", predicted_ms_slow_convert=f"{predicted[-1]:.4f}")
            | dict(measured_ms=f"{measured:.4f}", measured_over_predicted=f"{measured / predicted[0]:.3f}", model=model.name)
            | {name: row.get(name, "") for name in ("device", "driver", "torch", "triton", "commit", "date")}
        )
    return found


def _predicted(cases: list[Case], provider: str, call: Call) -> tuple[str, list[float]]:
    """Return what a provider runs for a call, as text, and its time in each case.

    Raises:
        LookupError: for a provider that is not ours or torch, a dtype or a kernel that the model does not know.
    """
    case, own = cases[0], provider.removeprefix("ours ")
    if case.dtype is None:
        raise LookupError("a dtype that the report does not compile")
    if provider == "torch":
        return "torch", [torch_ms(case, call) for case in cases]
    if own in MODES:
        ran, choice = choice_of(case, own, call)
        return str(choice) if ran == "exact" else f"{ran} {choice}", [call_ms(case, own, call) for case in cases]
    if own == provider or own not in ALGORITHMS["exact"]:
        raise LookupError(f"the model does not know {provider}")
    tile = tile_of(own, FORMATS[case.format], call.m, call.n, call.k, divmod(case.model.capability, 10))
    choice = Choice(own, tile, "named")
    return str(choice), [call_ms(case, "exact", call, choice) for case in cases]


def main() -> None:
    """Calibrate, write the rows, and print the median ratio of each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="rows of bench.run")
    parser.add_argument("--write", type=Path, required=True)
    names = {model.name: model for model in MODELS}
    parser.add_argument("--model", choices=names, help="a card by name, instead of the one in this machine")
    arguments = parser.parse_args()
    model = names[arguments.model] if arguments.model else this_card()
    found = calibrate(read_csv(arguments.csv), model, read_csv(RECORD))
    if not found:
        raise SystemExit(f"no measured call that the record predicts for capability {model.capability}")
    write_csv(found, arguments.write)
    for provider in dict.fromkeys(row["provider"] for row in found):
        ratios = [float(row["measured_over_predicted"]) for row in found if row["provider"] == provider]
        print(f"{provider:22} measured / predicted: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
