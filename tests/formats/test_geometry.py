"""What a format's file states about itself: registration, geometry, and the words that open it."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

import flux_kernels.formats
from flux_kernels.formats import FORMATS, PLAIN_TYPES

from .. import libggml_oracle

MANIFEST = json.loads((Path(__file__).parents[1] / "golden" / "manifest.json").read_text())
FOLDER = Path(flux_kernels.formats.__file__).parent
NO_FORMATS = ("plain", "packed")
FILES = [path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_") and path.stem not in NO_FORMATS]
OPENING = re.compile(
    r"(?P<name>\w+): x = (?P<formula>[^\n,]+), (?P<codes>[^\n]+)\.\n\n"
    r"(?P<type_size>\d+) bytes per (?P<block_size>\d+) weights, (?P<bits>[\d.]+) bits/weight\.\n"
)
every_format = pytest.mark.parametrize("name", FORMATS)


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_registered(file):
    fmt = importlib.import_module(f"flux_kernels.formats.{file}").FORMAT
    assert FORMATS.get(fmt.name) is fmt
    assert fmt.name.lower() == file


@every_format
def test_the_opening_states_the_computed_numbers(name):
    fmt = FORMATS[name]
    opening = importlib.import_module(f"flux_kernels.formats.{name.lower()}").__doc__
    stated = OPENING.fullmatch(opening)
    assert stated, opening
    assert fmt.about is opening
    assert stated["name"] == name
    assert (int(stated["type_size"]), int(stated["block_size"])) == (fmt.type_size, fmt.block_size)
    assert stated["bits"] == f"{fmt.bits_per_weight:g}"


def test_all_golden_types_are_registered_in_ggml_order():
    assert set(FORMATS) == set(MANIFEST)
    numbers = [fmt.ggml_type for fmt in FORMATS.values()]
    assert numbers == sorted(set(numbers))
    assert not set(numbers) & {plain.ggml_type for plain in PLAIN_TYPES.values()}


@every_format
def test_geometry_is_that_of_the_manifest_and_libggml(name):
    fmt, stated = FORMATS[name], MANIFEST[name]
    assert (fmt.ggml_type, fmt.block_size, fmt.type_size) == (
        stated["ggml_type"],
        stated["block_size"],
        stated["type_size"],
    )
    assert fmt.block_size % fmt.sub_block == 0
    pytest.importorskip("libggml", reason="libggml-python has no wheel for this machine")
    assert libggml_oracle.type_ids()[name] == fmt.ggml_type
    assert libggml_oracle.geometry(name) == (fmt.block_size, fmt.type_size)


@every_format
def test_blocks_that_cannot_be_loaded_by_words_ask_for_planes(name):
    """Blocks that are only 1- or 2-byte aligned admit no 4-byte load.

    Four bytes are the narrowest that an asynchronous copy can be.
    """
    fmt = FORMATS[name]
    assert fmt.planes or fmt.type_size % 4 == 0


@every_format
def test_formats_that_gather_say_so(name):
    """Their decode reads a grid in memory, which decides on their tiles; a table of 16 values is no grid."""
    source = (FOLDER / f"{name.lower()}.py").read_text()
    assert FORMATS[name].gathers == ("gather_grid" in source)
    assert not FORMATS[name].gathers or FORMATS[name].table is not None
