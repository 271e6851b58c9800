"""Write the generated tables of README.md between their markers, or check that they are up to date.

python tools/write_readme_tables.py            # write
python tools/write_readme_tables.py --check    # exit code 1 and a diff where README.md is behind
"""

from __future__ import annotations

import csv
import difflib
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
FIDELITY = README.parent / "bench" / "results" / "embedded_fidelity.csv"
sys.path.insert(0, str(README.parent))

from flux_kernels.formats import FORMATS, PLAIN_TYPES, BlockFormat


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
    """Return the markdown table of bench/results/embedded_fidelity.csv: PSNR by type and compute mode."""
    with FIDELITY.open(newline="") as file:
        rows = list(csv.DictReader(file))
    modes = list(dict.fromkeys(row["compute"] for row in rows))
    found = {(row["format"], row["compute"]): f"{float(row['psnr_db']):.1f} dB" for row in rows}
    lines = [f"| type | {' | '.join(modes)} |", "|---" * (len(modes) + 1) + "|"]
    for name in dict.fromkeys(row["format"] for row in rows):
        lines.append(f"| {name} | {' | '.join(found[name, mode] for mode in modes)} |")
    one = rows[0]
    made = f"{one['seeds']} pictures a cell, {one['device']}, torch {one['torch']}, commit {one['commit']}, {one['date']}"
    return "\n".join([*lines, "", f"PSNR against the same pictures in 16 bit; {made}."])


TABLES = {"formats": format_table, "modes": mode_table}


def with_tables(text: str) -> str:
    """Return `text` with every table between its markers; raise ValueError where a marker is missing."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name}: written by tools/write_readme_tables.py -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"README.md needs the lines {start!r} and {end!r}, the table goes between them.")
        text = f"{before}{start}\n{table()}\n{end}{after}"
    return text


def main(check: bool) -> int:
    """Write README.md, or compare it with what would be written; return the exit code."""
    old = README.read_text(encoding="utf-8")
    new = with_tables(old)
    if not check:
        README.write_text(new, encoding="utf-8")
        return 0
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "should be", lineterm=""))
    if diff:
        print("\n".join([*diff, "README.md is behind the code. Run: make tables"]))
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
