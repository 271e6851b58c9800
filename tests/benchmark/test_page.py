"""Test the report of `bench`: a page without a network, verdict first, rows with origins, and JSON."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from io import BytesIO

import pytest
from PIL import Image

from flux_kernels.benchmark import page as module
from flux_kernels.benchmark.json_rows import document
from flux_kernels.benchmark.page import page
from flux_kernels.benchmark.prices import prices
from flux_kernels.benchmark.verdict import verdict
from flux_kernels.errors import FormatError
from flux_kernels.files import check_writable, write_whole

from .made_rows import ORIGIN, SIZE, found, linear_rows, step_row

PICTURES = [dict(format="Q4_K", compute="int8", psnr_db="35.31", ssim="0.9", seeds="64") | ORIGIN]


@pytest.fixture(scope="module")
def text():
    run = found()
    return page(run, verdict(run.whole(SIZE), run.steps), PICTURES)


def test_the_page_asks_for_nothing_and_says_the_verdict_first(text):
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)|url\(", text)
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 4
    for image in images:
        Image.open(BytesIO(base64.b64decode(image))).verify()
    assert text.index("One whole step in exact mode") < text.index("Speed and its price") < text.index("<img")
    assert "prefers-color-scheme:dark" in text


def test_what_rows_say_is_escaped(text):
    assert "a &lt;card&gt; &amp; more" in text and "<card>" not in text
    assert "not installed (&lt;sdnq&gt;)" in text


def test_every_row_is_there_with_its_origin(text):
    run = found()
    assert f"Every linear call ({len(run.linears)} rows)" in text and "Every whole run (3 rows)" in text
    assert text.count("<td class=n>1</td></tr>") == len(run.linears) + len(run.steps)
    assert "Origin 1: a &lt;card&gt; &amp; more, driver 600, torch 2.13, triton 3.7, commit abc, 2026-01-02." in text
    assert "900 GB/s" in text and "160 TFLOP/s" in text


def test_a_speed_stands_beside_its_price_and_says_whose_pictures(text):
    cells = re.search(r"<tr><td>Q4_K</td><td>flux_kernels int8</td>(.*?)</tr>", text)[1]
    assert re.findall(r">([^<>]+)<", cells) == ["2.00", "0.002", "0.01", "0.004", "35.31", "0.9"]
    assert "tiny embedded model" in text and "not of FLUX.1 and not of this run" in text


def test_one_size_is_said_once_and_several_in_every_line():
    """Speeds that do not differ from torch's have a mark, which the words explain."""
    run = found()
    one = prices(run, PICTURES)
    assert "all linear calls of one step together (1024x1024)" in one and one.count(SIZE) == 1 and "~" not in one
    other = [row | dict(size="512x512, M and N / 2") for row in linear_rows(spread=0.3)]
    both = prices(replace(run, linears=[*run.linears, *other]), PICTURES)
    assert "<td>Q4_K</td><td>512x512, M and N / 2</td><td>flux_kernels exact</td><td class=n>~0.90<" in both
    assert "~: no difference seen" in both and "rows and outputs of each call divided by that" in both


def test_no_recorded_pictures_are_none(text, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_FIDELITY", tmp_path / "none.csv")
    assert module.fidelity_rows() == []
    run = found()
    run.linears, run.steps = [], []
    assert "<img" not in page(run, verdict([]))


def test_machines_get_numbers_and_null():
    run = found()
    run.linears[0] |= dict(error="nan")
    read = json.loads(document(run, ["a line"], PICTURES))
    assert read["verdict"] == ["a line"] and read["origin"]["commit"] == "abc" and read["ceilings"]["copy_gb_s"] == 900
    assert read["linears"][0]["error"] is None and read["linears"][0]["p50_ms"] > 0 and read["linears"][-1]["p50_ms"] is None
    assert read["steps"][0]["p50_ms"] == 400 and read["embedded_fidelity"][0]["psnr_db"] == 35.31
    assert "One whole step" in read["steps_in_words"][0]


def test_the_verdict_speaks_of_the_whole_step_where_there_is_one():
    steps = [step_row("torch", 400.0, 23.8), step_row("ours exact", 412.0, 6.8)]
    lines = verdict(linear_rows(), steps)
    assert len(lines) == 5
    assert (
        lines[1] == "One whole step in exact mode, against the unquantized model: Q4_K 0.97 times the speed, 17.0 GB smaller."
    )
    steps[0] |= dict(dtype="bfloat16")
    assert "17.0 GB smaller than in bfloat16" in verdict(linear_rows(), steps)[1]
    steps[1] |= dict(p20_ms="390.0")
    assert "Q4_K 0.97 times the speed (no difference seen), 17.0 GB smaller" in verdict(linear_rows(), steps)[1]
    assert "unquantized torch as 1" in verdict(linear_rows(), [step_row("ours exact", 412.0, 6.8)])[1]


def test_a_target_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    with pytest.raises(FormatError, match="there is no folder"):
        check_writable(tmp_path / "absent" / "a.html", "--report")
    with pytest.raises(FormatError, match="is a folder"):
        check_writable(tmp_path, "--report")
    target = tmp_path / "a.html"
    write_whole(target, b"mine")
    check_writable(target, "--report")
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path != target)
    with pytest.raises(FormatError, match="cannot be written"):
        check_writable(target, "--report")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_whole(target, b"other")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"] and target.read_bytes() == b"mine"
