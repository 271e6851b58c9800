"""What the rows of one run say, in plain words: nothing is claimed that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .step.verdict import step_verdict
from .totals import UNKNOWN, Total, doubt, totals

__all__ = ["step_verdict", "verdict"]
_OURS = "ours "


def verdict(rows: Sequence[Mapping], steps: Sequence[Mapping] = ()) -> list[str]:
    """Return five lines: machine, exact mode, best mode, beside diffusers, price; a sixth names what failed.

    They are about the linear calls of one step; the second is about a step as a whole where one was measured.

    Every ratio is a speed. Nothing is called faster or slower where the spreads (p20 to p80) of both sides overlap, or are unknown.

    Args:
        rows: rows of one run and one size, with origin columns. Types that lack shapes must be left out by the caller.
        steps: rows of whole steps of the same run, of one size.
    """
    if not any(row["p50_ms"] for row in rows):
        nothing = "Nothing was measured, so nothing can be said."
        cut = "No type was timed in every linear call of a step, so nothing is said about them."
        return [nothing if rows else cut, *filter(None, [_step(steps)]), *_failed(rows)]
    names = list(dict.fromkeys(row["format"] for row in rows))
    found = {name: totals([row for row in rows if row["format"] == name]) for name in names}
    return [_machine(rows[0]), _step(steps) or _exact(found), _best(found), _beside(found, rows), _price(rows), *_failed(rows)]


def _machine(row: Mapping) -> str:
    if row.get("capability"):
        return f"Measured on {row['device']}: the linear calls of one step, each ratio within this run."
    return f"This is a CPU ({row['device']}): its ratios say nothing about a graphics card."


def _ratios(found: Mapping[str, Mapping[str, Total]], over: str, under: str) -> str:
    """Write the ratio of two providers' times for every format that has both, and where nothing tells them apart."""
    said = []
    for name, times in found.items():
        if {over, under} <= times.keys():
            why = doubt(times[over], times[under])
            said.append(f"{name} {times[over].p50 / times[under].p50:.2f}{f' ({why})' if why else ''}")
    return ", ".join(said)


def _exact(found: Mapping[str, Mapping[str, Total]]) -> str:
    said = _ratios(found, "torch", _OURS + "exact")
    return f"Speed of exact mode, with unquantized torch as 1: {said}." if said else "Exact mode: not measured."


def _step(steps: Sequence[Mapping]) -> str:
    """Compare one whole step in exact mode with the unquantized one: time, and bytes of weights."""
    said, kinds = [], {"step": "One whole step", "embedded step": "One step of the tiny embedded model"}
    sides = {
        (row["what"], row["format"], row["provider"]): row
        for row in steps
        if row["what"] in kinds and row["p50_ms"] and row["weight_bytes"]
    }
    for (what, name, side), mine in sides.items():
        plain = sides.get((what, name, "torch"))
        if side != _OURS + "exact" or plain is None:
            continue
        own, base = Total.of(mine), Total.of(plain)
        why = doubt(own, base)
        time = f"{base.p50 / own.p50:.2f} times the speed{f' ({why})' if why else ''}"
        than = f" than in {plain['dtype']}" if plain.get("dtype") else ""
        said.append(f"{name} {time}, {_bytes(int(plain['weight_bytes']) - int(mine['weight_bytes']))} smaller{than}")
    if not said:
        return ""
    return f"{kinds[next(iter(sides))[0]]} in exact mode beside the unquantized one: {'; '.join(said)}."


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if abs(count) >= 1e9 else f"{count / 1e6:.1f} MB"


def _best(found: Mapping[str, Mapping[str, Total]]) -> str:
    times = {(n, p): v for n, t in found.items() if "torch" in t for p, v in t.items() if p.startswith(_OURS)}
    if not times:
        return "This library's modes beside torch: not measured."
    speeds = {key: mine.speed(found[key[0]]["torch"]) for key, mine in times.items()}
    best = max(speeds, key=lambda key: speeds[key].p50)
    why = doubt(times[best], found[best[0]]["torch"])
    beside = f"{_named(best)}, {speeds[best].p50:.2f} times the speed of torch{f' ({why})' if why else ''}"
    if why == UNKNOWN:
        return f"Shortest time of this library here, which says little: {beside}."
    ties = [_named(key) for key in times if key != best and not _apart(key, best, times, speeds)]
    tied = f"; not told apart from it: {', '.join(ties)}" if ties else ""
    return f"Fastest of this library here: {beside}{tied}."


def _apart(one: tuple[str, str], other: tuple[str, str], times: Mapping, speeds: Mapping) -> bool:
    """Tell whether two modes differ: within a type by their times, across types by their speeds, each beside its own torch.

    Either way, what is not told apart from torch is not told apart from the best mode where that one is slower than torch.
    """
    measured = times if one[0] == other[0] else speeds
    return measured[one].differs(measured[other])


def _named(key: tuple[str, str]) -> str:
    return f"{key[0]} in {key[1].removeprefix(_OURS)} mode"


def _beside(found: Mapping[str, Mapping[str, Total]], rows: Sequence[Mapping]) -> str:
    said = _ratios(found, "diffusers", _OURS + "exact")
    if said:
        return f"Speed of exact mode, with diffusers' GGUF layers as 1: {said}."
    why = next((row["note"] for row in rows if row["provider"] == "diffusers" and not row["p50_ms"] and row["note"]), "")
    return f"diffusers: {why or 'not measured'}."


def _failed(rows: Sequence[Mapping]) -> list[str]:
    """Name the modes of this library that have no time, with the first reason and how many calls it was."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["provider"].startswith(_OURS) and not row["p50_ms"]:
            reasons.setdefault((row["format"], row["provider"]), []).append(row.get("note") or "no reason recorded")
    if not reasons:
        return []
    said = [f"{_named(key)} ({len(notes)} call{'s' if len(notes) > 1 else ''}, {notes[0]})" for key, notes in reasons.items()]
    return [f"No speed is given for: {'; '.join(said)}."]


def _price(rows: Sequence[Mapping]) -> str:
    errors: dict[str, float] = {}
    for row in rows:
        if row["provider"].startswith(_OURS) and row["p50_ms"]:
            errors[row["provider"]] = max(errors.get(row["provider"], 0.0), float(row["error"]))
    said = ", ".join(f"{name.removeprefix(_OURS)} {error:.2g}" for name, error in errors.items())
    return f"Price: largest relative error against float64 on the packed weights: {said or 'not measured'}."
