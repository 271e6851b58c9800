"""Placing a pipeline: measured sizes, offload by free memory, pinning, pictures that stay the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flux_kernels import BackendUnavailable
from flux_kernels.generation import placement
from flux_kernels.generation.base_pipeline import load_pipeline
from flux_kernels.generation.demo import Variant, write_variant
from flux_kernels.generation.embedded import PIPELINE_KWARGS, embedded_model_path
from flux_kernels.generation.memory_plan import GIB
from flux_kernels.generation.placement import apply_offload, check_offload, measured_parts, place
from flux_kernels.generation.tasks import KONTEXT
from flux_kernels.models import load_flux
from flux_kernels.models.calls import image_tokens
from flux_kernels.text_encoders import load_t5

from ..task_files import write_embedded_t5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    write_variant(Variant("Q8_0", "Q8_0"), folder / "flux.gguf")
    write_embedded_t5(folder / "t5.gguf")
    return folder


@pytest.fixture
def pipeline(files):
    transformer = load_flux(files / "flux.gguf", dtype=torch.float32)
    t5 = load_t5(files / "t5.gguf", dtype=torch.float32)
    return load_pipeline(embedded_model_path(), transformer, torch.float32, text_encoder_2=t5)


def draw(pipeline):
    settings = {**PIPELINE_KWARGS, "num_inference_steps": 2}
    return pipeline("a red seven", generator=torch.Generator().manual_seed(0), **settings).images[0].tobytes()


def test_parts_are_measured(pipeline):
    parts = {part.name: part for part in measured_parts(pipeline, 64, 64, 0, 8)}
    assert set(parts) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    transformer = parts["transformer"]
    held = sum(p.numel() * p.element_size() for p in pipeline.transformer.parameters())
    assert transformer.weights == held
    # norm_out.linear, which is plain.
    assert transformer.layer == 512 * 256 * 4 + 512 * 4
    assert transformer.working == round((16 + 8) * 20 * 256 * 4 * 1.1) + 6 * 256 * 256 * 4
    assert parts["vae"].working == round(64 * 64 * 4 * 32 * 4 * 1.1)


def test_a_reference_picture_adds_its_tokens(pipeline):
    alone, with_reference = (
        next(part for part in measured_parts(pipeline, 64, 64, count, 8) if part.name == "transformer") for count in (0, 4150)
    )
    assert with_reference.working - alone.working == pytest.approx(4150 * 20 * 256 * 4 * 1.1, abs=2)


@pytest.mark.parametrize("offload", ["group", "none"])
def test_the_picture_is_the_same(pipeline, offload):
    expected = draw(pipeline)
    apply_offload(pipeline, offload, torch.device("cpu"))
    assert draw(pipeline) == expected


class Recorder:
    """Stand in for a pipeline: notes which way of offloading is enabled."""

    def __init__(self):
        self.components = {"transformer": nn.Linear(2, 2), "scheduler": object()}
        self.calls = []
        self.vae = SimpleNamespace(enable_tiling=lambda: self.calls.append("tiling"))

    def to(self, device):
        self.calls.append(("none", str(device)))

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, kwargs))


@pytest.fixture
def gpu(monkeypatch):
    """Pretend a GPU with so many GiB free."""

    def pretend(free_gib):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_gib * GIB), 24 * GIB))

    return pretend


def big_parts():
    part = placement.Part
    return [part("transformer", 7 * GIB, GIB // 8, GIB), part("vae", GIB // 4, GIB // 64, 4 * GIB)]


@pytest.mark.parametrize(
    ("free", "chosen", "call"),
    [
        (12, "none", "none"),
        (9, "model", "enable_model_cpu_offload"),
        (5, "group", "enable_group_offload"),
        (3, "group", "enable_group_offload"),
    ],
)
def test_auto_follows_measured_free_memory(gpu, free, chosen, call):
    gpu(free)
    recorder = Recorder()
    plan = place(recorder, "auto", big_parts(), 2048, 2048)
    assert plan.offload == chosen and f"{free}.0 GiB of GPU memory are free" in plan.sentence
    assert recorder.calls[-1][0] == call
    assert ("tiling" in recorder.calls) == (free == 3)


def test_what_is_asked_for_is_done(gpu):
    gpu(2)
    recorder = Recorder()
    plan = place(recorder, "none", big_parts(), 1024, 1024)
    assert (plan.offload, plan.sentence) == ("none", "offload none, as asked for.")
    assert recorder.calls == [("none", "cuda")]


def test_group_offload_streams_without_a_second_copy(gpu):
    recorder = Recorder()
    apply_offload(recorder, "group", torch.device("cuda"))
    options = {"offload_type": "leaf_level", "use_stream": True, "low_cpu_mem_usage": True}
    assert recorder.calls == [("enable_group_offload", options)]


def test_pinning_happens_where_weights_are_streamed(gpu, monkeypatch):
    pinned = []
    monkeypatch.setattr(placement, "pin_memory", pinned.append)
    for offload, expected in (("group", 1), ("sequential", 1), ("model", 0), ("none", 0)):
        pinned.clear()
        recorder = Recorder()
        apply_offload(recorder, offload, torch.device("cuda"), pin=True)
        assert len(pinned) == expected, offload


def test_refusals(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="Unknown offload 'disk'. Known: none, model, group, sequential, auto"):
        check_offload("disk", False)
    with pytest.raises(BackendUnavailable, match="--offload group moves weights to a GPU, and torch sees none"):
        check_offload("group", False)
    with pytest.raises(BackendUnavailable, match="--pin pins host memory for copies to a GPU"):
        check_offload("auto", True)
    gpu(8)
    with pytest.raises(BackendUnavailable, match=r"--pin is for weights that are copied at every step.*Leave it out"):
        check_offload("model", True)
    check_offload("auto", True)


def test_kontext_counts_the_largest_size_of_its_reference():
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    assert KONTEXT.reference_tokens == max(image_tokens(*size) for size in PREFERRED_KONTEXT_RESOLUTIONS)
