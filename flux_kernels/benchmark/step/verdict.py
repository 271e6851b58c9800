"""What the rows of whole steps and denoising runs say, in plain words: nothing is claimed that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..totals import UNKNOWN, Total, doubt

_NAMES = {
    "step": "One whole step",
    "embedded step": "One step of the embedded model",
    "denoising": "A denoising run of the embedded model",
    "denoising, model offload": "A denoising run of the embedded model with model offload",
}
_OURS, _EXACT, _PLAIN, _DIFFUSERS = "ours ", "ours exact", "torch", "diffusers"
_WHOLE, _STORAGE = "the unquantized one", "diffusers' GGUF layers"
Row = Mapping[str, str]


def step_verdict(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each format and kind of run, one for what was not measured, one for what was wrong.

    Nothing is called faster or slower where the spreads (p20 to p80) of both sides overlap, or are unknown.

    Args:
        rows: of `whole_step.measure_steps`, of one machine.
    """
    runs: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        runs.setdefault((row["what"], row["size"], row["format"]), {})[row["provider"]] = row
    said = [_run(*key, sides) for key, sides in runs.items() if any(row["p50_ms"] for row in sides.values())]
    return [*said, *_not_measured(runs), *_wrong(rows)]


def _run(what: str, size: str, name: str, sides: Mapping[str, Row]) -> str:
    subject = f"{_NAMES[what]} at {size} with {name}"
    times = {provider: Total.of(row) for provider, row in sides.items() if row["p50_ms"]}
    modes = [provider for provider in times if provider.startswith(_OURS) and provider != _EXACT]
    parts = [f"{subject}{_exact(times, sides)}"]
    if _PLAIN in times:
        parts += [f"{mode.removeprefix(_OURS)} mode{_speed(times[mode], times[_PLAIN], _WHOLE)}" for mode in modes]
    if {_DIFFUSERS, _EXACT} <= times.keys():
        parts.append(f"exact mode{_speed(times[_EXACT], times[_DIFFUSERS], _STORAGE)}")
    return "; ".join(parts) + "."


def _exact(times: Mapping[str, Total], sides: Mapping[str, Row]) -> str:
    if _EXACT not in times:
        return " has no time in exact mode"
    mine, plain = times[_EXACT], times.get(_PLAIN)
    if plain is None:
        return f" takes {mine.p50:.4g} ms in exact mode, with no unquantized one to compare with"
    ratio = f" takes {mine.p50 / plain.p50:.2f} times {_WHOLE}" if mine.differs(plain) else _same(mine, plain, _WHOLE)
    saved = int(sides[_PLAIN]["weight_bytes"]) - int(sides[_EXACT]["weight_bytes"])
    size = f"{saved / 1e9:.1f} GB" if saved >= 1e9 else f"{saved / 1e6:.1f} MB"
    stand_in = (
        ", which does not fit here and ran on the weights of two blocks" if "does not fit" in sides[_PLAIN]["note"] else ""
    )
    than = f" than in {sides[_PLAIN]['dtype']}" if sides[_PLAIN].get("dtype") else ""
    return f"{ratio}{stand_in}, and its weights are {size} smaller{than}"


def _speed(mine: Total, other: Total, whose: str) -> str:
    if not mine.differs(other):
        return _same(mine, other, whose)
    if mine.p50 < other.p50:
        return f" is {other.p50 / mine.p50:.2f} times as fast as {whose}"
    return f" takes {mine.p50 / other.p50:.2f} times as long as {whose}"


def _same(mine: Total, other: Total, whose: str) -> str:
    why = doubt(mine, other)
    return f": not compared with {whose} ({why})" if why == UNKNOWN else f": {why} from {whose}"


def _not_measured(runs: Mapping[tuple[str, str, str], Mapping[str, Row]]) -> list[str]:
    """Name the runs without any time, with the first reason; formats that share it stand together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for (what, _, name), sides in runs.items():
        if not any(row["p50_ms"] for row in sides.values()):
            note = next((row["note"] for row in sides.values() if row["note"]), "no reason recorded")
            reasons.setdefault((what, note), []).append(name)
    return [f"{_NAMES[what]} was not measured with {', '.join(names)}: {note}." for (what, note), names in reasons.items()]


def _wrong(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if row["note"].startswith("wrong result")]
    said = [f"{row['format']}, {row['provider']}, {row['what']} ({row['note']})" for row in failed]
    return [f"No time is given for: {'; '.join(said)}."] if said else []
