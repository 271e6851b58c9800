"""Run the session: see `bench.gpu_session`."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import shutil
import signal
import sys
import tarfile
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch

import bench.gpu_session
from bench.gpu_session import cache, summary
from bench.gpu_session.kernels import Kernel, save
from bench.gpu_session.sections import SECTIONS, Section
from bench.gpu_session.session import Session
from bench.record import ROOT
from bench.stand_in import CARDS
from flux_kernels.files import written_whole

_MARGIN, _LEAST_SECONDS, _LATE = 2.0, 12.0, 3
_STACK_SECONDS = 1.0  # before its limit, a section that did not stop by itself writes where it is
_HUNG = "out of time, no rows"
_DRY_SECONDS = 900.0
_ARCHIVE_BYTES = 14 << 20  # of what the archive takes in


@dataclass
class State:
    """Remember how each section ended, over calls."""

    path: Path
    ended: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> State:
        """Read what an earlier call left."""
        return cls(path, json.loads(path.read_text()) if path.exists() else {})

    def note(self, name: str, outcome: str) -> None:
        """Write how a section ended."""
        self.ended[name] = outcome
        self.path.write_text(json.dumps(self.ended, indent=1))

    def order(self, sections: tuple[Section, ...]) -> list[Section]:
        """Return what is left to do: not reached or out of time, then what may have hung, then what failed."""
        ended = {section: self.ended.get(section.name, "") for section in sections}
        left = [section for section in sections if ended[section] != "done"]
        return sorted(left, key=lambda section: 2 if ended[section].startswith("failed") else ended[section] == _HUNG)


def run_section(section: Section, out: Path, seconds: float, card: str | None = None, reduced: bool = False) -> str:
    """Run a section in its own process with a log; return "done", "out of time", or what failed."""
    before = _results(out, section)
    process = get_context("fork").Process(target=_inside, args=(section, out, seconds, card, reduced))
    process.start()
    process.join(seconds)
    late = process.is_alive()
    try:
        # The whole group: a section has processes of its own.
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.join()
    if late or process.exitcode == _LATE:
        return "out of time" if _results(out, section) > before else _HUNG
    if process.exitcode == 0:
        return "done"
    last = (out / f"{section.name}.log").read_text().strip().splitlines()[-1:]
    return f"failed: {' '.join(last)[:150]}"


def _results(out: Path, section: Section) -> int:
    """Count the rows that all sections have written, and the outcomes of tests in a section's log."""
    rows = sum(len(path.read_bytes().splitlines()) for path in out.glob("*.csv"))
    log = out / f"{section.name}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return rows + sum("PASSED" in line or "FAILED" in line for line in lines)


