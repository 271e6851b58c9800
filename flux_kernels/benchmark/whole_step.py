"""Time a whole step, not its calls one by one: FLUX.1-dev at its true size on random packed weights, unquantized beside packed.

    python -m flux_kernels.benchmark.whole_step --write step.csv                    # on a GPU; torch and triton are enough
    python -m flux_kernels.benchmark.whole_step --write step.csv --device cpu       # the embedded model's step instead

Every row is written as soon as it is measured; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch

from ..base_pipeline import one_thread
from ..compute import COMPUTE_MODES
from ..embedded import PIPELINE_KWARGS, embedded_model_path
from ..errors import FormatError
from ..flux.calls import TEXT
from ..formats import get_format
from .record import append_csv, origin, read_csv
from .shapes import STEPS
from .step_model import StepConfig
from .step_timing import StepCase, measure_format

FORMATS = ("Q4_K", "Q6_K", "Q8_0")
_EMBEDDED_BATCH = 4  # 16 image tokens each: fewer rows than 17 would run every mode as "exact"
Key = tuple[str, str, str, str, str]  # format, provider, what, size, commit


def measure_steps(
    formats: Sequence[str],
    device: torch.device,
    *,
    size: str = "1024x1024",
    repeats: int = 5,
    full: bool | None = None,
    minutes: float | None = None,
    done: Collection[Key] = (),
    progress: Callable[[str], None] | None = None,
) -> Iterator[dict]:
    """Yield a row for each format and provider of one whole step, as each format is done.

    Args:
        formats: ggml types of the linear layers inside the blocks.
        device: where to run; bfloat16 on a GPU, float32 on a CPU.
        size: of the picture at true size, such as "1024x1024" or "1024x1024 batch 2"; the embedded model has its own.
        repeats: runs of each provider, in turn; the median counts.
        full: whether FLUX.1-dev at its true size is run; by default on a GPU alone. Otherwise the embedded model.
        minutes: no new format is begun after this time.
        done: `row_key` of the rows that are there already; a format of which all are there is not run again.
        progress: called with a few words on what is done next.

    Yields:
        Rows with the columns `step_timing.COLUMNS` and those of `record.origin`. A provider without a time says why in `note`.

    Raises:
        FormatError: on an unknown type or size.
    """
    names = [get_format(name).name for name in formats]
    full = device.type != "cpu" if full is None else full
    case = _true_size(size) if full else _embedded()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    end = None if minutes is None else time.monotonic() + 60 * minutes
    made_at, providers = _origin(device, full), _providers()
    for name in names:
        missing = [one for one in providers if (name, one, case.what, case.size, made_at["commit"]) not in done]
        if not missing or (end is not None and time.monotonic() > end):
            continue
        for row in _rows(case, name, providers, device, dtype, repeats, progress or (lambda _: None)):
            if row["provider"] in missing:
                yield row | made_at


def row_key(row: dict) -> Key:
    """Return what makes a row another measurement."""
    return row["format"], row["provider"], row["what"], row["size"], row["commit"]


def _rows(case: StepCase, *arguments) -> Iterator[dict]:
    if case.what == "step":
        yield from measure_format(case, *arguments)
        return
    with one_thread():
        rows = list(measure_format(case, *arguments))
    yield from rows


def _origin(device: torch.device, full: bool) -> dict[str, str]:
    if full:
        return origin(device)
    with one_thread():  # as the rows are measured
        return origin(device)


def _providers() -> list[str]:
    """List who is compared; where diffusers is missing, decoding in torch at every call stands for such layers, by its own name."""
    there = all(importlib.util.find_spec(name) for name in ("diffusers", "gguf"))
    return ["torch", "diffusers", *([] if there else ["dequantize"]), *(f"ours {mode}" for mode in COMPUTE_MODES)]


def _true_size(size: str) -> StepCase:
    found = re.fullmatch(r"(\d+)x(\d+)(?: batch (\d+))?", size)
    if found is None or int(found[1]) % 16 or int(found[2]) % 16:
        raise FormatError(f"A size is height x width in multiples of 16, got {size!r}. Known: {', '.join(STEPS)}.")
    return StepCase("step", size, StepConfig(), int(found[1]), int(found[2]), int(found[3] or 1), TEXT)


def _embedded() -> StepCase:
    folder = embedded_model_path() / "transformer"
    stored = None
    if importlib.util.find_spec("safetensors"):
        from safetensors.torch import load_file

        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    height, width = PIPELINE_KWARGS["height"], PIPELINE_KWARGS["width"]
    return StepCase(
        what="embedded step",
        size=f"{height}x{width} batch {_EMBEDDED_BATCH}",
        config=StepConfig.read(json.loads((folder / "config.json").read_text())),
        height=height,
        width=width,
        batch=_EMBEDDED_BATCH,
        text=PIPELINE_KWARGS["max_sequence_length"],
        stored=stored,
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, measure, and write every row as it comes; return 1 where a result of ours was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--write", type=Path, help="CSV to append rows to; rows of this commit that it has are not measured again"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", default=",".join(FORMATS), help="ggml types, comma-separated")
    parser.add_argument("--size", default="1024x1024", help='such as "1024x1024" or "1024x1024 batch 2"')
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="begin no new format after this time")
    parser.add_argument("--full", action="store_true", help="the true size on a CPU too: many minutes, and 10 GB or more")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    there = read_csv(options.write) if options.write and options.write.exists() else []
    rows = measure_steps(
        options.formats.split(","),
        device,
        size=options.size,
        repeats=options.repeats,
        full=True if options.full else None,
        minutes=options.minutes,
        done={row_key(row) for row in there},
        progress=lambda text: print(f"# {text}", flush=True),
    )
    wrong = False
    for row in rows:
        wrong |= row["provider"].startswith("ours") and row["note"].startswith("wrong result")
        print(f"{row['format']:8} {row['provider']:22} {row['p50_ms']:>10} ms  {row['error']:>9} {row['note']}", flush=True)
        if options.write:
            append_csv(row, options.write)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
