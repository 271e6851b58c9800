"""Docstrings begin with a short line, and a comment that explains stands above the code."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("flux_kernels", "bench", "tools", "tests")
FIRST_LINE = 100  # characters
TRAILING = 80  # characters of a comment behind code; a longer one explains
FOR_TOOLS = ("# noqa", "# type:", "# pragma")
SUSPECT = re.compile(rf"(?m)\S.*#.{{{TRAILING}}}|^\s*[)\]}}].*#")  # lines worth the slow tokenizer


def long_first_lines(source: str) -> Iterator[int]:
    """Yield the lines of definitions whose docstrings have a longer first line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring.splitlines()[0]) > FIRST_LINE:
                yield getattr(node, "lineno", 1)


def trailing_comments(source: str) -> Iterator[int]:
    """Yield the lines of comments behind code that are long, or hang on the end of a wrapped statement."""
    if not SUSPECT.search(source):
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        code = token.line[: token.start[1]].strip()
        explains = len(token.string) > TRAILING or code[:1] in tuple(")]}")
        if token.type == tokenize.COMMENT and code and explains and not token.string.startswith(FOR_TOOLS):
            yield token.start[0]


def offenders(rule) -> list[tuple[str, int]]:
    """Return (file, line) of what breaks a rule, in all folders."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    texts = [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files]
    return [(name, line) for name, text in texts for line in rule(text)]


@pytest.mark.parametrize("rule", [long_first_lines, trailing_comments])
def test_prose_is_where_it_can_be_read(rule):
    places = offenders(rule)
    folders = Counter("/".join(name.split("/")[:2]) for name, _ in places)
    assert not places, f"{dict(folders)}\n" + "\n".join(f"{name}:{line}" for name, line in places)


def test_the_rules_see_what_they_are_for():
    assert list(long_first_lines(f'def f():\n    """{"a" * 101}"""')) == [1]
    assert not list(long_first_lines(f'"""{"a" * 100}\n\n{"b" * 120}\n"""'))
    code = (
        f"a = 1  # {'long ' * 20}\nb = [\n    1,\n]  # hangs\nc = 2  # label\n# {'above ' * 20}\nd = 3  # noqa: {'E1 ' * 40}\n"
    )
    assert list(trailing_comments(code)) == [1, 4]
