"""The table of text encoders: how a file's row is found; a new encoder is a new row."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

import flux_kernels as fk
from flux_kernels import GGUFError, load_t5, load_text_encoder
from flux_kernels.text_encoders import encoders, load, save
from flux_kernels.text_encoders.encoders import TEXT_ENCODERS
from flux_kernels.text_encoders.encoders.qwen3 import QWEN3
from flux_kernels.text_encoders.encoders.t5 import T5
from flux_kernels.text_encoders.stored import recognise

from ..encoder_files import (
    TINY,
    decoded_twin,
    llama_names,
    tiny_qwen3,
    with_random_vectors,
    write_encoder,
)
from ..t5_files import tiny_t5, write_t5
from .test_qwen3 import outputs, same

ROPE = {"rope_type": "default", "rope_theta": 1e4}
IN_BLOCK = {name: module for name, module in QWEN3.in_block.items() if not name.endswith(("q_norm", "k_norm"))}


def test_every_file_is_in_the_tuple():
    """A row that nobody loops over would be noticed, and so would one class under two rows."""
    files = {path.stem for path in Path(encoders.__file__).parent.glob("*.py")} - {"__init__"}
    rows = {name: getattr(importlib.import_module(f"{encoders.__name__}.{name}"), name.upper()) for name in files}
    assert {*rows.values()} == {*TEXT_ENCODERS} and len({row.model_class for row in TEXT_ENCODERS}) == len(TEXT_ENCODERS)
    assert all(row.table in row.outside.values() for row in TEXT_ENCODERS)


@pytest.mark.parametrize("stated", ["t5encoder", "qwen3", "flux", "", None, 7])
def test_tensors_decide_whatever_the_file_says_of_itself(stated):
    t5 = [T5.written_name(name) for name, _ in tiny_t5().named_parameters()]
    qwen3 = [QWEN3.written_name(name) for name, _ in tiny_qwen3().named_parameters()]
    assert recognise(t5, stated) is T5 and recognise(qwen3, stated) is QWEN3
    assert recognise(["x"], stated) is None and recognise([], stated) is None


def test_the_architecture_key_chooses_among_rows_that_the_tensors_show():
    other = replace(QWEN3, name="other", gguf_names=("other",))
    names = [QWEN3.written_name(name) for name, _ in tiny_qwen3().named_parameters()]
    for wanted in ((QWEN3, other), (other, QWEN3)):
        assert recognise(names, "other", wanted) is other and recognise(names, "qwen3", wanted) is QWEN3
        assert recognise(names, "neither", wanted) is wanted[0]


def test_load_text_encoder_loads_a_t5_as_load_t5_does(tmp_path):
    write_t5(tiny_t5(), tmp_path / "t5.gguf")
    one, other = (load(tmp_path / "t5.gguf", dtype=torch.float32) for load in (load_t5, load_text_encoder))
    assert type(one) is type(other) and one.config.to_dict() == other.config.to_dict()
    theirs = dict(other.named_parameters())
    assert all(torch.equal(value, theirs.pop(name)) for name, value in one.named_parameters()) and not theirs


def test_save_text_encoder_writes_a_t5_as_save_t5_does(tmp_path):
    for name, write in {"one": fk.save_t5, "other": fk.save_text_encoder}.items():
        write(tiny_t5(), tmp_path / name, format="Q4_K")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_what_is_no_known_encoder_is_told_what_is_known_and_what_was_seen(tmp_path, tiny_gguf):
    known = r".*flux_kernels loads the T5 encoders.*; Qwen3 models"
    with pytest.raises(
        GGUFError, match=r"tiny\.gguf: This is no text encoder that is known here: its architecture key says 'flux'" + known
    ):
        load_text_encoder(tiny_gguf / "tiny.gguf")
    # Gemma 3 has norms of q and k too.
    write_encoder(tiny_qwen3(), tmp_path / "g.gguf", extra=[("blk.0.post_attention_norm.weight", np.ones(256))])
    with pytest.raises(
        GGUFError, match=r"no text encoder that is known here.*tensors are called blk\.0\.attn_k\.weight" + known
    ):
        load_text_encoder(tmp_path / "g.gguf")
    write_t5(tiny_t5(), tmp_path / "umt5.gguf", extra=[("enc.blk.1.attn_rel_b.weight", np.zeros((32, 4)))])
    with pytest.raises(GGUFError, match="This is UMT5, the text encoder of Wan.*" + known):
        load_text_encoder(tmp_path / "umt5.gguf")


def test_a_qwen3_is_no_t5(tmp_path):
    write_encoder(tiny_qwen3(), tmp_path / "q.gguf")
    with pytest.raises(GGUFError, match="This is no T5 encoder: its architecture key says 'qwen3'"):
        load_t5(tmp_path / "q.gguf")


def test_keys_of_another_architecture_are_not_guessed(tmp_path):
    """The tensors of Qwen3-VL's language model are Qwen3's; its base of rotary positions is not."""
    names = llama_names(tiny_qwen3(), gguf.MODEL_ARCH.QWEN3)
    write_encoder(tiny_qwen3(), tmp_path / "vl.gguf", gguf.MODEL_ARCH.QWEN3VL, names=names)
    with pytest.raises(GGUFError, match=r"lacks the key 'qwen3\.rope\.freq_base'.*its architecture key says 'qwen3vl'"):
        load_text_encoder(tmp_path / "vl.gguf")


def without_norms(facts):
    """Read the config of a model whose heads no tensor shows: from the keys."""
    vocab, hidden = facts.matrix("model.embed_tokens.weight")
    heads, shared = (facts.key_value(f"attention.head_count{end}") for end in ("", "_kv"))
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": facts.matrix("model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": facts.block_count(),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "max_position_embeddings": facts.key_value("context_length"),
        "rms_norm_eps": facts.epsilon(1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": facts.key_value("rope.freq_base")},
        "tie_word_embeddings": "lm_head.weight" not in facts.shapes,
    }


def written_without_norms(config):
    """Return the key-values of such a model."""
    keys = {"context_length": "max_position_embeddings", "attention.head_count": "num_attention_heads"}
    numbers = {key: ("UINT32", getattr(config, name)) for key, name in keys.items()}
    return {
        **numbers,
        "attention.head_count_kv": ("UINT32", config.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": ("FLOAT32", config.rms_norm_eps),
        "rope.freq_base": ("FLOAT32", config.rope_parameters["rope_theta"]),
    }


# Rows as somebody would add them: Llama, whose rows are permuted, and Qwen2, whose projections have biases.
LLAMA = replace(
    QWEN3,
    name="Llama model",
    covers="Llama models",
    gguf_names=("llama",),
    model_class="LlamaForCausalLM",
    model_type="llama",
    mark=r"model\.layers\.0\.self_attn\.q_proj\.weight",
    lacks=r".*(q_norm|bias).*",
    in_block=IN_BLOCK,
    read_config=without_norms,
    written_keys=written_without_norms,
    checked_keys={},
    permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
)
QWEN2 = replace(
    LLAMA,
    name="Qwen2 model",
    covers="Qwen2 models",
    gguf_names=("qwen2",),
    model_class="Qwen2ForCausalLM",
    model_type="qwen2",
    mark=r"model\.layers\.0\.self_attn\.q_proj\.bias",
    lacks=r".*q_norm.*",
    kinds=("weight", "bias"),
    permuted={},
)
MADE_UP = {"llama": LLAMA, "qwen2": QWEN2}
PERMUTED = {"q_proj.weight": 4, "k_proj.weight": 2}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MADE_UP)
def test_a_new_encoder_is_one_row(tmp_path, monkeypatch, name, tied):
    """Hidden states as transformers' class has them, bit for bit, and the same bytes when saved."""
    row, path = MADE_UP[name], tmp_path / "new.gguf"
    for module in (load, save):
        monkeypatch.setattr(module, "TEXT_ENCODERS", (*TEXT_ENCODERS, *MADE_UP.values()))
    known = getattr(transformers, row.model_class)
    sizes = {name: value for name, value in TINY.items() if name != "head_dim"}
    model = with_random_vectors(known, known.config_class(**sizes, rope_parameters=ROPE, tie_word_embeddings=tied))
    arch = next(arch for arch, stated in gguf.MODEL_ARCH_NAMES.items() if stated == name)
    values = write_encoder(model, path, arch, permuted=PERMUTED if row.permuted else {})
    expected = outputs(decoded_twin(model, values))
    loaded = load_text_encoder(path, dtype=torch.float32)
    assert type(loaded) is known and same(loaded, expected)
    fk.save_text_encoder(loaded, tmp_path / "again.gguf")
    first, again = (fk.read_gguf(file).tensors for file in (path, tmp_path / "again.gguf"))
    assert first.keys() == again.keys()
    assert all(
        (tensor.format, bytes(tensor.data.numpy())) == (again[name].format, bytes(again[name].data.numpy()))
        for name, tensor in first.items()
    )
