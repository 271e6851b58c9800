"""Compare an installed flux_kernels with the package of this checkout, file by file.

Run it with the Python that a wheel was installed in: `python CHECKOUT/tools/check_installed.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import flux_kernels
from flux_kernels.generation.embedded import embedded_transformer

CHECKOUT = Path(__file__).resolve().parents[1] / "flux_kernels"


def differing(package: Path) -> list[str]:
    """Return the files of the checkout's package that another copy of it lacks, or has otherwise."""
    files = (path for path in CHECKOUT.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    names = sorted(path.relative_to(CHECKOUT).as_posix() for path in files)
    return [
        name
        for name in names
        if not (package / name).is_file() or (package / name).read_bytes() != (CHECKOUT / name).read_bytes()
    ]


def main() -> None:
    """Exit with a message where the package is the checkout's own, or is not complete."""
    package = Path(flux_kernels.__file__).resolve().parent
    if package == CHECKOUT:
        sys.exit(f"{package} is the checkout, not an installed package. Install a wheel in an environment of its own.")
    if names := differing(package):
        sys.exit(f"{package} lacks, or has otherwise: {', '.join(names)}")
    weights = sum(weight.numel() for weight in embedded_transformer().parameters())
    print(f"{package}: complete; its embedded model has {weights:,} weights")


if __name__ == "__main__":
    main()
