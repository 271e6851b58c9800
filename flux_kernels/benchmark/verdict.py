"""What the rows of one run say, in plain words: nothing is claimed that was not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..report.amounts import counted, size_text
from .names import DIFFUSERS, EMBEDDED_STEP, EXACT, KINDS, OURS, STEP, TORCH, WRONG, way_of
from .totals import UNKNOWN, Total, doubt, speed_text, totals

_WHOLE, _STORAGE = "the unquantized model", "diffusers' GGUF layers"
Times = Mapping[str, Total]  # by provider
Run = tuple[str, str, str]  # kind, size and format


def verdict(rows: Sequence[Mapping], steps: Sequence[Mapping] = ()) -> list[str]:
    """Return five lines: machine, exact mode, best mode, diffusers, price; a sixth names what failed.

    They are about the linear calls of one step; the second is about a step as a whole where that was measured.

    Every ratio is a speed. Nothing is called faster or slower where the spreads (p20 to p80) of both sides overlap, or are unknown.

    Args:
        rows: rows of one run and one size, with origin columns. Types that lack shapes must be left out by the caller.
        steps: rows of whole steps of the same run, of one size.
    """
    if not any(row["p50_ms"] for row in rows):
        nothing = "Nothing was measured, so nothing can be said."
        cut = "No type was timed in every linear call of a step, so nothing is said about them."
        return [nothing if rows else cut, *filter(None, [_step(steps)]), *_failed(rows)]
    names = dict.fromkeys(row["format"] for row in rows)
    times = {name: totals([row for row in rows if row["format"] == name]) for name in names}
    return [_machine(rows[0]), _step(steps) or _exact(times), _best(times), _storage(times, rows), _price(rows), *_failed(rows)]


def _machine(row: Mapping) -> str:
    if row.get("capability"):
        return f"Measured on {row['device']}: the linear calls of one step, each ratio within this run."
    return f"This is a CPU ({row['device']}): its ratios say nothing about a graphics card."


def _speeds(times: Mapping[str, Times], base: str) -> str:
    """Write exact mode's speed with a provider's as 1 for every format of both, and where it is in doubt."""
    both = {name: sides for name, sides in times.items() if {base, EXACT} <= sides.keys()}
    return ", ".join(f"{name} {speed_text(sides[EXACT], sides[base])}" for name, sides in both.items())


def _exact(times: Mapping[str, Times]) -> str:
    speeds = _speeds(times, TORCH)
    return f"Speed of exact mode, with unquantized torch as 1: {speeds}." if speeds else "Exact mode: not measured."


def _step(steps: Sequence[Mapping]) -> str:
    """Compare one whole step in exact mode with the unquantized step: time, and bytes of weights."""
    sentences = {}
    for (what, size, name), sides in _by_run(row for row in steps if row["p50_ms"] and row["weight_bytes"]).items():
        if what in (STEP, EMBEDDED_STEP) and {TORCH, EXACT} <= sides.keys():
            mine, plain = sides[EXACT], sides[TORCH]
            speed = speed_text(Total.of(mine), Total.of(plain), " times the speed")
            sentences[what, size, name] = f"{name} {speed}, {_smaller(mine, plain)}"
    if not sentences:
        return ""
    what, *_ = next(iter(sentences))
    return f"{KINDS[what].subject} in exact mode, against the unquantized model: {'; '.join(sentences.values())}."


def _smaller(mine: Mapping, plain: Mapping) -> str:
    than = f" than in {plain['dtype']}" if plain.get("dtype") else ""
    return f"{size_text(int(plain['weight_bytes']) - int(mine['weight_bytes']))} smaller{than}"


def _best(times: Mapping[str, Times]) -> str:
    ours = {
        (name, side): total
        for name, sides in times.items()
        for side, total in sides.items()
        if TORCH in sides and side.startswith(OURS)
    }
    if not ours:
        return "This library's modes against torch: not measured."
    speeds = {key: total.speed(times[key[0]][TORCH]) for key, total in ours.items()}
    best = max(speeds, key=lambda key: speeds[key].p50)
    plain = times[best[0]][TORCH]
    speed = f"{_named(best)}, {speed_text(ours[best], plain, ' times the speed of torch')}"
    if doubt(ours[best], plain) == UNKNOWN:
        return f"Shortest time of this library here, which says little: {speed}."
    ties = [_named(key) for key in ours if key != best and not _apart(key, best, ours, speeds)]
    tied = f"; no difference seen from it: {', '.join(ties)}" if ties else ""
    return f"Fastest of this library here: {speed}{tied}."


def _apart(one: tuple[str, str], other: tuple[str, str], times: Mapping, speeds: Mapping) -> bool:
    """Tell whether two modes differ: in one type by their times, across types by their speeds.

    Either way, a mode that does not differ from torch does not differ from the best mode where that is slower than torch.
    """
    measured = times if one[0] == other[0] else speeds
    return measured[one].differs(measured[other])


def _named(key: tuple[str, str]) -> str:
    return f"{key[0]} in {way_of(key[1])} mode"


def _storage(times: Mapping[str, Times], rows: Sequence[Mapping]) -> str:
    speeds = _speeds(times, DIFFUSERS)
    if speeds:
        return f"Speed of exact mode, with diffusers' GGUF layers as 1: {speeds}."
    why = next((row["note"] for row in rows if row["provider"] == DIFFUSERS and not row["p50_ms"] and row["note"]), "")
    return f"diffusers: {why or 'not measured'}."


def _failed(rows: Sequence[Mapping]) -> list[str]:
    """Name the modes of this library that have no time, with the first reason and how many calls it was."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["provider"].startswith(OURS) and not row["p50_ms"]:
            reasons.setdefault((row["format"], row["provider"]), []).append(row.get("note") or "no reason recorded")
    named = [f"{_named(key)} ({counted(len(notes), 'call')}, {notes[0]})" for key, notes in reasons.items()]
    return [f"No speed is given for: {'; '.join(named)}."] if named else []


