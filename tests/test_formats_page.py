"""Check docs/formats.md: as the registry makes it, a section a type, offsets drawn where they are."""

from __future__ import annotations

import re

import pytest

from flux_kernels.formats import FORMATS, PLAIN_TYPES, Field, Layout, describe, draw_layout
from tools import write_formats_page

from .made_up_format import FORMAT as MADE_UP


def test_the_page_is_up_to_date(capsys):
    assert write_formats_page.main(check=True) == 0, capsys.readouterr().out


def test_a_page_behind_the_registry_is_refused_with_the_difference(tmp_path, monkeypatch, capsys):
    path = tmp_path / "formats.md"
    path.write_text(write_formats_page.page().replace("144 bytes per 256 weights", "145 bytes per 256 weights"))
    monkeypatch.setattr(write_formats_page, "PAGE", path)
    assert write_formats_page.main(check=True) == 1
    said = capsys.readouterr().out
    assert "-145 bytes per 256 weights" in said and "+144 bytes per 256 weights" in said and "make tables" in said
    write_formats_page.main(check=False)
    assert write_formats_page.main(check=True) == 0


def test_every_type_has_formula_geometry_and_drawing():
    page = write_formats_page.page()
    sections = dict(re.findall(r"^## (\S+)\n\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert FORMATS.keys() <= sections.keys()
    for name, fmt in FORMATS.items():
        assert re.match(r"`x = .+`: .+\.\n\n", sections[name]), name
        assert (
            f"{fmt.type_size} bytes per {fmt.block_size} weights" in sections[name]
            and draw_layout(fmt.layout) in sections[name]
        )
        assert f"](#{name.lower()})" in page
    assert all(f"| {name} |" in page for name in PLAIN_TYPES)


def test_a_drawing_names_offsets_and_values():
    """Q3_K's offsets as in ggml-common.h: hmask[32], qs[64], scales[12], d."""
    assert draw_layout(
        Layout(Field("hmask", "u8", 32), Field("qs", "u8", 64), Field("scales", "u8", 12), Field("d", "f16"))
    ) == (
        "0                    32                                        96        108   110\n"
        "+--------------------+-----------------------------------------+---------+-----+\n"
        "| hmask              | qs                                      | scales  | d   |\n"
        "| 32 x u8            | 64 x u8                                 | 12 x u8 | f16 |\n"
        "+--------------------+-----------------------------------------+---------+-----+"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_edges_of_a_drawing_stand_under_their_offsets(name):
    layout = FORMATS[name].layout
    offsets, line, *_ = draw_layout(layout).splitlines()
    edges = [match.start() for match in re.finditer(r"\+", line)]
    assert [int(offsets[edge:].split()[0]) for edge in edges] == [*layout.offsets.values(), layout.type_size]


def test_a_stranger_needs_no_docstring():
    """A row without `about`, or with other words in it, is described without a formula."""
    facts = describe(MADE_UP)
    assert (facts.formula, facts.codes, facts.notes) == ("", "", "")
    assert [(field.name, field.offset, field.size) for field in facts.fields] == [("d", 0, 2), ("qs", 2, 64)]
    assert "66 bytes per 64 weights" in write_formats_page.section(MADE_UP)
