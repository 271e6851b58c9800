"""The commands that bring what is missing, in one place, so that they work wherever they are printed.

The package is on no index yet: in a checkout they install from it, elsewhere they name the packages themselves.
"""

from __future__ import annotations

import re
import shlex
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

PIPELINE_DOWNLOAD = (
    'hf download black-forest-labs/FLUX.1-dev --exclude "transformer/*" --exclude "flux1-dev*" --exclude "*.sft" '
    '--exclude "ae.safetensors" --local-dir FLUX.1-dev'
)
"""Gets a FLUX.1-dev pipeline folder without the transformer; `--exclude` takes one pattern."""

_PACKAGE = Path(__file__).resolve().parent
_DISTRIBUTION = "flux_kernels"


def install_command(extra: str = "") -> str:
    """Return the pip command that installs what this package needs.

    The packages of an extra are included where one is named.

    Args:
        extra: of pyproject.toml: "cpu", "plan", "bench", "test" or "train".
    """
    root = _PACKAGE.parent
    suffix = f"[{extra}]" if extra else ""
    if (root / "pyproject.toml").is_file() and (root / "constraints.txt").is_file():
        return f"pip install -c {shlex.quote(str(root / 'constraints.txt'))} -e {shlex.quote(f'{root}{suffix}')}"
    return "pip install " + " ".join(shlex.quote(one) for one in _requirements(extra))


def _requirements(extra: str) -> list[str]:
    """List the requirements of the installed distribution.

    Requirements of other extras that an extra names are included.
    """
    try:
        lines = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        return [f"{_DISTRIBUTION}[{extra}]" if extra else _DISTRIBUTION]
    requirements: list[str] = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        of_extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if (of_extra[1] if of_extra else "") != extra:
            continue
        own = re.fullmatch(r"flux[-_]kernels\[([\w,-]+)\].*", requirement)
        requirements += [one for name in own[1].split(",") for one in _requirements(name)] if own else [requirement]
    return requirements
