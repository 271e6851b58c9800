"""Write what was measured on GPUs as markdown: a table for each card and size of step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flux_kernels.benchmark.record import origin_text, read_csv
from flux_kernels.benchmark.totals import MARKS, Total, by_step, marked, totals
from flux_kernels.compute import COMPUTE_MODES
from flux_kernels.formats import get_format
from flux_kernels.models.calls import STEPS, step_calls

Rows = list[dict[str, str]]
Cell = Callable[[str], str]
SIDES = {
    "torch": "torch, 16 bit",
    **{f"ours {mode}": mode for mode in COMPUTE_MODES},
    "diffusers": "diffusers' GGUF layers",
    "dequantize": "decode in torch, then multiply",
}
# What a user would otherwise take, each called as its makers say (docs/decisions/peers.md).
PEERS = {
    **{side: SIDES[side] for side in ("torch", "ours exact", "diffusers")},
    "vllm-gguf-plugin triton": "vllm-gguf-plugin, its Triton product",
    "quanto int8": "quanto, int8 weights",
    "bitsandbytes int8": "bitsandbytes int8, outliers apart",
    "bitsandbytes int8 no outliers": "bitsandbytes int8",
    "bitsandbytes nf4": "bitsandbytes NF4",
}
NONE, WRONG = "not measured", "wrong result"
LEGEND = (
    "After a time stands the speed with unquantized torch as 1: more is faster. Linear calls: all of one step, every weight "
    "from memory. Whole step: these layers in a transformer of plain torch, random weights{graph}. Peak: GPU memory of that "
    "step; torch's is without the packed weights that its own were decoded from."
)
_FILES = ("linear", "step", "sweep", "int8", "linear_others", "peers")


class Changed(NamedTuple):
    """Name what exact mode ran at some rows of x when a commit was measured, and what it runs since."""

    capability: str
    rows: range
    then: str
    now: str
    said: str


# By commit of the rows; an entry serves until the card is measured again.
CHANGED: dict[str, Changed] = {}


def gpu_section(results: Path) -> str:
    """Return the tables of every folder of `results` with a GPU's linear.csv or step.csv."""
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    return "\n\n".join(part for folder in folders for part in card_parts(folder))


def card_parts(folder: Path) -> list[str]:
    """Return one card's tables with the lines below them; none without rows of calls or steps."""
    files = {name: _gpu_rows(folder / f"{name}.csv") for name in _FILES}
    sizes = {row["size"] for row in files["linear"] + files["step"]}
    return [_part(size, *(_of_size(rows, size) for rows in files.values())) for size in STEPS if size in sizes]


def _gpu_rows(path: Path) -> Rows:
    return [row for row in read_csv(path) if row.get("capability")] if path.exists() else []


def _of_size(rows: Rows, size: str) -> Rows:
    return [row for row in rows if row.get("size", size) == size]


def _part(size: str, linears: Rows, steps: Rows, sweep: Rows, int8: Rows, others: Rows, peers: Rows) -> str:
    rows = linears + steps
    sides = [side for side in SIDES if side == "torch" or any(row["provider"] == side for row in rows)]
    lines = [f"| type | | {' | '.join(SIDES[side] for side in sides)} |", "|---" * (len(sides) + 2) + "|"]
    for name in sorted({row["format"] for row in rows}, key=lambda name: -get_format(name).bits_per_weight):
        calls, ran = ([row for row in table if row["format"] == name] for table in (linears, steps))
        kinds = {"linear calls": linear_cells(calls, size), "whole step": step_cells(ran), "peak": peak_cells(ran, size, name)}
        lines += [f"| {name} | {kind} | {' | '.join(map(cell, sides))} |" for kind, cell in kinds.items()]
    marks = [f"{mark} {said}." for mark, said in MARKS.items() if any(f", {mark}" in line for line in lines)]
    legend = LEGEND.format(graph=", as a CUDA graph" if any(row["what"] == "graph" for row in steps) else "")
    about_calls = [others_line(others, size), int8_line(int8), changed_line(linears, sweep, size)] if linears else []
    derived = filter(None, [decoding_line(steps), *about_calls])
    origins = dict.fromkeys(origin_text(row) for row in [*rows, *sweep, *int8])
    below = [*derived, f"Measured on: {'; '.join(origins)}."]
    title = f"**{rows[0]['device']}, one step of FLUX.1-dev, {size}**"
    table = [title, "", *lines, "", " ".join([legend, *marks]), "", *(f"- {line}" for line in below)]
    return "\n".join([*table, *peers_table(peers, size)])


