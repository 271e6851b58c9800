"""Draw the rows of one run. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

SHOWN = ("torch", "diffusers", "ours exact", "ours fp16_accumulate", "ours int8")


def speed_beside_rows(rows: Sequence[Mapping]) -> bytes:
    """Return a PNG: speed of every call beside torch's in the same run, over the rows M of its input.

    Raises:
        ImportError: where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'flux_kernels[bench]'.") from error
    names = list(dict.fromkeys(row["format"] for row in rows))
    figure = Figure(figsize=(4.2 * max(2, len(names)), 4.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        base = {r["where"]: float(r["p50_ms"]) for r in rows if (r["format"], r["provider"]) == (name, "torch") and r["p50_ms"]}
        for provider in SHOWN:
            mine = [r for r in rows if (r["format"], r["provider"]) == (name, provider) and r["p50_ms"] and r["where"] in base]
            points = [(int(r["m"]), base[r["where"]] / float(r["p50_ms"])) for r in mine]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    "o",
                    alpha=0.75,
                    label="torch, not quantized" if provider == "torch" else provider,
                )
        axes.set(title=name, xscale="log", yscale="log", xlabel="rows of input M (image and text tokens)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.grid(True, alpha=0.25)
    panels[0].set_ylabel("speed, torch = 1 (higher is better)")
    first = rows[0]
    origin = ", ".join(str(first[key]) for key in ("device", "torch", "commit", "date") if first.get(key))
    figure.supxlabel(
        f"Each dot is one linear call of a FLUX.1-dev step; above the line is faster than 16 bit. {origin}", fontsize=8
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    held = BytesIO()
    figure.savefig(held, format="png", dpi=130, facecolor="white")
    return held.getvalue()
