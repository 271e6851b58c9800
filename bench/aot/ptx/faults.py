"""The one error of the interpreter: what a GPU would do wrong, or what is not known."""

from __future__ import annotations


class Fault(Exception):
    """Report a program that must not run: an access, a race, a branch or an opcode, with the line of PTX."""
