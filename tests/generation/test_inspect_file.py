"""What `inspect` says about a file, without reading its weights."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from flux_kernels.generation.inspect_file import CARDS_GIB, inspect_file
from flux_kernels.models import tensor_types

from ..flux_files import Architecture, FluxFile, flux_file, layout_types
from ..models.test_types import DEV, write_sparse

GIB = 2**30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    file = flux_file(Architecture(), layout_types("new", "Q4_K"))
    return file.write(tmp_path_factory.mktemp("inspect") / "tiny.gguf", keys=[("add_string", "general.name", "tiny")])


def dev(path, rule, name):
    return inspect_file(write_sparse(path / f"{name}.gguf", DEV, tensor_types(rule, name, DEV.bfl_shapes()), 0))


def test_facts_of_a_full_size_file(tmp_path):
    facts = dev(tmp_path, "old", "Q4_K_S")
    assert facts.refused is None and facts.variant == "FLUX.1-dev, -Kontext or -Krea"
    assert (facts.layout, facts.naming, facts.nbytes) == ("old", "bfl", 6_805_988_640)
    assert facts.parameters == 11_901_408_320 and facts.block_bits_per_weight == 4.5
    plain = facts.parameters - 11_834_228_736
    # img_in, three in_layers and final_layer.linear stay in 32 bit.
    small = 3072 * (64 + 256 + 768 + 256 + 64)
    vectors = sum(count.parameters for count in facts.types if count.kind == "vector")
    bits = 4.5 * 11_834_228_736 + 16 * (plain - small - vectors) + 32 * (small + vectors)
    assert facts.bits_per_weight == pytest.approx(bits / facts.parameters, rel=1e-12)
    assert facts.resident_bytes == 11_834_228_736 * 4.5 / 8 + 2 * plain
    qkv = next(count for count in facts.types if count.tensor_class == "double_blocks.*.img_attn.qkv.weight")
    assert (qkv.kind, qkv.type, qkv.tensors, qkv.nbytes) == ("block", "Q4_K", 19, 19 * 9216 * 3072 * 4.5 / 8)
    assert sum(count.tensors for count in facts.types) == 780


def test_bigger_files_need_bigger_cards(tmp_path):
    """The known practice: Q4_K_S on 8 GB, Q8_0 on 16 GB, 16 bit on none below 24 GB."""
    smallest = {}
    for rule, name in (("old", "Q2_K"), ("old", "Q4_K_S"), ("legacy", "Q8_0"), ("legacy", "F16")):
        facts = dev(tmp_path, rule, name)
        assert list(facts.fits) == list(CARDS_GIB) and sorted(facts.fits.values()) == list(facts.fits.values())
        smallest[name] = next((card for card, fits in facts.fits.items() if fits), None)
        limit = (facts.resident_bytes + facts.overhead_bytes) / GIB
        assert all(fits == (limit <= 0.95 * card) for card, fits in facts.fits.items())
    assert smallest == {"Q2_K": 6, "Q4_K_S": 8, "Q8_0": 16, "F16": None}


def test_offload_by_card_and_text_encoder(tmp_path, tiny):
    """An 8 GB card runs Q4_K model by model only where the T5 is packed too."""
    offloads = dev(tmp_path, "old", "Q4_K_S").offloads
    assert offloads["T5 in 16 bit"] == {6: "group", 8: "group", 12: "model", 16: "model", 24: "none"}
    assert offloads["T5 in Q8_0"] == {6: "group", 8: "model", 12: "model", 16: "none", 24: "none"}
    assert inspect_file(tiny).offloads == {}


def test_the_overhead_model_is_stated_in_words_with_its_numbers(tiny):
    facts = inspect_file(tiny)
    # The packed linear1, decoded.
    largest = 7 * 256 * 256
    assert facts.overhead_bytes == 0.5 * GIB + round((4096 + 512) * 20 * 256 * 2 * 1.1) + 2 * largest
    for words in ("95% of the card", "0.5 GiB for CUDA", "4096 image and 512 text tokens", "20 hidden widths", "an estimate"):
        assert words in facts.overhead_model


def test_facts_are_ready_for_json_and_show_short_keys(tiny):
    facts = json.loads(json.dumps(asdict(inspect_file(tiny))))
    assert facts["metadata"] == {"general.architecture": "flux", "general.name": "tiny"}
    assert facts["config"]["num_layers"] == 1 and facts["variant"].startswith("FLUX.1 architecture with 1 double")


def test_a_refused_model_is_still_described(tmp_path):
    tensors = {"double_stream_blocks.0.block.ff_i.w1.weight": (np.zeros((4, 4), np.float16), "F16", (4, 4))}
    facts = inspect_file(FluxFile(tensors).write(tmp_path / "hidream.gguf", architecture="hidream"))
    assert "This is HiDream" in facts.refused
    assert (facts.variant, facts.layout, facts.fits) == (None, None, {})
    assert facts.parameters == 16 and facts.bits_per_weight == 16 and facts.metadata == {"general.architecture": "hidream"}


def test_a_damaged_file_is_refused_with_the_readers_words(tmp_path, tiny):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:1000])
    facts = inspect_file(path)
    assert "truncated" in facts.refused and facts.nbytes == 1000 and facts.types == ()


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        inspect_file(tmp_path / "none.gguf")


def test_a_t5_encoder_is_described(tmp_path):
    from ..t5_files import tiny_t5, write_t5

    model = tiny_t5()
    write_t5(model, tmp_path / "t5.gguf", leave_out=())
    facts = inspect_file(tmp_path / "t5.gguf")
    assert (facts.role, facts.refused, facts.layout, facts.naming) == ("T5 encoder", None, None, "llama.cpp")
    assert facts.variant == "T5 encoder with 2 blocks, width 256" and facts.config["d_ff"] == 512 and facts.fits[6]
    assert sum(count.tensors for count in facts.types) == len(list(model.parameters()))
    assert {count.tensor_class for count in facts.types if count.kind == "block"} >= {"enc.blk.*.attn_q.weight"}
    write_t5(model, tmp_path / "cut.gguf", leave_out=("encoder.block.1.layer.0.SelfAttention.k.weight",))
    assert "1 tensor missing" in inspect_file(tmp_path / "cut.gguf").refused