def _price(rows: Sequence[Mapping]) -> str:
    errors: dict[str, float] = {}
    for row in rows:
        if row["provider"].startswith(OURS) and row["p50_ms"]:
            errors[row["provider"]] = max(errors.get(row["provider"], 0.0), float(row["error"]))
    errors_text = ", ".join(f"{way_of(name)} {error:.2g}" for name, error in errors.items())
    return f"Price: largest relative error against float64 on the packed weights: {errors_text or 'not measured'}."


def step_verdict(rows: Sequence[Mapping]) -> list[str]:
    """Return a sentence for each format and kind of run, for what was not measured, and what was wrong.

    Nothing is called faster or slower where the spreads (p20 to p80) of both sides overlap, or are unknown.

    Args:
        rows: of `whole_step.measure_steps`, of one machine.
    """
    runs = _by_run(rows)
    sentences = [_run(*key, sides) for key, sides in runs.items() if any(row["p50_ms"] for row in sides.values())]
    wrong = [row for row in rows if row["note"].startswith(WRONG)]
    named = [f"{row['format']}, {row['provider']}, {row['what']} ({row['note']})" for row in wrong]
    return [*sentences, *_not_measured(runs), *([f"No time is given for: {'; '.join(named)}."] if named else [])]


def _by_run(rows: Iterable[Mapping]) -> dict[Run, dict[str, Mapping]]:
    runs: dict[Run, dict[str, Mapping]] = {}
    for row in rows:
        runs.setdefault((row["what"], row["size"], row["format"]), {})[row["provider"]] = row
    return runs


def _run(what: str, size: str, name: str, sides: Mapping[str, Mapping]) -> str:
    times = {provider: Total.of(row) for provider, row in sides.items() if row["p50_ms"]}
    modes = [provider for provider in times if provider.startswith(OURS) and provider != EXACT]
    parts = [f"{KINDS[what].subject} at {size} with {name}{_exact_step(times, sides)}"]
    if TORCH in times:
        parts += [f"{way_of(mode)} mode{_compared(times[mode], times[TORCH], _WHOLE)}" for mode in modes]
    if {DIFFUSERS, EXACT} <= times.keys():
        parts.append(f"exact mode{_compared(times[EXACT], times[DIFFUSERS], _STORAGE)}")
    return "; ".join(parts) + "."


def _exact_step(times: Times, sides: Mapping[str, Mapping]) -> str:
    if EXACT not in times:
        return " has no time in exact mode"
    mine, plain = times[EXACT], times.get(TORCH)
    if plain is None:
        return f" takes {mine.p50:.4g} ms in exact mode, with no unquantized model to compare with"
    fits = "does not fit" not in sides[TORCH]["note"]
    stand_in = "" if fits else ", which does not fit here and ran on the weights of two blocks"
    return f"{_compared(mine, plain, _WHOLE)}{stand_in}, and its weights are {_smaller(sides[EXACT], sides[TORCH])}"


def _compared(mine: Total, other: Total, whose: str) -> str:
    if not mine.differs(other):
        return _same(mine, other, whose)
    if mine.p50 < other.p50:
        return f" is {other.p50 / mine.p50:.2f} times as fast as {whose}"
    return f" takes {mine.p50 / other.p50:.2f} times as long as {whose}"


def _same(mine: Total, other: Total, whose: str) -> str:
    why = doubt(mine, other)
    return f": not compared with {whose} ({why})" if why == UNKNOWN else f": {why} from {whose}"


def _not_measured(runs: Mapping[Run, Mapping[str, Mapping]]) -> list[str]:
    """Name the runs without any time, with the first reason; formats that share it stand together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for (what, _, name), sides in runs.items():
        if not any(row["p50_ms"] for row in sides.values()):
            note = next((row["note"] for row in sides.values() if row["note"]), "no reason recorded")
            reasons.setdefault((what, note), []).append(name)
    return [
        f"{KINDS[what].subject} was not measured with {', '.join(names)}: {note}." for (what, note), names in reasons.items()
    ]
