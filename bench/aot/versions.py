"""Run the compile-time report under several Triton versions, each in a folder of its own.

    python -m bench.aot.versions 3.6.0 3.9.0 -- --kernels fused_gemm --formats Q4_K,Q8_0 --check
    python -m bench.aot.versions 3.6.0 3.7.1 -- --missing --check --write bench/results/aot.csv     # the whole record, resumable

Arguments after -- go to bench.aot. Wheels that are not the installed one go to out/triton-VERSION and are kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from bench.record import ROOT


def fetch(version: str) -> Path | None:
    """Download one Triton wheel into its own folder, once; return it, or None for the installed version."""
    if version == metadata.version("triton"):
        return None
    folder = ROOT / "out" / f"triton-{version}"
    if not (folder / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), f"triton=={version}"]
        subprocess.run(command, check=True)
    return folder


def run(version: str, arguments: list[str]) -> int:
    """Run bench.aot with one Triton version first on the path; return its exit code."""
    paths = [fetch(version), ROOT, os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path), "TRITON_INTERPRET": "0"}
    print(f"== Triton {version}", flush=True)
    return subprocess.run([sys.executable, "-m", "bench.aot", *arguments], cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    """Parse `VERSION ... -- ARGUMENTS` and run each version; return 1 when any run failed."""
    own, _, rest = " ".join(sys.argv[1:]).partition("--")
    versions = own.split()
    if not versions or "-h" in versions:
        print(__doc__)
        return 0 if versions else 2
    arguments = sys.argv[1 + len(versions) + 1 :] if rest or "--" in sys.argv else []
    return max([run(version, arguments) for version in versions])


if __name__ == "__main__":
    sys.exit(main())
