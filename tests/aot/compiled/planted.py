"""Run a case with its compiled code edited first."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from bench.aot.ptx import Executable, Fault, parse
from bench.aot.ptx.driver import AbsentCard, absent_card
from bench.aot.sweep.cases import Case
from bench.aot.sweep.checks import check
from bench.aot.sweep.inputs import make


def run_edited(case: Case, kernel: str, edit: Callable[[str], str], order: np.random.Generator | None = None) -> float:
    """Return the worst error over its bound with `kernel` run as edited PTX; raise Fault where it faults."""
    inputs = make(case)
    with absent_card(case.capability, order) as card:
        edit_launches(card, kernel, edit)
        return max(one.ratio for one in check(case, inputs, card))


def edit_launches(card: AbsentCard, kernel: str, edit: Callable[[str], str]) -> None:
    """Let a card run edited PTX in place of a kernel's own."""
    plain = card.run

    def run(name: str, code: Executable, *rest) -> None:
        plain(name, Executable(parse(edit(code.program.text))) if name == kernel else code, *rest)

    card.run = run


def text_of(case: Case, kernel: str) -> str:
    """Return the PTX that a case runs for a kernel."""
    texts: list[str] = []
    run_edited(case, kernel, lambda text: texts.append(text) or text)
    return texts[0]


def replaced(pattern: str, number: int, instead: str) -> Callable[[str], str]:
    """Return an edit that replaces the match of a pattern with that number."""

    def edit(text: str) -> str:
        match = list(re.finditer(pattern, text))[number]
        return text[: match.start()] + match.expand(instead) + text[match.end() :]

    return edit


def outcome(case: Case, kernel: str, edit: Callable[[str], str], order: np.random.Generator | None = None) -> str:
    """Return what an edit came to: "fault: ...", "wrong" or "right"."""
    try:
        return "right" if run_edited(case, kernel, edit, order) <= 1 else "wrong"
    except Fault as fault:
        return f"fault: {fault}"
