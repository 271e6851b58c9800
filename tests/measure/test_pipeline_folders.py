"""Capturing with a pipeline folder of every architecture that draws from text."""

from __future__ import annotations

import json
import shutil
from functools import cache
from types import SimpleNamespace

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from flux_kernels.cli import app
from flux_kernels.errors import FormatError, GGUFError
from flux_kernels.measure.capture import capture
from flux_kernels.measure.measured_model import base_of, find_source, open_pipeline, open_transformer
from flux_kernels.measure.memory import check_memory, memory_needs
from flux_kernels.measure.state_inputs import as_arguments, velocity_of
from flux_kernels.measure.states import States, batches
from flux_kernels.mixed.plan_file import Plan
from flux_kernels.models import save_gguf

from ..generation.tiny_pipelines import TINY, tiny_transformer, write_base
from ..models.cases import CASES

CPU = torch.device("cpu")
SIZES = ((64, 48), (32, 64))
CALLS_A_STEP = {"ChromaPipeline": 2, "QwenImagePipeline": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that makes a 16-bit file (here in F32) and the base folder of a class once."""

    @cache
    def make(kind: str) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp(kind)
        save_gguf(tiny_transformer(kind), folder / "model.gguf")
        return SimpleNamespace(gguf=folder / "model.gguf", base=write_base(kind, folder / "base"))

    return make


@pytest.mark.parametrize("kind", TINY)
def test_states_are_what_the_transformer_was_given(made, kind, tmp_path):
    files = made(kind)
    source = find_source(gguf=files.gguf, base=files.base)
    check_memory(source, CPU, torch.float32, SIZES, 2, states=tmp_path / "none", capturing=True)
    model, _ = open_transformer(source, CPU, torch.float32)
    pipeline, settings = open_pipeline(source, model)
    assert type(pipeline).__name__ == kind
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    found = capture(pipeline, ["a fox", "a red seven"], 2, settings={**settings, "num_inference_steps": 2}, sizes=SIZES)
    hook.remove()
    # Both steps have their turn.
    assert sorted(state.step for state in found) == [0, 1] and {(state.width, state.height) for state in found} == set(SIZES)
    # Guided ones run the transformer twice a step, or once with two pictures; one and two steps are three.
    assert len(calls) == 3 * CALLS_A_STEP.get(kind, 1)
    assert {len(state.velocity) for state in found} == {2 if kind == "StableDiffusion3Pipeline" else 1}
    for state in found:
        assert 0 < state.dsigma <= state.sigma <= 1
        with torch.no_grad():
            assert torch.equal(
                velocity_of(model(**as_arguments(state.inputs, state.others), return_dict=False)), state.velocity
            )
    States(found, "m", "s").save(tmp_path / "states.safetensors")
    again = States.load(tmp_path / "states.safetensors").items
    assert sum(len(batch.indices) for batch in batches(again, CPU, torch.float32)) == 2
    text = {"ZImagePipeline": 0, "Krea2Pipeline": 520, "StableDiffusion3Pipeline": 264}.get(kind, 512)
    for state in again:
        picture = state.width * state.height // 256
        # As many tokens as run at once; Qwen-Image's prompts are not padded.
        assert state.tokens == picture + (state.inputs["encoder_hidden_states"].shape[1] if "Qwen" in kind else text)


def test_the_command_measures_a_plan_of_another_model(made, tmp_path):
    files = made("Krea2Pipeline")
    (tmp_path / "prompts.txt").write_text("a fox\na red seven\n")
    Plan({"blocks.0.mlp.up.weight": "Q4_0"}, bytes=1, cost=0.0).save(tmp_path / "plan.json")
    arguments = ["measure", "--gguf", files.gguf, "--base", files.base, "--prompts", tmp_path / "prompts.txt", "--states", 2]
    arguments += ["--sizes", "64x48", "--steps", 2, "--plan", tmp_path / "plan.json", "--out", tmp_path / "costs.csv", "--json"]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert 0 < json.loads(done.stdout)["cost"] < 0.1
    kept = States.load(tmp_path / "costs.states.safetensors")
    assert kept.prompts == ["a fox", "a red seven"] and kept.summary()["sizes"] == ["64x48"] and kept.items[0].steps == 2


def test_two_pictures_at_once_take_the_memory_of_two(made):
    needs = {}
    for kind in ("StableDiffusion3Pipeline", "ZImagePipeline"):
        source = find_source(gguf=made(kind).gguf, base=made(kind).base)
        found = memory_needs(source, source.config, CPU, torch.float32, [(64, 48)], capturing=False)
        needs[kind] = found["hidden states of 1 pictures"]
    # Three hidden states of 12 picture and 333 or 512 text tokens; Z-Image-Turbo is not guided.
    assert needs == {"StableDiffusion3Pipeline": 3 * 2 * 345 * 256 * 4, "ZImagePipeline": 3 * 524 * 384 * 4}


def test_what_cannot_be_captured_is_said_before_anything_is_read(made, tmp_path):
    files, other = made("QwenImagePipeline"), made("Krea2Pipeline")
    with pytest.raises(FileNotFoundError, match="is a Krea2Pipeline, not a Qwen-Image pipeline"):
        base_of(find_source(gguf=files.gguf, base=other.base))
    with pytest.raises(FormatError, match="give the folder with text encoders and VAE as --base DIR"):
        base_of(find_source(gguf=files.gguf))
    shutil.copytree(files.base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "vae" / "config.json").read_text())
    (tmp_path / "base" / "vae" / "config.json").write_text(json.dumps({**config, "z_dim": 48}))
    with pytest.raises(GGUFError, match="its vae gives 192, the file's in_channels is 64"):
        base_of(find_source(gguf=files.gguf, base=tmp_path / "base"))
    torch.manual_seed(0)
    save_gguf(diffusers.WanTransformer3DModel(**CASES["Wan"].config), tmp_path / "wan.gguf")
    with pytest.raises(GGUFError, match="makes videos, and flux_kernels draws pictures"):
        base_of(find_source(gguf=tmp_path / "wan.gguf", base=files.base))
