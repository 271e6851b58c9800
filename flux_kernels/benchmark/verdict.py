"""What the rows of one run say, in plain words: nothing is claimed that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_OURS = "ours "


def verdict(rows: Sequence[Mapping]) -> list[str]:
    """Return five lines about the linear calls of one step: machine, speed, best mode, size, price.

    Args:
        rows: rows of one run, with origin columns. Types that lack shapes must be left out by the caller.
    """
    if not any(row["p50_ms"] for row in rows):
        return ["Nothing was measured, so nothing can be said."]
    names = list(dict.fromkeys(row["format"] for row in rows))
    totals = {name: _totals([row for row in rows if row["format"] == name]) for name in names}
    return [_machine(rows[0]), _exact(totals), _best(totals), _beside(totals), _price(rows)]


def _totals(rows: Sequence[Mapping]) -> dict[str, float]:
    """Return milliseconds a step by provider, of the providers with a time for every call."""
    found = {}
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == provider]
        if all(row["p50_ms"] for row in mine):
            found[provider] = sum(float(row["p50_ms"]) * int(row["calls"]) for row in mine)
    return found


def _machine(row: Mapping) -> str:
    if row.get("capability"):
        return f"Measured on {row['device']}: the linear calls of one step, each ratio within this run."
    return f"This is a CPU ({row['device']}): its ratios say nothing about a graphics card."


def _exact(totals: Mapping[str, Mapping[str, float]]) -> str:
    said = [f"{n} {t[_OURS + 'exact'] / t['torch']:.2f}" for n, t in totals.items() if {"torch", _OURS + "exact"} <= t.keys()]
    return f"Time of exact mode, with unquantized torch as 1: {', '.join(said)}." if said else "Exact mode: not measured."


def _best(totals: Mapping[str, Mapping[str, float]]) -> str:
    times = {(n, p): t["torch"] / v for n, t in totals.items() if "torch" in t for p, v in t.items() if p.startswith(_OURS)}
    if not times:
        return "This library's modes beside torch: not measured."
    name, mode = max(times, key=times.__getitem__)
    return f"Fastest here: {name} in {mode.removeprefix(_OURS)} mode, {times[name, mode]:.2f} times the speed of torch."


def _beside(totals: Mapping[str, Mapping[str, float]]) -> str:
    both = {"diffusers", _OURS + "exact"}
    said = [f"{n} {t['diffusers'] / t[_OURS + 'exact']:.2f}" for n, t in totals.items() if both <= t.keys()]
    return f"Speed of exact mode, with diffusers' GGUF layers as 1: {', '.join(said)}." if said else "diffusers: not measured."


def _price(rows: Sequence[Mapping]) -> str:
    errors: dict[str, float] = {}
    for row in rows:
        if row["provider"].startswith(_OURS) and row["p50_ms"]:
            errors[row["provider"]] = max(errors.get(row["provider"], 0.0), float(row["error"]))
    said = ", ".join(f"{name.removeprefix(_OURS)} {error:.2g}" for name, error in errors.items())
    return f"Price: largest relative error against float64 on the packed weights: {said or 'not measured'}."
