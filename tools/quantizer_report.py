"""Compare the quantizers with libggml's: error, worst row and single-thread speed.

    python -m tools.quantizer_report                      # prints the table and writes bench/results/quantizers.csv
    python -m tools.quantizer_report --types Q4_K,Q5_K --rows 64 --out -

`ratio` is the root of the summed squared error (times importance) over libggml's; `worst_row` the largest such ratio of a row,
with an allowance of 1e-6 of the row's norm, so that rows both hold to float32's precision count as equal. Speeds are the best
of interleaved runs of one thread each, in millions of weights per second of processor time.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.record import RESULTS
from flux_kernels import dequantize, quantize
from flux_kernels.benchmark.record import commit
from flux_kernels.formats import FORMATS
from flux_kernels.generation.embedded import embedded_model_path

ALLOWANCE = 1e-6
K = 3072


def student(shape: tuple[int, int], degrees: int, generator: torch.Generator) -> torch.Tensor:
    """Draw from Student's t."""
    chi = torch.randn(*shape, degrees, generator=generator).square().mean(-1)
    return torch.randn(shape, generator=generator) / chi.sqrt()


def made_weights(rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and float32 [rows, K] of each distribution."""
    generator = torch.Generator().manual_seed(0)
    normal = 0.02 * torch.randn(rows, K, generator=generator)
    uniform = torch.rand(rows, K, generator=generator)
    yield "gaussian", normal
    yield "student-t 3", 0.02 * student((rows, K), 3, generator)
    yield "student-t 2", 0.02 * student((rows, K), 2, generator)
    yield "sparse 10%", normal * (uniform < 0.1)
    yield "sparse 1%", normal * (uniform < 0.01)
    yield "constant rows", normal[:, :1].expand(-1, K).contiguous()
    yield "constant blocks", normal[:, ::32].repeat_interleave(32, dim=1)
    yield "outlier columns", normal * torch.where(torch.arange(K) % 37 == 0, 30.0, 1.0)
    yield "uniform", 0.1 * uniform - 0.05
    yield "positive", normal.abs()
    yield "shifted", 0.1 + normal / 2
    yield "times 1e-5", normal * 1e-5
    yield "times 1e6", normal * 1e6


def real_weights(rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the embedded model's block matrices, of each K together, at most `rows` rows."""
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted((embedded_model_path() / "transformer").glob("*.safetensors")):
        tensors.update(load_file(path))
    by_k: dict[int, list[torch.Tensor]] = {}
    for name, weight in sorted(tensors.items()):
        if "transformer_blocks" in name and weight.dim() == 2 and weight.shape[1] % 256 == 0:
            by_k.setdefault(weight.shape[1], []).append(weight.float())
    for k, weights in sorted(by_k.items()):
        stacked = torch.cat(weights)
        yield f"embedded model K={k}", stacked[:: max(1, stacked.shape[0] // rows)].contiguous()


def root_error(x: torch.Tensor, packed: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
    """Return the root of the summed squared error of each row, float64 [rows]."""
    squares = (x.double() - dequantize(packed, name).double()).square()
    return (squares if importance is None else squares * importance).sum(-1).sqrt()


def compare(name: str, x: torch.Tensor, importance: torch.Tensor | None) -> dict[str, float]:
    """Compare both quantizers on rows x."""
    ours = root_error(x, quantize(x, name, importance, engine="torch"), name, importance)
    theirs = root_error(x, quantize(x, name, importance, engine="libggml"), name, importance)
    squares = x.double().square() if importance is None else x.double().square() * importance
    norm = squares.sum(-1).sqrt()
    return {
        "rel_rms": float(ours.norm() / norm.norm()),
        "libggml_rel_rms": float(theirs.norm() / norm.norm()),
        "ratio": float((ours.norm() + ALLOWANCE * norm.norm()) / (theirs.norm() + ALLOWANCE * norm.norm())),
        "worst_row": float(((ours + ALLOWANCE * norm) / (theirs + ALLOWANCE * norm)).max()),
    }


def speeds(name: str, x: torch.Tensor, importance: torch.Tensor | None, repeats: int = 5) -> dict[str, float]:
    """Time both in turns, one thread each; the best of each."""
    best = dict.fromkeys(("torch", "libggml"), float("inf"))
    for _ in range(repeats):
        for engine, seconds in list(best.items()):
            start = time.process_time()
            quantize(x, name, importance, engine=engine)
            best[engine] = min(seconds, time.process_time() - start)
    rate = {engine: x.numel() / seconds / 1e6 for engine, seconds in best.items()}
    return {"mweights_s": rate["torch"], "libggml_mweights_s": rate["libggml"], "speed_ratio": rate["torch"] / rate["libggml"]}


def origin() -> dict[str, str]:
    """Say where the numbers come from."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, 1 thread",
        "torch": torch.__version__,
        "libggml": importlib.metadata.version("libggml-python"),
    }


def rows_of_report(types: list[str], rows: int) -> Iterator[dict[str, object]]:
    """Yield one line per type, kind of weights and importance."""
    where = origin()
    samples = [*made_weights(rows), *real_weights(rows)]
    generator = torch.Generator().manual_seed(1)
    for name in types:
        for kind, x in samples:
            for label in ("none", "log-normal"):
                importance = None if label == "none" else torch.randn(x.shape[1], generator=generator).exp()
                line: dict[str, object] = {"type": name, "weights": kind, "importance": label}
                line.update(compare(name, x, importance))
                line.update(speeds(name, x, importance) if kind == "gaussian" else {})
                yield {**line, **where}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(name for name, fmt in FORMATS.items() if fmt.quantize is not None))
    parser.add_argument("--rows", type=int, default=170, help="rows of each kind of weights; 170 fill two chunks of a search")
    parser.add_argument("--out", default=str(RESULTS / "quantizers.csv"), help="CSV to write, - for none")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for line in rows_of_report(arguments.types.split(","), arguments.rows):
        lines.append({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in line.items()})
        shown = "  ".join(f"{key} {lines[-1][key]}" for key in ("ratio", "worst_row", "speed_ratio") if key in line)
        print(f"{line['type']:7s} {line['weights']:24s} {line['importance']:11s} {shown}", flush=True)
    if arguments.out != "-":
        header = max(lines, key=len)
        with open(arguments.out, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(header), restval="")
            writer.writeheader()
            writer.writerows(lines)
        print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
