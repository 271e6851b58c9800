"""Help texts from docstrings: paragraphs flow with the terminal, lists and examples keep their lines."""

from __future__ import annotations

import inspect
import re


def help_text(docstring: str) -> str:
    """Return a docstring with every paragraph on one line, for the terminal to wrap.

    Paragraphs of indented lines stay as they are.
    """
    paragraphs = re.split(r"\n{2,}", inspect.cleandoc(docstring))
    return "\n\n".join(part if part.startswith(" ") else " ".join(part.splitlines()) for part in paragraphs)
