"""Run the compile-time report under several Triton versions, each downloaded beside the installed one.

    python -m bench.aot.versions 3.6.0 3.9.0 -- --kernels wide --formats Q4_K,Q8_0 --check

Arguments after -- go to bench.aot. The wheels go to out/triton-VERSION and are kept; the installed Triton stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def fetch(version: str) -> Path:
    """Download one Triton wheel into a folder of its own, once; return the folder."""
    folder = ROOT / "out" / f"triton-{version}"
    if not (folder / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), f"triton=={version}"]
        subprocess.run(command, check=True)
    return folder


def run(version: str, arguments: list[str]) -> int:
    """Run bench.aot with one Triton version first on the path; return its exit code."""
    paths = [str(fetch(version)), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}
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