def linear_cells(rows: Rows, size: str) -> Cell:
    """Return side -> milliseconds and speed of the linear calls of one type."""
    sums = _linear_totals(rows, size)
    times = {side: total.p50 for side, total in sums.items()}
    return _time_cell(rows, times, lambda side: marked(sums[side], sums["torch"]))


def _linear_totals(rows: Rows, size: str) -> dict[str, Total]:
    """Return the sums of the sides that were right in every call; none where calls are missing."""
    if not {call.where for call in step_calls(**STEPS[size])} <= {row["where"] for row in rows}:
        return {}
    return totals([row | {"p50_ms": "" if _is_wrong(row) else row["p50_ms"]} for row in rows])


def others_line(rows: Rows, size: str) -> str:
    """Give the speed of exact mode's linear calls in the types that the table leaves out."""
    speeds = []
    for name in dict.fromkeys(row["format"] for row in rows):
        sums = _linear_totals([row for row in rows if row["format"] == name], size)
        if {"torch", "ours exact"} <= sums.keys():
            speeds.append(f"{name} {marked(sums['ours exact'], sums['torch'])}")
    return f"Linear calls of the other types in exact mode, torch as 1: {', '.join(speeds)}." if speeds else ""


def peers_table(rows: Rows, size: str) -> list[str]:
    """Return a table of the linear calls of other libraries; [] without rows."""
    sides = [side for side in PEERS if any(row["provider"] == side for row in rows)]
    if not sides:
        return []
    names = dict.fromkeys(row["format"] for row in rows)
    cells = [_peer_cells([row for row in rows if row["format"] == name], size) for name in names]
    lines = [f"| linear calls | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {PEERS[side]} | {' | '.join(cell(side) for cell in cells)} |" for side in sides]
    return [
        "",
        *lines,
        "",
        "Other libraries on the same weights, in the same run. NF4 and int8 start from the decoded weights and add errors of their own.",
    ]


def _peer_cells(rows: Rows, size: str) -> Cell:
    """As `linear_cells`, and how many calls were wrong."""
    right = linear_cells(rows, size)

    def cell(side: str) -> str:
        ran = [row for row in rows if row["provider"] == side]
        wrong = sum(map(_is_wrong, ran))
        return f"wrong in {wrong} of {len(ran)} calls" if wrong else right(side)

    return cell


def step_cells(rows: Rows) -> Cell:
    """Return side -> milliseconds and speed of a whole step: a session's graph, or `whole_step`'s."""
    times = _step_times(rows)
    return _time_cell(rows, times, lambda side: f"{times['torch'] / times[side]:.2f}")


def _time_cell(rows: Rows, times: dict[str, float], beside_torch: Cell) -> Cell:
    def cell(side: str) -> str:
        if side not in times:
            return _missing(rows, side)
        speed = f", {beside_torch(side)}" if side != "torch" and "torch" in times else ""
        return f"{times[side]:.1f} ms{speed}"

    return cell


def _step_times(rows: Rows) -> dict[str, float]:
    wrong = {row["provider"] for row in rows if _is_wrong(row)}
    right = [row for row in rows if row["what"] in ("graph", "step") and row["p50_ms"] and row["provider"] not in wrong]
    return {row["provider"]: float(row["p50_ms"]) for row in right}


def peak_cells(rows: Rows, size: str, name: str) -> Cell:
    """Return side -> peak memory of a step, torch's less the packed weights it was decoded from."""
    calls, fmt = step_calls(**STEPS[size]), get_format(name)
    packed = sum(call.calls * call.n * fmt.row_bytes(call.k) for call in calls) / 1e9
    plain = sum(call.calls * call.n * call.k for call in calls) * 2 / 1e9
    peaks = {row["provider"]: _peak_gb(row) for row in rows if _peak_gb(row) and not _is_wrong(row)}
    # A session holds both, a user would not.
    if peaks.get("torch", 0.0) > plain + packed:
        peaks["torch"] -= packed
    return lambda side: f"{peaks[side]:.1f} GB" if side in peaks else _missing(rows, side)


