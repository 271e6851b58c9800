"""Write the generated tables of README.md and docs/decisions, or check that they are up to date.

python tools/write_readme_tables.py            # write
python tools/write_readme_tables.py --check    # exit code 1 and a diff where a page is behind
"""

from __future__ import annotations

import difflib
import sys
from math import prod
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
PREDICTED = README.parent / "docs" / "decisions" / "predictions.md"
RESULTS = README.parent / "bench" / "results"
FIDELITY, LINEAR = RESULTS / "embedded_fidelity.csv", RESULTS / "linear_cpu.csv"
sys.path.insert(0, str(README.parent))

from flux_kernels.benchmark.record import origin_text, read_csv
from flux_kernels.benchmark.totals import TWINS, Total, by_step, marked, totals
from flux_kernels.compute import COMPUTE_MODES
from flux_kernels.formats import FORMATS, PLAIN_TYPES, BlockFormat
from flux_kernels.models.architecture import Architecture, Variant
from flux_kernels.models.architectures import ARCHITECTURES
from flux_kernels.models.model_class import empty_model, parameter_shapes
from tools.gpu_tables import gpu_section


def model_table() -> str:
    """Return the table of ARCHITECTURES: published models, weights, and diffusers' pipelines."""
    lines = ["| models | weights | for diffusers' |", "|---|---|---|"]
    for row in reversed(ARCHITECTURES):
        alike = [row.published(variant.config) for variant in row.variants]
        sizes = [
            f"{' and '.join(one.name for one in group)} {_billions(row, group[0])}"
            for group, variant in zip(alike, row.variants)
            if group[0] is variant
        ]
        pipelines = ", ".join(f"`{name}`" for name in row.pipelines)
        lines.append(f"| {row.name}: {row.covers} | {', '.join(sizes)} | {pipelines} |")
    return "\n".join(lines)


def _billions(row: Architecture, variant: Variant) -> str:
    weights = sum(map(prod, parameter_shapes(empty_model(row, variant.config)).values()))
    return f"{weights / 1e9:.1f} B"


def format_table() -> str:
    """Return the markdown table of FORMATS, densest last."""
    lines = [
        "| type | bits/weight | weights a block | bytes a block | Triton kernels | quantizer |",
        "|---|---|---|---|---|---|",
    ]
    for fmt in sorted(FORMATS.values(), key=lambda fmt: -fmt.bits_per_weight):
        lines.append(f"| {' | '.join(_cells(fmt))} |")
    plain = ", ".join(name for name, plain in PLAIN_TYPES.items() if plain.dtype.is_floating_point)
    return "\n".join([*lines, "", f"The torch backend runs all of them. Plain tensors: {plain}."])


def _cells(fmt: BlockFormat) -> list[str]:
    return [
        fmt.name,
        f"{fmt.bits_per_weight:g}",
        str(fmt.block_size),
        str(fmt.type_size),
        "yes" if fmt.decode_tile is not None else "no",
        "yes" if fmt.quantize is not None else "libggml's, where installed",
    ]


def mode_table() -> str:
    """Return the table of embedded_fidelity.csv: PSNR and SSIM by type and compute mode."""
    rows = read_csv(FIDELITY)
    modes = list(dict.fromkeys(row["compute"] for row in rows))
    cells = {(row["format"], row["compute"]): f"{float(row['psnr_db']):.1f} dB, {float(row['ssim']):.4f}" for row in rows}
    lines = [f"| type | {' | '.join(modes)} |", "|---" * (len(modes) + 1) + "|"]
    for name in dict.fromkeys(row["format"] for row in rows):
        lines.append(f"| {name} | {' | '.join(cells[name, mode] for mode in modes)} |")
    first = rows[0]
    origin = f"{first['seeds']} pictures a cell, {first['device']}, torch {first['torch']}, commit {first['commit']}, {first['date']}"
    return "\n".join([*lines, "", f"PSNR and SSIM against the same pictures in 16 bit; {origin}."])


