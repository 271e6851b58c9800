"""Say how this program can be started again, for the lines that name a next command."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

NAME = "flux-kernels"


def own_command() -> str:
    """Return what to type to start this program again.

    It is the name where the shell would find this very program by it, else the path that it was started by.
    """
    started = Path(sys.argv[0])
    on_path = shutil.which(NAME)
    if started.stem == "__main__" and started.parent.name == "flux_kernels":
        return NAME if on_path else f"{shlex.quote(sys.executable)} -m flux_kernels"
    # A program that calls the commands from Python has no command of ours.
    if started.stem != NAME or not started.is_file():
        return NAME
    return NAME if on_path and started.samefile(on_path) else shlex.quote(str(started))
