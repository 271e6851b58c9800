"""Say what bounds each call, and how far it is from there, by rates measured in the same run.

    python -m bench.roofline --csv bench/results/linear.csv
    python -m bench.roofline --formats Q4_K --scale 32                # measures first

A call's roof is the longer of two times: its operations at the rate of torch's own product, and the bytes it must move (packed
weight, activation, output) at the rate of a copy. The share is that time divided by the measured time. Int8 and 16-bit
accumulation may pass 100 % of a roof that was measured in bf16.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.record import ROOT, read_csv, write_csv
from flux_kernels.report.text_table import aligned

COLUMNS = ("format", "provider", "m", "n", "k", "ms", "bound", "share", "of_matmul", "of_copy")


def roofline(rows: list[dict]) -> list[dict]:
    """Return what bounds each measured call whose ceilings are known, and the shares it reached."""
    bounded = []
    for row in rows:
        if not row["p50_ms"] or not row.get("share_of_matmul"):
            continue
        matmul, copy = float(row["share_of_matmul"]), float(row["share_of_copy"] or 0)
        names = {name: row[name] for name in ("format", "provider", "m", "n", "k")}
        bound = "compute" if matmul >= copy else "memory"
        # A library with weights of its own, whose bytes are not known.
        if not row["share_of_copy"]:
            bound = "?"
        shares = dict(share=max(matmul, copy), of_matmul=matmul, of_copy=copy if row["share_of_copy"] else "")
        bounded.append(names | dict(ms=row["p50_ms"], bound=bound) | shares)
    return bounded


def table(rows: list[dict]) -> str:
    """Return the rows as aligned text."""
    return "\n".join(aligned([COLUMNS, *([_cell(row[name]) for name in COLUMNS] for row in rows)], lambda *_: True))


def _cell(value) -> str:
    return f"{value:.1%}" if isinstance(value, float) else str(value)


def _measured(options: argparse.Namespace) -> list[dict]:
    """Run `bench.run` and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        command = [sys.executable, "-m", "bench.run", "--formats", options.formats, "--scale", str(options.scale)]
        command += ["--write", str(path), "--device", options.device]
        if subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
            raise SystemExit("bench.run failed, see above: no table of wrong or missing results")
        return read_csv(path)


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="recorded rows of bench.run or `flux-kernels bench`; without it, measure now")
    parser.add_argument("--formats", default="Q4_K,Q8_0", help="of a fresh run")
    parser.add_argument("--scale", type=int, default=1, help="of a fresh run: divide M and N by this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of a fresh run")
    parser.add_argument("--write", type=Path, help="CSV to write")
    options = parser.parse_args(arguments)
    if options.csv and not options.csv.exists():
        raise SystemExit(f"{options.csv} is not there. Name a CSV of bench.run, or leave --csv out to measure now.")
    rows = read_csv(options.csv) if options.csv else _measured(options)
    bounded = roofline(rows)
    if not bounded:
        raise SystemExit("no row has a time and measured ceilings (share_of_matmul): record them anew with bench.run")
    origin = {" ".join(row.get(name, "") for name in ("device", "dtype", "commit", "date")) for row in rows}
    print("\n".join(sorted(origin)))
    print(table(bounded))
    if options.write:
        write_csv(bounded, options.write)


if __name__ == "__main__":
    main()
