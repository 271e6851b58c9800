"""Hash the source of a kernel and of all it calls: it tells whether a recorded row is of today's code.

Comments, docstrings and positions in a file do not count: Triton's own cache key has them in.
"""

from __future__ import annotations

import ast
import hashlib
import textwrap
from functools import cache

from triton.language import constexpr
from triton.runtime.jit import JITFunction

_DIGITS = 12


def code_of(kernel: JITFunction, *specialized: tuple[tuple[str, object], ...]) -> str:
    """Return a hash of a kernel, and of its signature, constants and options as (name, value) pairs."""
    words = [_source(kernel)]
    for pairs in specialized:
        words += [f"{name}={_source(value) if isinstance(value, JITFunction) else value!r}" for name, value in pairs]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:_DIGITS]


@cache
def _source(kernel: JITFunction) -> str:
    """Return the normalized source of a kernel, then that of the functions and constants it names."""
    function = kernel.fn
    tree = ast.parse(textwrap.dedent(kernel.src))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    words = [ast.unparse(_without_docstring(tree))]
    for name, value in used.items():
        if isinstance(value, JITFunction) and value is not kernel:
            words.append(_source(value))
        elif isinstance(value, (constexpr, int, float, str)):
            words.append(f"{name} = {value}")
    return "\n".join(words)


def _without_docstring(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
