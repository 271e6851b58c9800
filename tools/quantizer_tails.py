"""Look for rows that libggml quantizes better: by type, weights, row length and importance.

    python -m tools.quantizer_tails                      # prints the cells that break the promise, and the worst of each type
    python -m tools.quantizer_tails --types Q5_K --weights 100000

The promise: no row more than 1 % worse than libggml's in the root of sum(importance * error^2), and each cell better taken
together. Each row gets an allowance of 1e-6 of its norm, float32's share.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from flux_kernels import quantize
from flux_kernels.formats import FORMATS
from tools.quantizer_report import ALLOWANCE, real_weights, root_error, student

LENGTHS = (256, 512, 3072)
NOISES = (0.001, 0.01, 0.1, 0.3)
IMPORTANCES = ("none", "ones", "chi-squared", "log-normal", "outliers", "sparse")


def weights_of(rows: int, k: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and float32 [rows, k] of each kind of weights."""
    normal = 0.02 * torch.randn(rows, k, generator=generator)
    uniform = torch.rand(rows, k, generator=generator)
    yield "gaussian", normal
    yield "student-t 2", 0.02 * student((rows, k), 2, generator)
    yield "laplace", 0.02 * torch.sign(normal) * -torch.log(uniform.clamp(min=1e-7))
    yield "sparse 10%", normal * (uniform < 0.1)
    yield "sparse 5%", normal * (uniform < 0.05)
    yield "sparse 1%", normal * (uniform < 0.01)
    yield "outlier columns", normal * torch.where(torch.arange(k) % 37 == 0, 30.0, 1.0)
    yield "smooth", _smooth(rows, k)
    yield "positive", normal.abs()
    yield "tiny", normal * 1e-5
    yield "huge", normal * 1e6
    yield "constant", normal[:, :1].expand(-1, k).contiguous()
    yield "two values", torch.where(uniform < 0.3, normal[:, :1], normal[:, 1:2])
    for noise in NOISES:
        yield f"near constant {noise:g}", normal[:, :1].sign() * (1 + noise * uniform)
        yield f"constant + {noise:g} noise", normal[:, :1] * (1 + 50 * noise * normal)


def _smooth(rows: int, k: int) -> torch.Tensor:
    """Make waves under a bump that travels over the row: small at the ends, as functions of the column."""
    place = torch.linspace(-6, 6, k)
    return torch.stack([torch.exp(-((place - c) ** 2)) * torch.sin(3 * place + c) for c in torch.linspace(-4, 4, rows)])


def importance_of(kind: str, k: int, generator: torch.Generator) -> torch.Tensor | None:
    """Make importance [k] of a kind, or None."""
    normal = torch.randn(k, generator=generator)
    chosen = torch.rand(k, generator=generator)
    return {
        "none": None,
        "ones": torch.ones(k),
        "chi-squared": normal.square() + 1e-3,
        "log-normal": (1.5 * normal).exp(),
        "outliers": torch.where(chosen < 0.02, 1000.0, 1.0) * normal.exp(),
        "sparse": normal.exp() * (chosen < 0.3),
    }[kind]


@dataclass
class Cell:
    """Hold one comparison of (type, weights, K, importance): the rows' root errors, ours and libggml's."""

    name: str
    kind: str
    k: int
    importance: str
    ours: torch.Tensor
    theirs: torch.Tensor

    @property
    def ratio(self) -> float:
        """Return the root of the summed squares over libggml's."""
        return float(self.ours.norm() / self.theirs.norm().clamp(min=1e-300))

    @property
    def rows(self) -> torch.Tensor:
        """Return the ratio of each row."""
        return self.ours / self.theirs.clamp(min=1e-300)

    @property
    def kept(self) -> bool:
        """Tell whether the promise is kept."""
        return self.ratio <= 1 and float(self.rows.max()) <= 1.01


def cells(types: list[str], weights: int, lengths: tuple[int, ...] = LENGTHS, cache: Path | None = None) -> Iterator[Cell]:
    """Compare both quantizers in every cell, on about so many weights each.

    `cache` keeps libggml's errors between runs.
    """
    for k in lengths:
        generator = torch.Generator().manual_seed(k)
        rows = max(4, weights // k)
        samples = [*weights_of(rows, k, generator), *((n, x) for n, x in real_weights(rows) if x.shape[1] == k)]
        for kind, x in samples:
            for label in IMPORTANCES:
                importance = importance_of(label, k, generator)
                for name in types:
                    yield Cell(name, kind, k, label, *compare(name, x, importance, cache))


def compare(
    name: str, x: torch.Tensor, importance: torch.Tensor | None, cache: Path | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the root error of each row, ours and libggml's, both with the allowance."""
    scale = x.double().square() if importance is None else x.double().square() * importance
    allowance = ALLOWANCE * scale.sum(-1).sqrt()
    ours = root_error(x, quantize(x, name, importance, engine="torch"), name, importance)
    # Its fp16 scales may overflow.
    theirs = _libggml(name, x, importance, cache).nan_to_num(nan=torch.inf)
    return ours + allowance, theirs + allowance


def _libggml(name: str, x: torch.Tensor, importance: torch.Tensor | None, cache: Path | None) -> torch.Tensor:
    parts = (x,) if importance is None else (x, importance)
    digest = hashlib.sha256(name.encode() + b"".join(t.contiguous().numpy().tobytes() for t in parts)).hexdigest()
    path = None if cache is None else cache / f"{digest}.pt"
    if path is not None and path.exists():
        return torch.load(path)
    errors = root_error(x, quantize(x, name, importance, engine="libggml"), name, importance)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(errors, path)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(name for name, fmt in FORMATS.items() if fmt.quantize is not None))
    parser.add_argument("--weights", type=int, default=1 << 18, help="of each cell; rows are this over K")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--cache", type=Path, help="folder for libggml's errors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lengths = tuple(map(int, arguments.lengths.split(",")))
    worst: dict[str, list[float]] = {}
    for cell in cells(arguments.types.split(","), arguments.weights, lengths, arguments.cache):
        rows = cell.rows
        over = int((rows > 1.01).sum())
        if not cell.kept:
            where = f"{cell.name:7s} {cell.kind:24s} K={cell.k:<5d} {cell.importance:12s}"
            print(f"{where} ratio {cell.ratio:.4f}  worst {rows.max():.4f}  over {over} of {len(rows)}", flush=True)
        total = worst.setdefault(cell.name, [0, 0, 0, 0, 0])
        total[:] = [
            *(total[0] + 1, total[1] + (not cell.kept), max(total[2], cell.ratio)),
            *(max(total[3], float(rows.max())), total[4] + over),
        ]
    for name, (count, broken, ratio, row, over) in worst.items():
        print(f"{name:7s} {count} cells, {broken} broken; worst ratio {ratio:.4f}, worst row {row:.4f}, rows over 1.01: {over}")


if __name__ == "__main__":
    main()