def _peak_gb(row: dict[str, str]) -> float:
    # A session's rows, or those of `whole_step`
    return float(row.get("peak_gb") or 0) or float(row.get("peak_bytes") or 0) / 1e9


def _is_wrong(row: dict[str, str]) -> bool:
    return row["note"].startswith(WRONG) or bool(row.get("gate") and not float(row["error"] or "nan") <= float(row["gate"]))


def _missing(rows: Rows, side: str) -> str:
    return WRONG if any(_is_wrong(row) for row in rows if row["provider"] == side) else NONE


def decoding_line(steps: Rows) -> str:
    """Compare exact mode with decoding in torch at every call, in the whole step."""
    times = {name: _step_times(rows) for (_, name), rows in by_step(steps).items()}
    both = {name: sides for name, sides in times.items() if {"ours exact", "dequantize"} <= sides.keys()}
    speeds = ", ".join(f"{name} {sides['dequantize'] / sides['ours exact']:.2f}" for name, sides in both.items())
    return f"Speed of the whole step in exact mode, with decoding in torch at every call as 1: {speeds}." if speeds else ""


def int8_line(rows: Rows) -> str:
    """Say what the scales cost int8's product at the widest weight: the best tile with and without."""
    shape = lambda row: (int(row["n"]), int(row["k"]), int(row["m"]))
    timed = [row for row in rows if row["p50_ms"] and not _is_wrong(row)]
    widest = [row for row in timed if shape(row) == max(map(shape, timed))]
    best: dict[str, float] = {}
    for row in widest:
        kind = {"none": "bare", "": "whole"}.get(row["scales"], "scaled")
        if row["what"] in ("product", "bf16 torch"):
            best[kind] = min(float(row["p50_ms"]), best.get(kind, float("inf")))
    if best.keys() != {"scaled", "bare", "whole"}:
        return ""
    n, k, m = shape(widest[0])
    where = f"{m} x {n} x {k} ({widest[0]['format']})"
    return (
        f"int8's product alone, {where}, with the best tile each: {best['scaled']:.2f} ms, without its scales {best['bare']:.2f} ms; "
        f"torch's in bfloat16 {best['whole']:.2f} ms."
    )


def changed_line(linears: Rows, sweep: Rows, size: str) -> str:
    """Add up exact mode's linear calls with a default that changed later, where `sweep` has both."""
    lines, change = [], CHANGED.get(linears[0]["commit"]) if linears else None
    for (_, name), rows in by_step(linears).items():
        sums = _linear_totals(rows, size)
        saved = saved_ms(rows, sweep, change) if change and {"torch", "ours exact"} <= sums.keys() else None
        if saved:
            left = sums["ours exact"].p50 - saved
            lines.append(f"{name} {left:.1f} ms, {sums['torch'].p50 / left:.2f}")
    if not change or not lines:
        return ""
    return (
        f"**Arithmetic, not a measurement**: exact mode has another default since ({change.said}). The same linear calls, "
        f"less what `sweep.csv` of that session says it saves in each: {'; '.join(lines)}. The whole step above has the old "
        "code."
    )


def saved_ms(rows: Rows, sweep: Rows, change: Changed) -> float | None:
    """Return what the step's changed calls save, both ways timed alike; None where either is missing.

    tuning.csv of 2026-11-28 timed some of them call by call, as linear.csv does: its totals are within 0.1 ms of these.
    """
    shape = lambda row: (row["format"], row["m"], row["n"], row["k"])
    times = {(*shape(row), row["algorithm"]): float(row["p50_ms"]) for row in sweep if row["p50_ms"] and not _is_wrong(row)}
    saved = 0.0
    for row in rows:
        if row["provider"] != "ours exact" or row["capability"] != change.capability or int(row["m"]) not in change.rows:
            continue
        then, now = (times.get((*shape(row), algorithm)) for algorithm in (change.then, change.now))
        if then is None or now is None:
            return None
        saved += int(row["calls"]) * (then - now)
    return saved