def _inside(section: Section, out: Path, seconds: float, card: str | None, reduced: bool) -> None:
    os.setsid()
    log = os.open(out / f"{section.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - it lives as long as the process
    sys.stderr = sys.stdout
    faulthandler.dump_traceback_later(max(seconds - _STACK_SECONDS, _STACK_SECONDS / 2), file=2)
    # If this process's parent ever computed on several threads, OpenMP would wait here for that team, which no fork has. One
    # thread makes operands as fast as many; what a section starts anew, such as tests, has all of them.
    torch.set_num_threads(1)
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("flux_kernels").setLevel(logging.INFO)
    session, code = Session(out, card is not None, time.monotonic() + seconds - _MARGIN, reduced=reduced), 1
    started = time.monotonic()
    try:
        _rehearse(section, session, card) if card else section.run(session)
        code = _LATE if session.late() else 0
        _note(section, session, time.monotonic() - started)
    except BaseException:  # noqa: BLE001 - the process ends here, and its log says why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _rehearse(section: Section, session: Session, card: str) -> None:
    from bench.gpu_session.dry import rehearsal

    kernels: list[Kernel] = []
    with rehearsal(card, kernels):
        try:
            section.run(session)
        finally:
            save(kernels, session.out / "kernels" / f"{section.name}.pickle")


def _note(section: Section, session: Session, seconds: float) -> None:
    facts = dict(expected=session.expected, seconds=seconds)
    path = session.out / "facts" / f"{section.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts))


def archive(out: Path, path: Path) -> None:
    """Pack the rows, logs and reports, the smallest first, as long as they fit."""
    left = _ARCHIVE_BYTES
    files = sorted((file for file in out.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    with written_whole(path) as part, tarfile.open(part, "w:gz") as tar:
        for file in files:
            left -= file.stat().st_size if file.suffix == ".gz" else file.stat().st_size // 8
            if left > 0:
                tar.add(file, file.relative_to(out))


def main(arguments: list[str] | None = None) -> int:
    """Run what is left of the session until the time is up; return 1 where a section failed."""
    parser = argparse.ArgumentParser(
        prog="bench.gpu_session", description=bench.gpu_session.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=cache.FOLDER / "rows", help="folder of rows, logs and reports")
    parser.add_argument("--results", type=Path, default=cache.FOLDER, help="folder of results.tar.gz and summary.txt")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--sections", help="comma-separated; default: all that are not done")
    parser.add_argument("--archive", type=Path, default=cache.ARCHIVE, help="kernels compiled ahead (bench.gpu_session.cache)")
    parser.add_argument("--commit", help="what rows call the code; default: what git says, or the archive where git is missing")
    parser.add_argument("--dry-run", action="store_true", help="on a stand-in driver; each section must run to its end")
    parser.add_argument("--reduced", action="store_true", help="a short dry run: one type, few calls")
    parser.add_argument("--card", choices=CARDS, default="H100", help="of the dry run")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    for folder in (options.out, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    records = options.out.resolve() / "records"
    # So that what is tuned here is used here.
    os.environ.setdefault("FLUX_KERNELS_TUNING", str(records))
    if options.dry_run:
        return dry_run(options)
    if not gpu_is_here():
        print("No GPU is seen here: `--dry-run` runs every section on a stand-in. Nothing was run or marked as done.")
        return 2
    manifest = cache.take_over(options.archive, cache.FOLDER, seconds=60)
    has_git = shutil.which("git") is not None and (ROOT / ".git").exists()
    commit = options.commit or (None if has_git else manifest.get("commit"))
    if commit:
        os.environ["FLUX_KERNELS_COMMIT"] = commit
    state = State.load(options.out / "state.json")
    for section in state.order(_chosen(options.sections)):
        left = end - time.monotonic()
        if left < _LEAST_SECONDS:
            print(f"{section.name}: no time left", flush=True)
            continue
        started = time.monotonic()
        state.note(section.name, run_section(section, options.out, min(left - _MARGIN, section.seconds)))
        print(f"{section.name}: {state.ended[section.name]} ({time.monotonic() - started:.0f} s)", flush=True)
        archive(options.out, options.results / "results.tar.gz")
    text = summary.write(options.out, options.results / "summary.txt", state.ended)
    archive(options.out, options.results / "results.tar.gz")
    print(text, flush=True)
    return int(any(outcome.startswith("failed") for outcome in state.ended.values()))


def gpu_is_here() -> bool:
    """Tell whether torch could use a GPU, without starting CUDA: sections are forked from this process."""
    return torch.version.cuda is not None and torch.cuda.device_count() > 0


def dry_run(options: argparse.Namespace) -> int:
    """Run every section on the stand-in, print its expected seconds; return 1 where one did not end."""
    failed = False
    # Of an earlier dry run: each measures all anew.
    for path in [*options.out.glob("*.csv"), *options.out.glob("*.json")]:
        path.unlink()
    rows = []
    for section in _chosen(options.sections):
        (options.out / f"{section.name}.log").unlink(missing_ok=True)
        outcome = run_section(section, options.out, _DRY_SECONDS, options.card, options.reduced)
        failed |= outcome != "done"
        print(f"{section.name}: {outcome}", flush=True)
        rows.append(summary.Expected.read(options.out, section))
    print(summary.expectations(rows))
    return int(failed)


def _chosen(names: str | None) -> tuple[Section, ...]:
    if names is None:
        return SECTIONS
    known = {section.name: section for section in SECTIONS}
    return tuple(known[name] for name in names.split(","))


if __name__ == "__main__":
    sys.exit(main())
