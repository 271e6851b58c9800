"""Say how this program can be started again, for the lines that tell people what to do next."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

NAME = "flux-kernels"


def own_command() -> str:
    """Return what to type: the name where the shell would find this very program by it, else the path it was started by."""
    started = Path(sys.argv[0])
    found = shutil.which(NAME)
    if started.stem == "__main__" and started.parent.name == "flux_kernels":
        return NAME if found else f"{shlex.quote(sys.executable)} -m flux_kernels"
    if started.stem != NAME or not started.is_file():  # a program that calls the commands from Python
        return NAME
    return NAME if found and started.samefile(found) else shlex.quote(str(started))