def linear_table() -> str:
    """Return the table of linear_cpu.csv: speed of a step's linear calls, torch's as 1, by type."""
    rows = read_csv(LINEAR)
    sides = {"diffusers": "diffusers' GGUF layers", **{f"ours {mode}": mode for mode in COMPUTE_MODES}}
    lines = [f"| type | {' | '.join(sides.values())} |", "|---" * (len(sides) + 1) + "|"]
    for (_, name), step_rows in by_step(rows).items():
        sums = totals(step_rows)
        lines.append(f"| {name} | {' | '.join(_beside_torch(sums, side) for side in sides)} |")
    first = rows[0]
    text = (
        f"Linear calls of one step, CPU: speed with unquantized torch as 1; more is faster, ~ means that no difference was seen. "
        f"{first['size']}, {first['dtype']}, {origin_text(first)}. {TWINS} **This says nothing about GPUs.**"
    )
    return "\n".join([*lines, "", text])


def _beside_torch(sums: dict[str, Total], side: str) -> str:
    if not {side, "torch"} <= sums.keys():
        return "not measured"
    return marked(sums[side], sums["torch"])


def gpu_table() -> str:
    """Return the tables of the GPUs that bench/results has a folder of."""
    return gpu_section(RESULTS)


def prediction_table() -> str:
    """Return the table of predictions.csv: milliseconds of a step's linears by card, type and mode."""
    rows = read_csv(RESULTS / "predictions.csv")
    modes = list(dict.fromkeys(row["compute"] for row in rows))
    cells = {(row["card"], row["format"], row["compute"]): _predicted(row) for row in rows}
    lines = [f"| card | type | {' | '.join(modes)} | torch, bf16 |", "|---" * (len(modes) + 3) + "|"]
    for row in {(row["card"], row["format"]): row for row in rows}.values():
        predicted = [cells.get((row["card"], row["format"], mode), "refused") for mode in modes]
        lines.append(f"| {row['card']} | {row['format']} | {' | '.join(predicted)} | {float(row['bf16_ms']):.0f} ms |")
    return "\n".join([*lines, "", f"Triton {rows[0]['triton']}, {rows[0]['date']}."])


def _predicted(row: dict[str, str]) -> str:
    """Write a prediction as bound and, where it differs by a hundredth, as the time with waits."""
    best, worst = float(row["ratio"]), float(row["ratio_waiting"])
    milliseconds, most = (f"{float(row[name]):.0f}" for name in ("predicted_ms", "predicted_ms_waiting"))
    if abs(best - worst) < 0.01:
        return f"{milliseconds} ms ({best:.2f}x)"
    return f"{milliseconds} to {most} ms ({worst:.2f} to {best:.2f}x)"


PAGES = {
    README: {"models": model_table, "formats": format_table, "modes": mode_table, "gpus": gpu_table, "linears": linear_table},
    PREDICTED: {"predictions": prediction_table},
}


def with_tables(page: Path, text: str) -> str:
    """Return a page with every table between its markers; raise ValueError where a marker is missing."""
    for name, table in PAGES[page].items():
        start, end = f"<!-- {name}: written by tools/write_readme_tables.py -->", f"<!-- end of {name} -->"
        before, opened, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise ValueError(f"{page.name} needs the lines {start!r} and {end!r}, the table goes between them.")
        text = f"{before}{start}\n{table()}\n{end}{after}"
    return text


def main(check: bool) -> int:
    """Write the pages, or compare them with what would be written; return the exit code."""
    behind = []
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = with_tables(page, old)
        if not check:
            page.write_text(new, encoding="utf-8")
        elif new != old:
            behind += difflib.unified_diff(old.splitlines(), new.splitlines(), page.name, "should be", lineterm="")
    if behind:
        print("\n".join([*behind, "A page is behind the code or the results. Run: make tables"]))
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
