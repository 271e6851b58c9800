"""The plots of `bench`: what is drawn is what the rows say, with words for newcomers."""

from __future__ import annotations

from io import BytesIO

import pytest
from matplotlib.figure import Figure
from PIL import Image

from flux_kernels.benchmark import plots
from flux_kernels.benchmark.plots import memory_against_time, roofline, speed_over_rows, throughput
from flux_kernels.models.calls import step_calls

from .made_rows import CEILINGS, ORIGIN, found, linear_rows, step_row

PAGE = 948  # pixels: html_page's width of 980 without its margins


@pytest.fixture
def drawn(monkeypatch):
    """Catch each figure as it is finished; the PNG itself is checked once per plot."""
    caught = []
    real = plots.finished

    def catch(figure, *arguments):
        caught.append(figure)
        return real(figure, *arguments)

    monkeypatch.setattr(plots, "finished", catch)
    return caught


def line(figure: Figure, label: str, panel: int = 0):
    axes = figure.axes[panel]
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    handle = handles[label]
    return handle.lines[0] if hasattr(handle, "lines") else handle


def check(png: bytes, figure: Figure) -> None:
    """Check a PNG: words inside and legible at a page's width, labelled axes, an origin."""
    image = Image.open(BytesIO(png))
    image.verify()
    texts = [figure._suptitle, figure._supxlabel, figure._supylabel, *figure.legends]
    for text in texts:
        box = text.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= image.size[0] and 0 <= box.y0 and box.y1 <= image.size[1]
    panels = [axes.get_tightbbox() for axes in figure.axes if axes.get_visible()]
    apart = [*panels, *(text.get_window_extent() for text in texts[:2])]
    assert not any(legend.get_window_extent().overlaps(box) for legend in figure.legends for box in apart)
    assert not any(figure._suptitle.get_window_extent().overlaps(panel) for panel in panels)
    words = [figure._supxlabel, figure._supylabel, *figure.legends[0].get_texts(), *figure.axes[0].get_xticklabels()]
    points_to_pixels = figure.dpi / 72 * min(1, PAGE / image.size[0])
    # A browser's words are 16.
    assert min(one.get_fontsize() for one in words) * points_to_pixels > 12
    assert ORIGIN["device"] in figure._supxlabel.get_text() and "commit abc" in figure._supxlabel.get_text()


def test_throughput_is_operations_over_time(drawn):
    check(throughput([*linear_rows(), *linear_rows("Q8_0")]), drawn[0])
    m, tflops = line(drawn[0], "flux_kernels int8").get_data()
    assert list(m) == sorted({call.m for call in step_calls()})
    assert list(tflops) == pytest.approx([200] * len(m), rel=1e-3)
    assert [axes.get_title() for axes in drawn[0].axes] == ["Q4_K", "Q8_0"]
    assert "TFLOP/s" in drawn[0]._supylabel.get_text()


def test_the_roofline_has_both_measured_limits_and_leaves_out_unknown_bytes(drawn):
    check(roofline(linear_rows(), CEILINGS), drawn[0])
    slope, flat = drawn[0].axes[0].get_lines()[:2]
    # 900 GB/s: 0.9 TFLOP/s for each FLOP/byte.
    assert [y / x for x, y in zip(*slope.get_data())] == pytest.approx([0.9] * 2)
    assert list(flat.get_ydata()) == [160, 160]
    labels = drawn[0].axes[0].get_legend_handles_labels()[1]
    assert "bitsandbytes nf4" not in labels and "flux_kernels exact" in labels
    x, y = line(drawn[0], "not quantized (torch)").get_data()
    call = step_calls()[0]
    assert x[0] == pytest.approx(call.flops / (2 * (call.n * call.k + call.m * (call.n + call.k)))) and y[0] == 100


def test_speed_is_beside_torch_in_the_same_call(drawn):
    check(speed_over_rows(linear_rows()), drawn[0])
    assert list(line(drawn[0], "diffusers' GGUF layers").get_ydata()) == pytest.approx([0.5] * 11, rel=1e-3)


def test_memory_shows_weights_and_peak_of_every_kind_of_run(drawn):
    rows = [
        step_row(side, 400.0 + i, 10.0, what)
        for i, side in enumerate(("torch", "ours exact"))
        for what in ("step", "denoising")
    ]
    rows[0]["peak_bytes"] = ""
    check(memory_against_time([*rows, step_row("diffusers", "", 5.0)]), drawn[0])
    assert [axes.get_title() for axes in drawn[0].axes] == ["one step of FLUX.1-dev", "pictures of the tiny embedded model"]
    marks = [(one.get_fillstyle(), one.get_ydata()[0]) for one in drawn[0].axes[0].get_lines() if one.get_marker() != "None"]
    assert marks == [("none", 10.0), ("full", 12.0), ("none", 10.0)]
    assert "GB" in drawn[0]._supylabel.get_text()


def test_many_types_and_sides_still_have_room(drawn):
    """The widest case: every known side and all peers, more types than fit beside each other."""
    speeds = {f"a library with a long name {i}": 1.0 + i / 10 for i in range(12)} | {"torch": 1.0, "ours exact": 0.9}
    rows = [row for name in ("Q4_K", "Q6_K", "Q8_0", "Q5_K") for row in linear_rows(name)]
    check(speed_over_rows(rows), drawn[0])
    monkey = [row for row in found().linears if row["p50_ms"]]
    check(throughput(monkey), drawn[1])
    check(throughput(linear_rows(speeds=speeds)), drawn[2])
