"""Amounts and tables in words, as every command and report writes them."""

from __future__ import annotations

import pytest

from flux_kernels.report.amounts import counted, megabytes, size_text
from flux_kernels.report.text_table import aligned


@pytest.mark.parametrize(("count", "text"), [(0, "0 prompts"), (1, "1 prompt"), (2, "2 prompts"), (1200, "1,200 prompts")])
def test_things_are_counted_in_the_right_number(count, text):
    assert counted(count, "prompt") == text


def test_sizes_have_the_unit_that_fits_and_columns_have_one():
    assert (size_text(999_900_000), size_text(1e9, 2), size_text(-6.84e9)) == ("999.9 MB", "1.00 GB", "-6.8 GB")
    assert [megabytes(size) for size in (4_000, 6_809_520_000)] == ["0.00", "6,809.52"]


def test_columns_are_as_wide_as_their_widest_cell():
    lines = aligned([("layer", "MB"), ("a", "10.5"), ("blocks", "")], lambda column, _: column == 1)
    assert lines == ["layer     MB", "a       10.5", "blocks"]
