"""Plan files: what is written is read again, and every defect has an error of its own."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from flux_kernels import FormatError
from flux_kernels.mixed.plan_file import SCHEMA, Plan

GOOD = {"schema": SCHEMA, "types": {"a.weight": "Q4_K", "b.bias": "F32"}, "bytes": 100, "cost": 0.5}
FULL = Plan(
    types={"a.weight": "Q4_K"},
    low_rank={"a.weight": 16},
    bytes=10,
    cost=0.25,
    joint_cost=0.5,
    costs_sha256="0" * 64,
    options={"size": "8GB", "keep": ["*=Q8_0"]},
    versions={"torch": "2"},
    date="2026-01-01",
)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "plan.json"
    FULL.save(path)
    assert Plan.load(path) == FULL
    assert json.loads(path.read_text()) == {"schema": SCHEMA, **asdict(FULL)}
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_what_is_not_needed_may_be_left_out():
    plan = Plan.from_json(json.dumps(GOOD))
    assert (plan.low_rank, plan.joint_cost, plan.costs_sha256, plan.options) == ({}, None, "", {})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"schema": "flux_kernels.plan/2"}, r"its \"schema\" is 'flux_kernels.plan/2', legal is 'flux_kernels.plan/1'"),
        ({"types": None}, '"types" is a NoneType, legal is an object'),
        ({"types": {}}, "names at least one tensor"),
        ({"types": {"a": "Q4_K_S"}}, "tensor 'a' has the unknown type 'Q4_K_S'; legal are F32"),
        ({"types": {"a": 4}}, "unknown type 4"),
        ({"low_rank": {"c": 8}}, "\"low_rank\" names 'c'"),
        ({"low_rank": {"a.weight": 0}}, "rank of 'a.weight' is 0"),
        ({"low_rank": {"a.weight": True}}, "is True, legal is an integer"),
        ({"low_rank": []}, '"low_rank" is a list'),
        ({"bytes": 1.5}, '"bytes" is 1.5'),
        ({"bytes": -1}, '"bytes" is -1'),
        ({"cost": None}, '"cost" is None'),
        ({"cost": float("nan")}, '"cost" is nan'),
        ({"joint_cost": "low"}, "\"joint_cost\" is 'low'"),
        ({"costs_sha256": "abc"}, "64 hexadecimal"),
        ({"date": 7}, '"date" is 7'),
        ({"extra": 1}, "unknown fields 'extra'"),
    ],
)
def test_every_defect_is_named(change, error, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(FormatError, match=error) as raised:
        Plan.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe", "[1]", "3"])
def test_what_is_no_plan_is_refused(text, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match="is no (JSON|plan)"):
        Plan.load(path)


def test_a_missing_field_is_named():
    for name in ("types", "bytes", "cost"):
        with pytest.raises(FormatError, match=f"it lacks '{name}'"):
            Plan.from_json(json.dumps({key: value for key, value in GOOD.items() if key != name}))


def test_a_wrong_plan_cannot_be_made():
    with pytest.raises(FormatError, match="unknown type"):
        Plan({"a": "Q9"}, 1, 0.0)


def test_a_failed_save_leaves_what_was_there(tmp_path):
    path = tmp_path / "plan.json"
    FULL.save(path)
    with pytest.raises(TypeError):
        Plan({"a": "Q4_K"}, 1, 0.0, options={"not json": object()}).save(path)
    assert Plan.load(path) == FULL and len(list(tmp_path.iterdir())) == 1
