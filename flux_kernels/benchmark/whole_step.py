"""Time a whole step of FLUX.1-dev at its true size on random packed weights, and unquantized.

    python -m flux_kernels.benchmark.whole_step --write step.csv                    # on a GPU; torch and triton are enough
    python -m flux_kernels.benchmark.whole_step --write step.csv --device cpu       # the embedded model's step instead

At the true size every row is written as soon as its provider is timed; a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..backends import own_device
from ..errors import FormatError
from ..formats import get_format
from .names import OURS, WRONG
from .record import append_csv, read_csv
from .step.jobs import Key, denoising_job, step_job
from .step.timing import COLUMNS

FORMATS = ("Q4_K", "Q6_K", "Q8_0")


def measure_steps(
    formats: Sequence[str],
    device: torch.device,
    *,
    size: str = "1024x1024",
    repeats: int = 5,
    full: bool | None = None,
    minutes: float | None = None,
    denoising: bool = True,
    done: Collection[Key] = (),
    progress: Callable[[str], None] | None = None,
) -> Iterator[dict]:
    """Yield a row for each format and provider of a whole step as soon as it is there, then of denoising.

    Args:
        formats: ggml types of the linear layers inside the blocks.
        device: where to run; bfloat16 on a GPU, float32 on a CPU.
        size: of the picture at true size, such as "1024x1024" or "1024x1024 batch 2"; the embedded model has its own.
        repeats: runs of each provider, in turn; the median counts.
        full: whether FLUX.1-dev at its true size is run; by default on a GPU alone. Otherwise the embedded model.
        minutes: nothing new is begun after this time.
        denoising: whether the embedded model's pipeline is run too, from prompt to latents, without and with model offload.
        done: `row_key` of the rows that are there already; a format of which all are there is not run again.
        progress: called with a few words on what is done next.

    Yields:
        Rows with the columns `step.timing.COLUMNS` and those of `record.origin`. A provider without a time says why in `note`.

    Raises:
        FormatError: on an unknown type or size, before anything runs.
    """
    names = [get_format(name).name for name in formats]
    full = device.type != "cpu" if full is None else full
    jobs = [step_job(size, full, device, repeats)] + ([denoising_job(device, repeats)] if denoising else [])
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for job in jobs:
        for name in names:
            missing = {key for key in job.keys(name) if key not in done}
            if missing and (end is None or time.monotonic() < end):
                yield from (row for row in job.rows(name, progress or (lambda _: None)) if row_key(row) in missing)


def row_key(row: Mapping[str, str]) -> Key:
    """Return what makes a row another measurement."""
    return row["format"], row["provider"], row["what"], row["size"], row["commit"]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, write each row as it comes; return 1 where ours was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="CSV to append to; rows of this commit that it has are not measured again")
    parser.add_argument("--device", default=str(own_device()))
    parser.add_argument("--formats", default=",".join(FORMATS), help="ggml types, comma-separated")
    parser.add_argument("--size", default="1024x1024", help='of the true size, such as "1024x1024" or "1024x1024 batch 2"')
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn; the median counts")
    parser.add_argument("--minutes", type=float, help="begin nothing new after this time")
    parser.add_argument("--full", action="store_true", help="the true size on a CPU too: hours, and 12 GB or more")
    options = parser.parse_args(arguments)
    there = read_csv(options.write) if options.write and options.write.exists() else []
    if there and list(there[0])[: len(COLUMNS)] != list(COLUMNS):
        parser.error(f"{options.write} holds other rows than this version's of whole steps. Name another file.")
    rows = measure_steps(
        options.formats.split(","),
        torch.device(options.device),
        size=options.size,
        repeats=options.repeats,
        full=options.full or None,
        minutes=options.minutes,
        done={row_key(row) for row in there},
        progress=lambda text: print(f"# {text}", flush=True),
    )
    try:
        return int(sum(_show(row, options.write) for row in rows) > 0)
    except FormatError as error:
        parser.error(str(error))


def _show(row: dict, path: Path | None) -> bool:
    """Print and write a row; tell whether it is a wrong result of ours."""
    named = f"{row['format']:8} {row['what']:24} {row['provider']:20}"
    print(f"{named} {row['p50_ms']:>10} ms {row['error']:>9}  {row['note']}", flush=True)
    if path:
        append_csv(row, path)
    return row["provider"].startswith(OURS) and row["note"].startswith(WRONG)


if __name__ == "__main__":
    sys.exit(main())
