"""Turn what a session brought back into the rows that are kept in bench/results.

    tar xzf results.tar.gz -C out/session
    python -m bench.gpu_session.keep out/session bench/results/nvidia-h200

CSVs are copied; the outcomes of tests, the counters of Nsight Compute and the profiles of steps become CSVs with the origin of the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from flux_kernels.benchmark.record import write_csv

Row = dict[str, object]
_NCU, _LAUNCHED = "ncu.csv", "launched: "
_COUNTERS = {
    "kernel": "Kernel Name",
    "block": "Block Size",
    "grid": "Grid Size",
    "section": "Section Name",
    "metric": "Metric Name",
    "value": "Metric Value",
    "unit": "Metric Unit",
}
# What a counter can be at most, for each that was read.
_LIMIT = ".max_rate"
# Columns of torch's table from the right: calls, and host and device time of the operation itself. Names hold blanks.
_CALLS, _SELF_DEVICE, _SELF_HOST = -1, -5, -9
_TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def outcomes(report: Path) -> Iterator[Row]:
    """Yield each test of a JUnit report: passed, skipped, failed or error, and its seconds."""
    for case in ElementTree.parse(report).iter("testcase"):
        ended = next((child.tag for child in case if child.tag in ("skipped", "failure", "error")), "passed")
        yield {"test": case.get("name"), "outcome": ended, "seconds": case.get("time")}


def counters(report: Path) -> Iterator[Row]:
    """Yield each counter that Nsight Compute read, with what was launched, in the order of the launches."""
    lines = report.read_text().splitlines()
    launched: list[str] = []
    for piece in next(line for line in lines if line.startswith(_LAUNCHED)).removeprefix(_LAUNCHED).split(", "):
        # "small M Q4_K, 8" is one name.
        launched[-1:] = [f"{launched[-1]}, {piece}"] if piece.isdecimal() else [*launched[-1:], piece]
    table = lines[next(index for index, line in enumerate(lines) if line.startswith('"ID"')) :]
    what: dict[str, str] = {}
    for row in csv.DictReader(table):
        if row["ID"] not in what:
            # A weight's row scales are found on the way to its unpacking, by two kernels that have no name in the list.
            inner = row["Kernel Name"].startswith("row_")
            what[row["ID"]] = row["Kernel Name"] if inner else launched.pop(0)
        if row["Metric Name"] and not row["Metric Name"].endswith(_LIMIT):
            values = {ours: row[theirs] for ours, theirs in _COUNTERS.items()}
            yield {"what": what[row["ID"]], **values, "value": row["Metric Value"].replace(",", "")}


def profile(report: Path) -> Iterator[Row]:
    """Yield each operation of a profile, with its calls and milliseconds.

    Its file is called as Q4_K_ours_exact_1024x1024.profile.txt is.
    """
    name = report.name.removesuffix(".profile.txt")
    kind, size = name.rsplit("_", 1)
    provider = next(
        words for words in ("ours_exact", "ours_int8", "ours_fp16_accumulate", "dequantize", "torch") if words in kind
    )
    step = {"format": kind.removesuffix(f"_{provider}"), "provider": provider.replace("_", " ", 1), "size": size}
    for line in report.read_text().splitlines():
        words = line.split()
        if len(words) > 10 and words[_CALLS].isdecimal():
            times = {"self_device_ms": _ms(words[_SELF_DEVICE]), "self_host_ms": _ms(words[_SELF_HOST])}
            yield {**step, "name": " ".join(words[:-10]), "calls": words[_CALLS], **times}


def _ms(text: str) -> float:
    unit = next(unit for unit in _TIMES if text.endswith(unit) and text.removesuffix(unit).replace(".", "").isdecimal())
    return round(float(text.removesuffix(unit)) * _TIMES[unit], 3)


def keep(session: Path, folder: Path) -> None:
    """Write the rows of a session's folder into a folder of results."""
    origin = json.loads((session / "origin.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(session.glob("*.csv")):
        if path.name != _NCU:
            shutil.copyfile(path, folder / path.name)
    made = {
        "correctness": (outcomes, [session / "junit.xml"]),
        "ncu": (counters, [session / _NCU]),
        "profile": (profile, sorted(session.glob("*.profile.txt"))),
    }
    for name, (rows_of, reports) in made.items():
        rows = [{**row, **origin} for report in reports if report.exists() for row in rows_of(report)]
        if rows:
            write_csv(rows, folder / f"{name}.csv")


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path, help="folder of results.tar.gz, unpacked")
    parser.add_argument("folder", type=Path, help="such as bench/results/nvidia-h200")
    options = parser.parse_args(arguments)
    keep(options.session, options.folder)


if __name__ == "__main__":
    main()
