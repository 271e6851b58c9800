"""Tuning records: what is chosen from them, and what is refused.

Old ones are used with a warning.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace

import pytest
import torch

from flux_kernels._triton import TRITON_VERSION
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import choice, record
from flux_kernels.kernels.modes import MODES
from flux_kernels.kernels.record import TuningRecord, TuningRow, kernel_hash, nearest, order_records
from flux_kernels.kernels.tiles import Tile

Q4_K = FORMATS["Q4_K"]
CARD = "NVIDIA GeForce RTX 4090"
GPU = torch.device("cuda", 0)
TILE = Tile(64, 128, 256, 4, 3, 2)


def row(**changes) -> TuningRow:
    made = TuningRow(
        *("exact", "Q4_K", 512, 3072, 3072, "split_k", TILE, 0.2, 0.3, TRITON_VERSION, kernel_hash("exact", Q4_K)),
    )
    return replace(made, **changes)


def of(*rows: TuningRow, name: str = CARD, capability=(8, 9)) -> TuningRecord:
    return TuningRecord(dict(name=name, capability=list(capability)), {}, "2026-11-21", {row.key: row for row in rows})


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Pretend that an RTX 4090 is there, with an empty records folder of its own."""
    monkeypatch.setenv(record.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    for module in (record, choice):
        monkeypatch.setattr(module, "capability_of", lambda device: (8, 9))
    monkeypatch.setattr(choice, "processors_of", lambda device: 128)
    choice.forget()
    yield tmp_path
    choice.forget()


def chosen(m: int = 512, n: int = 3072, k: int = 3072, dtype=torch.bfloat16, branch: bool = False) -> choice.Choice:
    return choice.choose("exact", Q4_K, m, n, k, GPU, dtype, branch)


def test_a_record_survives_the_file(tmp_path):
    path = tmp_path / "deeper" / "card.json"
    of(row(), row(m=4096, algorithm="two_stage", tile=None)).save(path)
    assert TuningRecord.load(path) == of(row(), row(m=4096, algorithm="two_stage", tile=None))
    assert [file.name for file in path.parent.iterdir()] == ["card.json"]


def test_a_measured_choice_wins_over_the_default_near_its_m_only(card):
    assert chosen().algorithm == "fused"
    of(row()).save(record.record_path(CARD))
    choice.forget()
    assert (chosen().algorithm, chosen().tile) == ("split_k", TILE)
    assert "measured on this card type" in chosen().why
    assert chosen(m=700).algorithm == "split_k"
    assert chosen(m=750).algorithm == "fused"  # more than half a power of two away
    assert chosen(n=12288).algorithm == "fused"


def test_the_nearest_row_serves():
    record = of(row(m=4096), row(m=4608, algorithm="fused"))
    assert [nearest(record, "exact", "Q4_K", m, 3072, 3072).m for m in (4080, 4096, 4592, 5000)] == [4096, 4096, 4608, 4608]
    assert nearest(record, "int8", "Q4_K", 4096, 3072, 3072) is None


def test_a_record_of_the_same_capability_serves_after_the_cards_own(card):
    kin, other = of(row(), name="RTX 4060"), of(row(), name="RTX 3090", capability=(8, 6))
    own = of(row(algorithm="fused"))
    ordered = order_records([other, kin, own], CARD, (8, 9))
    assert [first for first, _ in ordered] == [own, kin]
    kin.save(card / "kin.json")
    choice.forget()
    assert chosen().why.startswith("measured on RTX 4060")


def test_a_16_bit_row_never_serves_float32(card):
    """Its tile may take twice the shared memory there, more than the card has."""
    of(row()).save(record.record_path(CARD))
    choice.forget()
    assert chosen().algorithm == chosen(dtype=torch.float16).algorithm == "split_k"
    assert chosen(dtype=torch.float32).algorithm == "two_stage"
    of(row(), row(dtype="float32", algorithm="fused")).save(record.record_path(CARD))
    choice.forget()
    assert (chosen(dtype=torch.float32).algorithm, chosen().algorithm) == ("fused", "split_k")


def test_the_own_dtype_comes_before_the_other_of_16_bits(card):
    of(row(), row(dtype="float16", algorithm="fused", m=600)).save(record.record_path(CARD))
    choice.forget()
    assert (chosen().algorithm, chosen(dtype=torch.float16).algorithm) == ("split_k", "fused")


def test_a_branch_has_rows_of_its_own(card):
    """Except where torch's product adds it: that has no tile which could spill with one."""
    other = replace(TILE, block_m=128)
    of(row()).save(record.record_path(CARD))
    choice.forget()
    assert chosen(branch=True).algorithm == "fused" and chosen(branch=True).why.startswith("decodes")
    of(row(), row(branch=True, tile=other)).save(record.record_path(CARD))
    choice.forget()
    assert (chosen(branch=True).tile, chosen().tile) == (other, TILE)
    of(row(algorithm="two_stage", tile=None)).save(record.record_path(CARD))
    choice.forget()
    assert chosen(branch=True).algorithm == "two_stage"


def test_rows_of_the_weight_are_part_of_the_choice(card):
    of(row(algorithm="two_stage", tile=None, rows=1536)).save(record.record_path(CARD))
    choice.forget()
    assert (chosen().algorithm, chosen().rows) == ("two_stage", 1536)
    assert "in chunks of 1536 rows" in str(chosen())


def test_records_of_the_first_schema_are_read(card):
    """They say nothing of branch and rows."""
    path = record.record_path(CARD)
    of(row()).save(path)
    data = json.loads(path.read_text()) | dict(schema="flux_kernels.tuning/1")
    for old in data["rows"]:
        del old["branch"], old["rows"]
    path.write_text(json.dumps(data))
    assert TuningRecord.load(path) == of(row())
    choice.forget()
    assert (chosen().algorithm, chosen().rows, chosen(branch=True).algorithm) == ("split_k", None, "fused")


@pytest.mark.parametrize("change", [dict(triton="2.0"), dict(kernel_hash="0")], ids=["Triton", "kernel"])
def test_an_old_row_is_used_with_one_warning(card, change):
    of(row(**change)).save(record.record_path(CARD))
    choice.forget()
    with pytest.warns(UserWarning, match="flux-kernels tune"):
        assert chosen().algorithm == "split_k"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(m=513).algorithm == "split_k"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda data: data.update(schema="other/1"),
        lambda data: data.pop("device"),
        lambda data: data["rows"][0].update(format="Q9_Z"),
        lambda data: data["rows"][0].update(tile=None),
        lambda data: data["rows"][0]["tile"].update(tile_k=100),
        lambda data: data["rows"][0]["tile"].update(splits=5),
        lambda data: data["rows"][0]["tile"].update(block_m="many"),
        lambda data: data["rows"][0].pop("ms"),
        lambda data: data["rows"][0].update(m=0),
        lambda data: data["rows"][0].update(m="512"),
        lambda data: data["rows"][0].update(n=True),
        lambda data: data["rows"][0].update(algorithm="five_stage"),
        lambda data: data["rows"][0].update(dtype="float64"),
        lambda data: data["rows"][0].update(branch="no"),
        lambda data: data["rows"][0].update(rows=0),
        lambda data: data["rows"][0].update(rows="all"),
    ],
)
def test_a_broken_record_is_left_out_with_a_sentence(card, break_it):
    path = record.record_path(CARD)
    of(row()).save(path)
    data = json.loads(path.read_text())
    break_it(data)
    path.write_text(json.dumps(data))
    choice.forget()
    with pytest.warns(UserWarning, match="is not a tuning record"):
        assert chosen().algorithm == "fused"


