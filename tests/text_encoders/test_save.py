"""save_t5: the same bytes after a round trip, quantizing, files that transformers and gguf-py read."""

from __future__ import annotations

import gguf
import pytest
import torch

import flux_kernels as fk
from flux_kernels import FormatError, GGUFError, load_t5, save_t5

from ..t5_files import llama_name, tiny_t5, write_t5

IDS = torch.arange(24).reshape(2, 12)


def encode(model):
    with torch.no_grad():
        return model(IDS)[0]


def stored(path):
    return {tensor.name: (tensor.tensor_type.name, bytes(tensor.data)) for tensor in gguf.GGUFReader(path).tensors}


def test_packed_bytes_survive_a_round_trip(tmp_path):
    write_t5(tiny_t5(), tmp_path / "first.gguf")
    save_t5(load_t5(tmp_path / "first.gguf", dtype=torch.float32), tmp_path / "second.gguf")
    assert stored(tmp_path / "second.gguf") == stored(tmp_path / "first.gguf")


@pytest.mark.parametrize("gated", [True, False])
def test_plain_matrices_are_quantized_on_the_way(tmp_path, gated):
    model = tiny_t5(gated)
    seen = []
    save_t5(model, tmp_path / "t5.gguf", format="Q4_K", progress=lambda name, done, total: seen.append((done, total)))
    kinds = {name: kind for name, (kind, _) in stored(tmp_path / "t5.gguf").items()}
    assert set(kinds) == {llama_name(name) for name, _ in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if "norm" in name or "rel_b" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name and "rel_b" not in name} == {"Q4_K"}
    assert len(seen) == len(kinds) and seen[-1][0] == seen[-1][1] == (tmp_path / "t5.gguf").stat().st_size
    loaded = load_t5(tmp_path / "t5.gguf", dtype=torch.float32)
    query = model.encoder.block[0].layer[0].SelfAttention.q.weight
    assert torch.equal(loaded.encoder.block[0].layer[0].SelfAttention.q.qweight, fk.quantize(query, "Q4_K"))


def test_nothing_is_lost_without_a_format(tmp_path):
    model = tiny_t5().to(torch.bfloat16)
    save_t5(model, tmp_path / "t5.gguf", format=None)
    assert torch.equal(encode(load_t5(tmp_path / "t5.gguf")), encode(model))


def test_transformers_reads_it(tmp_path):
    """Its config takes the activation for relu (see test_t5.py); the weights are what counts."""
    from transformers import T5EncoderModel

    save_t5(tiny_t5(), tmp_path / "t5.gguf")
    theirs = dict(T5EncoderModel.from_pretrained(tmp_path, gguf_file="t5.gguf").named_parameters())
    ours = load_t5(tmp_path / "t5.gguf", dtype=torch.float32).dequantize()
    assert all(torch.equal(theirs[name], value) for name, value in ours.named_parameters())


def test_key_values_are_those_the_config_has(tmp_path):
    save_t5(tiny_t5(num_heads=2, d_kv=128, layer_norm_epsilon=1e-5), tmp_path / "t5.gguf")
    config = load_t5(tmp_path / "t5.gguf").config
    assert (config.num_heads, config.d_kv, config.layer_norm_epsilon) == (2, 128, 1e-5)


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    target = tmp_path / "t5.gguf"
    with pytest.raises(TypeError, match="takes a T5EncoderModel such as pipe.text_encoder_2, got Linear"):
        save_t5(torch.nn.Linear(2, 2), target)
    with pytest.raises(FormatError, match="Q5_K_M"):
        save_t5(tiny_t5(), target, format="Q5_K_M")
    with pytest.raises(FormatError, match=r"Q4_K needs K % 256 == 0, got K=192"):
        save_t5(tiny_t5(d_model=192), target, format="Q4_K")
    with pytest.raises(GGUFError, match=r"meta device"), torch.device("meta"):
        save_t5(tiny_t5(), target)
    assert not list(tmp_path.iterdir())
