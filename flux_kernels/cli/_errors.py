"""Show the errors that a user can act on as one line, with exit code 1.

All others keep their traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from ..errors import BackendUnavailable, FormatError, GGUFError
from ..install_hints import install_command

_OURS = (GGUFError, FormatError, BackendUnavailable, OSError)

_EXTRAS = {"scipy": "plan", "matplotlib": "plan", "torchmetrics": "bench"}


class OneLineErrors(TyperGroup):
    """Run a command and turn expected errors into one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Invoke the command; `--traceback` lets every error through."""
        # As Ctrl-C does: what is half done is cleaned up on the way out, such as files that are not renamed yet.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return super().invoke(ctx)
        # `flux-kernels ... | head`: nobody reads on.
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except ImportError as error:
            if error.name is None or error.name.startswith("flux_kernels") or ctx.params.get("traceback"):
                raise
            package = error.name.partition(".")[0]
            extra = "bench" if ctx.invoked_subcommand == "bench" else _EXTRAS.get(package, "")
            _fail(f"{package} is not installed. Run: {install_command(extra)}")
        except torch.OutOfMemoryError as error:
            if ctx.params.get("traceback"):
                raise
            _fail(f"Out of GPU memory: {str(error).splitlines()[0]} Try --offload model, then --offload group.")
        except _OURS as error:
            if ctx.params.get("traceback"):
                raise
            _fail(_message(error))


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    return " ".join(str(error).split())


def _fail(message: str) -> None:
    console = Console(stderr=True)
    console.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)
    sys.stderr.flush()
    raise typer.Exit(1)
