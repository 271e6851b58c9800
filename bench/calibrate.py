"""Put the compile-time model's predictions beside measured calls of the same card, with the error of each.

    python -m bench.calibrate --csv results/linear.csv --write results/calibration.csv

The model (bench/aot/model.py) gives a lower bound; measured / predicted tells how far a card is from it, and where the
model is wrong. Rows of other cards than the CSV's, and of modes or formats that bench/results/aot.csv lacks, are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch

from bench.aot.model import KERNEL, MODELS, Model, call_ms, kernel_of
from flux_kernels.benchmark.ceilings import measure_ceilings
from flux_kernels.benchmark.record import read_csv, write_csv
from flux_kernels.flux.calls import Call

RECORD = Path(__file__).parent / "results" / "aot.csv"


def this_card() -> Model:
    """Describe the GPU of this machine: multiprocessors and clock as its driver says, rates as measured now."""
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    ceilings = measure_ceilings(device, torch.bfloat16)
    return Model(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.clock_rate / 1e6,
        ceilings.matmul_tflops,
        ceilings.copy_gb_s,
    )


def calibrate(rows: list[dict], model: Model, record: list[dict]) -> list[dict]:
    """Return a row for each measured call of ours that the model predicts: both times, their ratio, and where they come from."""
    found = []
    for row in rows:
        mode = row["provider"].removeprefix("ours ")
        if mode not in KERNEL or mode == row["provider"] or not row["p50_ms"]:
            continue
        call = Call(int(row["m"]), int(row["n"]), int(row["k"]), int(row["calls"]), row["where"])
        try:
            predicted = call_ms(model, mode, row["format"], call, kernel_of(model, mode, row["format"], record))
        except LookupError:
            continue
        measured = float(row["p50_ms"])
        found.append(
            {name: row[name] for name in ("format", "m", "n", "k", "calls", "where")}
            | dict(compute=mode, predicted_ms=f"{predicted:.4f}", measured_ms=f"{measured:.4f}")
            | dict(measured_over_predicted=f"{measured / predicted:.3f}", model=model.name)
            | {name: row.get(name, "") for name in ("device", "driver", "torch", "triton", "commit", "date")}
        )
    return found


def main() -> None:
    """Calibrate, write the rows, and print the median ratio of each mode."""
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
    for mode in dict.fromkeys(row["compute"] for row in found):
        ratios = [float(row["measured_over_predicted"]) for row in found if row["compute"] == mode]
        print(f"{mode:16} measured / predicted: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