def test_comments_and_docstrings_make_no_record_old(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text('"""Before."""\n\ndef f(x):\n    """Add."""\n    return x + 1  # one\n')
    before = record._code(path)
    record._code.cache_clear()
    path.write_text('"""After."""\ndef f(x):\n    # More.\n    return x + 1\n')
    assert record._code(path) == before
    record._code.cache_clear()
    path.write_text("def f(x):\n    return x + 2\n")
    assert record._code(path) != before


def test_the_kernel_hash_follows_mode_and_format():
    hashes = {kernel_hash(mode, FORMATS[name]) for mode in MODES for name in ("Q4_K", "Q8_0")}
    assert len(hashes) == 6
    for mode in MODES.values():
        for name in mode.sources:
            assert (record._PACKAGED.parent / f"{name}.py").exists()


@pytest.mark.parametrize("mode", MODES)
def test_what_kernels_call_is_hashed_with_them(mode):
    """A change of a function that a kernel inlines makes its measurements old.

    Where a tile lies on the grid does not count.
    """
    folder, listed = record._PACKAGED.parent, MODES[mode].sources
    for name in listed:
        for imported in re.finditer(r"^from \.(\w+) import (.+)$", (folder / f"{name}.py").read_text(), re.MULTILINE):
            inlined = "@jit" in (folder / f"{imported[1]}.py").read_text() and not imported[2].endswith("_kernel")
            assert not inlined or imported[1] in listed or imported[2] == "tile_position", (name, imported[0])
