"""Compile ahead, without a GPU, what the session launches, into an archive for the GPU machine.

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d out triton==3.6.0
    PYTHONPATH=out/triton-3.6.0 python -m bench.gpu_session.cache --wheel out/triton-3.6.0-cp312-....whl

Compile with the Triton that the GPU machine has, from the very commit that will run there (names of cache entries depend on
both); --wheel names the file that is installed there, whose key the entries get. A second run compiles only what changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import cache as triton_cache

from bench.gpu_session.kernels import Kernel, compile_all, distinct, load, save
from bench.gpu_session.key import short, triton_key_of
from bench.record import ROOT
from flux_kernels.benchmark.record import commit

FOLDER = ROOT / "out" / "gpu_session"
ARCHIVE = FOLDER / "cache.tar.xz"
_ENTRIES, _KERNELS, _MANIFEST = "triton", "kernels.pickle", "manifest.json"


@contextmanager
def keyed(key: str, folder: Path) -> Iterator[None]:
    """Let Triton read and write a cache folder under a key of our own."""
    before, directory = triton_cache.triton_key, triton.knobs.cache.dir
    triton_cache.triton_key = lambda: key
    triton.knobs.cache.dir = str(folder)
    try:
        yield
    finally:
        triton_cache.triton_key, triton.knobs.cache.dir = before, directory


def collect(cards: list[str], folder: Path, sections: str | None = None) -> list[Kernel]:
    """Return what the session, or some sections of it, launches on each card, by dry runs."""
    kernels = []
    for card in cards:
        out = folder / f"dry_{card}"
        command = [sys.executable, "-m", "bench.gpu_session", "--dry-run", "--card", card, "--out", str(out)]
        shutil.rmtree(out / "kernels", ignore_errors=True)
        command += ["--sections", sections] if sections else []
        subprocess.run(command, cwd=ROOT, check=True)
        kernels += [kernel for path in sorted(out.glob("kernels/*.pickle")) for kernel in load(path)]
    return kernels


def pack(kernels: list[Kernel], folder: Path, manifest: dict, archive: Path) -> None:
    """Write the archive: cache entries, the list of kernels, and where they come from."""
    save(kernels, folder / _KERNELS)
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as tar:
        for name in (_MANIFEST, _KERNELS):
            tar.add(folder / name, name)
        for entry in sorted(kernel.folder for kernel in kernels):
            if (folder / _ENTRIES / entry).is_dir():
                tar.add(folder / _ENTRIES / entry, f"{_ENTRIES}/{entry}")


def unpack(archive: Path, folder: Path) -> dict:
    """Unpack the archive where the session's cache will be; return its manifest.

    Triton writes whole paths into an entry: of its files in their list, and of libdevice in the metadata. They become those of here.
    """
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for group in (folder / _ENTRIES).glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps(dict(child_paths={name: str(group.parent / name) for name in names})))
        for file in (group.parent / name for name in names if name.endswith(".json")):
            metadata = json.loads(file.read_text())
            file.write_text(json.dumps(metadata | dict(extern_libs=_libraries(**metadata["target"]))))
    return json.loads((folder / _MANIFEST).read_text())


@cache
def _libraries(**target: object) -> tuple[tuple[str, str], ...]:
    """Return the names and paths of the device libraries that this machine's Triton links."""
    return make_backend(GPUTarget(**target)).parse_options({}).extern_libs


def take_over(archive: Path, folder: Path, seconds: float, processes: int = os.cpu_count() or 1) -> dict:
    """Make the archive's kernels this machine's cache, compile what is missing; return the manifest.

    Call it before anything asks for a GPU: it forks. The environment it sets is for this process and those it starts.
    """
    own = triton_cache.triton_key()
    # Another ptxas would be another key.
    os.environ.pop("TRITON_PTXAS_PATH", None)
    os.environ["TRITON_CACHE_DIR"] = str(folder / _ENTRIES)
    print(f"Triton {triton.__version__}, own key {short(own)}", flush=True)
    if not archive.exists():
        print(f"no archive {archive}: kernels compile as they are launched", flush=True)
        return {}
    manifest: dict = {}
    try:
        with _phase("unpacked"):
            manifest.update(unpack(archive, folder))
        print(f"archive key {short(manifest['key'])} of commit {manifest['commit']}, Triton {manifest['triton']}", flush=True)
        if manifest["key"] != own:
            _use_key(manifest["key"], folder)
        os.environ["TRITON_KERNELS_CARRIED"] = "1"
        _complete(load(folder / _KERNELS), folder / _ENTRIES, seconds, processes)
    except Exception:  # noqa: BLE001 - whatever is wrong with an archive, kernels can still compile as they are launched
        traceback.print_exc(file=sys.stdout)
        print("the archive is not used any further: what it lacks compiles as it is launched", flush=True)
    return manifest


def _complete(kernels: list[Kernel], entries: Path, seconds: float, processes: int) -> None:
    """Compile in parallel what a cache lacks."""
    with _phase("looked for"):
        missing = [kernel for kernel in kernels if not kernel.cached(entries)]
    print(f"{len(kernels) - len(missing)} of {len(kernels)} kernels are there", flush=True)
    with _phase("compiled"):
        done, failed = compile_all(missing, processes, seconds)
    print(f"{done} compiled here, {len(failed)} failed", *failed[:5], sep="\n  ", flush=True)


@contextmanager
def _phase(name: str) -> Iterator[None]:
    """Print how long a phase took."""
    started = time.monotonic()
    yield
    print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)


def _use_key(key: str, folder: Path) -> None:
    """Use the archive's key in this process and in those it starts."""
    (folder / "triton_key").write_text(key)
    os.environ["TRITON_KEY_FILE"] = str(folder / "triton_key")
    on_start = str(Path(__file__).with_name("on_start"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [on_start, os.environ.get("PYTHONPATH")]))
    triton_cache.triton_key = lambda: key


def main() -> int:
    """Collect, compile and pack; return 1 where kernels failed to compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--wheel", type=Path, required=True, help="the triton wheel of the GPU machine, or a folder of it unpacked"
    )
    parser.add_argument("--archive", type=Path, default=ARCHIVE)
    parser.add_argument("--cards", default="H100,H200", help="whose choices are compiled for")
    parser.add_argument("--sections", help="comma-separated; default: all")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    key, folder = triton_key_of(options.wheel), FOLDER / "build"
    if not key.startswith(triton.__version__):
        parser.error(f"the wheel is not of Triton {triton.__version__}, which runs here; put that version first on PYTHONPATH")
    print(f"own key {short(triton_cache.triton_key())}, the wheel's {short(key)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    launched = collect(options.cards.split(","), folder, options.sections)
    with keyed(key, folder / _ENTRIES):
        kernels = distinct(launched)
        missing = [kernel for kernel in kernels if not kernel.cached(folder / _ENTRIES)]
        print(f"{len(kernels)} distinct kernels, {len(missing)} to compile", flush=True)
        started = time.monotonic()
        done, failed = compile_all(missing, options.processes)
        manifest = dict(key=key, triton=triton.__version__, commit=commit(), kernels=len(kernels), failed=failed)
        pack(kernels, folder, manifest, options.archive)
    size = options.archive.stat().st_size
    print(
        f"{done} compiled in {time.monotonic() - started:.0f} s, {len(failed)} failed; {options.archive}: {size / 1e6:.1f} MB"
    )
    print(*failed, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
