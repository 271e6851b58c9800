"""The report: one page without a network, figures that show what they claim."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from flux_kernels.mixed.cost import JointRow
from flux_kernels.mixed.file_layout import embedded_shapes, layout_of_shapes
from flux_kernels.mixed.option import Option
from flux_kernels.plan.budget import parse_size
from flux_kernels.plan.problem import make_problem, plan_within
from flux_kernels.plan.report import page, write_report
from flux_kernels.plan.report_data import Measured, gather, uniform_files
from flux_kernels.plan.report_plots import bytes_by_type, heat_map, size_against_cost, spread

from ..mixed.made_costs import made_table


@pytest.fixture(scope="module")
def problem():
    return make_problem(made_table(), layout_of_shapes(embedded_shapes(), "<embedded>"))


@pytest.fixture(scope="module")
def data(problem):
    plan = plan_within(problem, 3_600_000)
    chosen = {name: plan.by_tensor()[name] for name in problem.costs}
    joint = [
        JointRow(chosen, plan.cost * 1.1, 1.0, plan.cost, plan.cost * 1.3),
        JointRow(dict.fromkeys(chosen, Option("Q4_K")), plan.cost * 4, 1.0),
        JointRow({**chosen, "single_blocks.0.linear1.weight": Option("Q8_0")}, plan.cost, 1.0),
    ]
    return gather(problem, plan, problem.costs, joint, Image.new("RGB", (32, 16), "red"))


def test_the_page_holds_everything_and_asks_for_nothing(data, tmp_path):
    written = write_report(data, tmp_path / "plan.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    text = (tmp_path / "plan.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    # Three figures and the pictures.
    assert len(images) == 4
    for path, image in zip(written[1:], images):
        assert base64.b64decode(image) == path.read_bytes()
        Image.open(path).verify()
    assert Image.open(BytesIO(base64.b64decode(images[3]))).size == (32, 16)
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)", text)
    assert "&lt;embedded&gt;_mx" in text and "<embedded>" not in text
    assert f"{data.plan.bytes:,} bytes" in text
    assert "this plan" in text and "another plan" in text and "Measured as a whole" in text


def test_the_plan_is_compared_with_the_uniform_file_of_its_size(problem):
    """Also where the plan is some bytes smaller than that file, as it almost always is."""
    plan = plan_within(problem, parse_size("Q4_K", problem.layout, problem.costs))
    assert plan.bytes < problem.layout.file_bytes(dict.fromkeys(problem.costs, Option("Q4_K")))
    text = page(gather(problem, plan, problem.costs), {})
    less = 1 - plan.cost / sum(options[Option("Q4_K")] for options in problem.costs.values())
    assert f"{less:.0%} less than Q4_K for everything" in text


def test_without_joint_measurements_the_page_says_so(problem, tmp_path):
    plain = gather(problem, plan_within(problem, 3_600_000), problem.costs)
    write_report(plain, tmp_path / "plan.html")
    assert "measure --plan" in (tmp_path / "plan.html").read_text()


def test_joint_measurements_are_told_apart(data):
    assert [found.label for found in data.joint] == ["this plan", "Q4_K", "another plan"]
    assert data.joint[0].bytes == data.plan.bytes
    assert data.joint[1].bytes == {name: size for name, size, _ in data.uniform}[Option("Q4_K")]


def test_a_plan_that_was_measured_is_shown_without_its_row(problem):
    plan = replace(plan_within(problem, 3_600_000), joint_cost=0.5)
    assert gather(problem, plan, problem.costs).joint == [Measured("this plan", plan.bytes, 0.5)]


def test_the_curve_shows_plan_uniform_files_and_intervals(data):
    (axes,) = size_against_cost(data).axes
    labels = axes.get_legend_handles_labels()[1]
    assert len(labels) == 5
    texts = {text.get_text() for text in axes.texts}
    assert {"Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "size asked for", "this plan"} <= texts
    assert axes.get_yscale() == "log"
    low, high = axes.get_xlim()
    assert low < data.plan.bytes / 1e6 < high
    best = dict(data.best)
    assert all(cost >= min(c for size, c in best.items() if size >= at) for _, at, cost in data.uniform)


def test_the_heat_map_marks_the_choice_of_every_tensor(data):
    axes = heat_map(data).axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text().partition("\n")[0] for label in axes.get_xticklabels()]
    assert "F16" not in columns and columns[0] == "Q2_K" and columns[-1] == "Q8_0"
    marks = {(rows[int(y)], columns[int(x)]) for x, y in axes.collections[0].get_offsets()}
    assert marks == {
        (name.removesuffix(".weight"), str(data.options[name])) for name in data.costs if data.options[name] != Option("F16")
    }


def test_the_bars_add_up_to_the_tensors_of_the_file(data):
    (axes,) = bytes_by_type(data).axes
    total = sum(bar.get_width() for bar in axes.patches) * 1e6
    assert total == pytest.approx(data.plan.bytes - data.layout.empty_bytes)


def test_uniform_files_leave_out_types_that_some_tensor_lacks(problem):
    costs = {name: dict(options) for name, options in problem.costs.items()}
    del costs["single_blocks.0.linear1.weight"][Option("Q3_K")]
    assert Option("Q3_K") not in [name for name, _, _ in uniform_files(problem.layout, costs)]


@pytest.mark.parametrize(
    ("places", "moved"),
    [
        ([0.0, 0.5, 1.0], [0.0, 0.5, 1.0]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.3, 0.31, 0.32, 0.9], [0.21, 0.31, 0.41, 0.9]),
        # Two crowds that meet become one.
        ([0.0, 0.08, 0.2, 0.21], [-0.0275, 0.0725, 0.1725, 0.2725]),
    ],
)
def test_names_are_moved_apart_no_further_than_needed(places, moved):
    assert spread(places, 0.1) == pytest.approx(moved)


def test_names_of_files_of_one_size_do_not_lie_on_each_other(problem):
    """Q4_0, Q4_K and IQ4_NL have the same bytes, and here almost the same cost."""
    plain = gather(problem, plan_within(problem, 3_600_000), problem.costs)
    close = [(Option(label), 3_700_000, 1e-4 * (1 + number / 50)) for number, label in enumerate(("Q4_0", "Q4_K", "IQ4_NL"))]
    figure = size_against_cost(replace(plain, uniform=close))
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text() in ("Q4_0", "Q4_K", "IQ4_NL")]
    assert len(boxes) == 3 and not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)


def test_the_page_tells_what_fits_counts_only_where_it_was_asked(problem):
    plan = plan_within(problem, 3_600_000, about={"size": "3.6MB"})
    assert "--fits" not in page(gather(problem, plan, problem.costs), {})
    plan = plan_within(problem, 3_600_000, about={"fits": "12GB"})
    assert "What --fits counts" in page(gather(problem, plan, problem.costs), {})
