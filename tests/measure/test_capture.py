"""States: what is captured is what the transformer was given, and files give it back."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.errors import FormatError
from flux_kernels.measure.capture import capture, read_prompts
from flux_kernels.measure.states import States, batches

from ..mixed.captured import COUNT, SETTINGS, SIZES, embedded_pipeline, states

CPU = torch.device("cpu")


def test_a_state_is_what_the_transformer_was_given():
    model = embedded_pipeline().transformer
    for state in states():
        with torch.no_grad():
            assert torch.equal(model(**state.inputs).sample, state.velocity)


def test_steps_and_sizes_are_spread_and_every_picture_has_its_noise():
    found = states()
    assert len(found) == COUNT and [state.seed for state in found] == list(range(3, 3 + COUNT))
    assert sorted(state.step for state in found[:4]) == [0, 1, 2, 3]
    assert {(state.width, state.height) for state in found} == set(SIZES)
    assert len({state.prompt for state in found}) == COUNT
    for state in found:
        assert state.inputs["hidden_states"].shape[1] == state.width * state.height // 256
        assert state.inputs["timestep"].item() == pytest.approx(state.sigma, rel=1e-6)
    by_step = {state.step: state for state in found}
    # A step ends where the next begins.
    for step in range(3):
        assert by_step[step].sigma - by_step[step].dsigma == pytest.approx(by_step[step + 1].sigma, rel=1e-5)
    assert by_step[3].sigma == pytest.approx(by_step[3].dsigma, rel=1e-6)


def test_a_run_ends_at_its_step():
    pipeline, calls = embedded_pipeline(), []
    hook = pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = capture(pipeline, ["a seven"], 2, settings=SETTINGS, sizes=SIZES, seed=4)
    finally:
        hook.remove()
    assert len(calls) == sum(state.step + 1 for state in found) < 8


def test_the_seed_decides():
    again = capture(embedded_pipeline(), ["a seven", "a two"], 2, settings=SETTINGS, sizes=SIZES, seed=9)
    same = capture(embedded_pipeline(), ["a seven", "a two"], 2, settings=SETTINGS, sizes=SIZES, seed=9)
    other = capture(embedded_pipeline(), ["a seven", "a two"], 2, settings=SETTINGS, sizes=SIZES, seed=10)
    assert [state.facts() for state in again] == [state.facts() for state in same]
    assert torch.equal(again[0].velocity, same[0].velocity)
    assert [state.facts() for state in again] != [state.facts() for state in other]


def test_a_file_gives_the_states_back(tmp_path):
    States(states(), "embedded", "abc").save(tmp_path / "again.safetensors")
    path = tmp_path / "states.safetensors"
    saved = States(states(), "embedded", "abc")
    saved.save(path)
    loaded = States.load(path)
    assert (loaded.model, loaded.source_sha256, loaded.sha256) == ("embedded", "abc", saved.sha256)
    # Its hash identifies a measurement.
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert loaded.summary() == dict(count=COUNT, sha256=saved.sha256, steps=4, sizes=["48x80", "64x64"])
    for a, b in zip(states(), loaded.items, strict=True):
        assert a.facts() == b.facts() and torch.equal(a.velocity, b.velocity) and a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)


def test_files_of_something_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "states.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(FormatError, match="holds no captured states"):
        States.load(path)
    path.write_bytes(b"{}")
    with pytest.raises(FormatError, match="no file of captured states"):
        States.load(path)


def test_batches_hold_every_state_once_and_one_size_each(monkeypatch):
    monkeypatch.setitem(__import__("flux_kernels.measure.states", fromlist=["x"]).BATCH_TOKENS, "cpu", 50)
    found = batches(states(), CPU, torch.float32)
    assert sorted(index for batch in found for index in batch.indices) == list(range(COUNT))
    for batch in found:
        # 24 tokens each.
        assert batch.inputs["hidden_states"].shape[0] == len(batch.indices) <= 2
        for row, index in enumerate(batch.indices):
            assert torch.equal(batch.inputs["hidden_states"][row], states()[index].inputs["hidden_states"][0])


def test_prompts_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# for tests\n\na red seven\n  a blue two \n", encoding="utf-8")
    assert read_prompts(path) == ["a red seven", "a blue two"]
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(FormatError, match="no prompts"):
        read_prompts(path)
    with pytest.raises(FormatError, match="needs prompts"):
        capture(embedded_pipeline(), [], 1, settings=SETTINGS, sizes=SIZES)
