"""Qwen3 by load_text_encoder: transformers' hidden states on the decoded weights, bit for bit."""

from __future__ import annotations

import copy
import re
import time

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import flux_kernels as fk
from flux_kernels import GGUFEmbedding, GGUFError, GGUFLinear, load_text_encoder
from flux_kernels.text_encoders.encoders.qwen3 import QWEN3

from ..encoder_files import THETA, TINY, decoded_twin, key_values, llama_names, tiny_qwen3, type_of, write_encoder
from ..flux_files import write_hole
from .test_t5 import anonymous_bytes

IDS = torch.randint(0, TINY["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(12, 17), 0)
ARCH = gguf.MODEL_ARCH.QWEN3


def outputs(model) -> tuple[torch.Tensor, ...]:
    """Return all hidden states, as pipelines ask for them, and the logits."""
    with torch.no_grad():
        given = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True, use_cache=False)
    return (*given.hidden_states, given.logits)


def same(model, expected) -> bool:
    return alike(outputs(model), expected)


def alike(got, expected) -> bool:
    return all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def written(tmp_path, model=None, **how):
    """Write a file; return (path, float32 outputs of the decoded twin)."""
    model = model or tiny_qwen3()
    values = write_encoder(model, tmp_path / "q.gguf", **how)
    return tmp_path / "q.gguf", outputs(decoded_twin(model, values))


@pytest.mark.parametrize("naming", ["llama.cpp", "transformers"])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_decoded_twin_bit_for_bit(tmp_path, tied, naming):
    model = tiny_qwen3(tied)
    names = {name: name for name, _ in model.named_parameters()} if naming == "transformers" else None
    path, expected = written(tmp_path, model, names=names)
    loaded = load_text_encoder(path, dtype=torch.float32)
    assert type(loaded).__name__ == "Qwen3ForCausalLM" and not loaded.training
    assert len(expected) == TINY["num_hidden_layers"] + 2 and same(loaded, expected)
    assert loaded.config.tie_word_embeddings is tied


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 6, "head_dim": 64},
        {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
        {"num_hidden_layers": 12, "max_position_embeddings": 262144},
    ],
    ids=str,
)
def test_the_config_is_read_from_tensors_and_keys(tmp_path, changes):
    model = tiny_qwen3(**changes)
    path, expected = written(tmp_path, model)
    loaded = load_text_encoder(path, dtype=torch.float32)
    ours, theirs = loaded.config.to_dict(), model.config.to_dict()
    differs = {name for name in theirs if ours[name] != theirs[name]}
    assert differs <= {"dtype", "use_cache", "architectures"} and same(loaded, expected)


def test_every_packed_matrix_stays_packed_and_mapped(tmp_path):
    path, _ = written(tmp_path, tiny_qwen3(tied=False))
    model = load_text_encoder(path, dtype=torch.float32)
    assert not [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert type(model.model.embed_tokens) is GGUFEmbedding
    stored = fk.read_gguf(path).tensors
    packed = sum(tensor.nbytes for tensor in stored.values() if tensor.format in fk.FORMATS)
    assert packed == sum(size for kind, size in fk.memory_footprint(model).items() if kind in fk.FORMATS)
    tensor, raw = stored["blk.1.attn_q.weight"], path.read_bytes()
    query = model.model.layers[1].self_attn.q_proj
    assert query.qweight.numpy().tobytes() == raw[tensor.offset : tensor.offset + tensor.nbytes]


def test_a_tied_output_is_a_layer_over_the_bytes_of_the_table(tmp_path):
    path, _ = written(tmp_path)
    model = load_text_encoder(path, dtype=torch.float32)
    assert type(model.lm_head) is GGUFLinear
    assert model.lm_head.qweight.data_ptr() == model.model.embed_tokens.qweight.data_ptr()
    plain = load_text_encoder(written(tmp_path, types=lambda name, shape: "F16")[0])
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and plain.lm_head.weight.dtype == torch.bfloat16


def test_nothing_packed_is_decoded_while_loading(tmp_path, monkeypatch):
    from flux_kernels import torch_backend
    from flux_kernels.torch_backend import reference

    path, _ = written(tmp_path)

    def forbidden(*args):
        raise AssertionError("a packed tensor was decoded while loading")

    monkeypatch.setattr(reference, "decode_rows", forbidden)
    monkeypatch.setattr(torch_backend, "dequantize", forbidden)
    load_text_encoder(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tied", [True, False])
def test_plain_types_load_too(tmp_path, kind, tied):
    path, expected = written(tmp_path, tiny_qwen3(tied), types=lambda name, shape: type_of(name, shape, (kind,), kind))
    model = load_text_encoder(path, dtype=torch.float32)
    assert type(model.model.embed_tokens) is nn.Embedding and same(model, expected)


def test_transformers_own_reader_agrees(tmp_path):
    """It decodes every tensor, takes a head's width for 128, and needs a vocab_size or tokens."""
    from transformers import Qwen3ForCausalLM

    path, expected = written(tmp_path, tiny_qwen3(head_dim=128), keys={"qwen3.vocab_size": TINY["vocab_size"]})
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    assert theirs.config.rope_parameters["rope_theta"] == THETA
    assert same(theirs, expected) and same(load_text_encoder(path, dtype=torch.float32), expected)


QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}


def test_a_full_size_file_loads_at_once_and_stays_mapped(tmp_path):
    """Qwen3-4B in Q8_0, 4.3 GB, its data a hole in the file: nothing is read and nothing is copied."""
    with torch.device("meta"):
        model = tiny_qwen3(**QWEN3_4B)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = llama_names(model, ARCH)
    tensors = {names[name]: (type_of(name, shape, ("Q8_0",)), shape) for name, shape in shapes.items()}
    path = write_hole(tmp_path / "4b.gguf", "qwen3", tensors, keys=key_values(model.config, "qwen3"))
    # 4.02 thousand million weights, as its makers say, of 34 bytes in 32
    assert path.stat().st_size == pytest.approx(4.02e9 * 34 / 32, rel=0.005)
    before, started = anonymous_bytes(), time.perf_counter()
    loaded = load_text_encoder(path)
    assert time.perf_counter() - started < 20
    assert anonymous_bytes() - before < 100e6
    assert loaded.config.num_key_value_heads == 8 and loaded.config.num_hidden_layers == 36


def test_sixteen_bit_runs_as_in_transformers(tmp_path):
    path, expected = written(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        model = load_text_encoder(path, dtype=dtype)
        assert model.dtype == dtype and model.model.rotary_emb.inv_freq.dtype == torch.float32
        out = outputs(model)[-2]
        # one rounding has a relative error of eps / 2; some ten roundings add up along the way of two blocks
        assert out.dtype == dtype and (out - expected[-2]).norm() <= 10 * torch.finfo(dtype).eps * expected[-2].norm()


def test_backend_and_compute_reach_the_layers(tmp_path):
    path, _ = written(tmp_path)
    model = load_text_encoder(path, backend="torch", compute="int8")
    layers = [module for module in model.modules() if isinstance(module, GGUFLinear)]
    assert len(layers) == 15 and {(layer.backend, layer.compute) for layer in layers} == {("torch", "int8")}
    with pytest.raises(fk.BackendUnavailable, match="Unknown backend 'cuda'"):
        load_text_encoder(path, backend="cuda")


def test_copies_offloading_and_decoding(tmp_path):
    from accelerate import cpu_offload
    from diffusers.hooks import apply_group_offloading

    path, expected = written(tmp_path)
    model = load_text_encoder(path, dtype=torch.float32)
    model.tie_weights()
    assert same(copy.deepcopy(model), expected)
    assert same(cpu_offload(load_text_encoder(path, dtype=torch.float32), execution_device=torch.device("cpu")), expected)
    grouped = load_text_encoder(path, dtype=torch.float32)
    apply_group_offloading(grouped, torch.device("cpu"), offload_type="leaf_level")
    assert same(grouped, expected)
    plain = model.dequantize()
    assert type(plain.lm_head) is nn.Linear and same(plain, expected)


def test_the_part_below_the_head_is_a_qwen3_model(tmp_path):
    """Z-Image's pipeline takes one, FLUX.2-klein's the whole."""
    from transformers import Qwen3Model

    path, expected = written(tmp_path)
    below = load_text_encoder(path, dtype=torch.float32).model
    with torch.no_grad():
        states = below(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    assert isinstance(below, Qwen3Model) and alike(states, expected[:-1])


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_those_of_gguf_py(tied):
    model = tiny_qwen3(tied, num_hidden_layers=11)
    names = llama_names(model, ARCH)
    assert {name: QWEN3.written_name(name) for name in names} == names
    assert QWEN3.parameter_names(names.values()) == names
    # All that gguf-py has a name for, but tables of frequencies, which no Qwen3 has.
    every = {gguf.TENSOR_NAMES[kind].replace("blk.{bid}.", "") for kind in gguf.MODEL_TENSORS[ARCH]} - {"rope_freqs"}
    assert every == {*QWEN3.in_block, *(name.removesuffix(".weight") for name in QWEN3.outside)}


# What is done to the file, what the error says.
REFUSALS = [
    (
        {"leave_out": ("model.layers.1.self_attn.k_proj.weight",)},
        r"1 tensor missing: model\.layers\.1\.self_attn\.k_proj\.weight",
    ),
    ({"leave_out": ("model.layers.0.self_attn.k_proj.weight",)}, r"lacks '.*k_proj\.weight', which every Qwen3 model holds"),
    ({"leave_out": ("model.embed_tokens.weight",)}, r"This is no text encoder that is known here: .*'qwen3'"),
    ({"extra": [("blk.0.attn_z.weight", np.zeros((2, 2)))]}, r"1 tensor superfluous: blk\.0\.attn_z\.weight.*2 blocks"),
    ({"extra": [("blk.3.attn_q.weight", np.zeros((128, 256)))]}, r"blocks up to 3, but none with index 2"),
    ({"extra": [("lm_head.weight", np.zeros((2, 2))), ("output.weight", np.zeros((2, 2)))]}, r"are both 'lm_head\.weight'"),
    ({"keys": {"qwen3.rope.freq_base": None}}, r"lacks the key 'qwen3\.rope\.freq_base', .* architecture key says 'qwen3'"),
    ({"keys": {"qwen3.context_length": None}}, r"lacks the key 'qwen3\.context_length'"),
    ({"keys": {"qwen3.rope.freq_base": "many"}}, r"'rope\.freq_base' is 'many'; legal is a number above 1"),
    ({"keys": {"qwen3.rope.freq_base": float("nan")}}, r"'rope\.freq_base' is 'nan'"),
    ({"keys": {"qwen3.rope.scaling.type": "yarn"}}, r"scales its rotary positions \('yarn'\), which is not read"),
    ({"keys": {"qwen3.attention.head_count_kv": 4}}, r"'attention\.head_count_kv' says 4, the tensors have 2"),
    ({"keys": {"qwen3.rope.dimension_count": 16}}, r"'rope\.dimension_count' says 16, the tensors have 32"),
    ({"keys": {"qwen3.attention.layer_norm_rms_epsilon": 2.0}}, r"epsilon of 2\.0; legal is a number between 0 and 1"),
]


@pytest.mark.parametrize(("how", "message"), REFUSALS, ids=[message[:30] for _, message in REFUSALS])
def test_files_that_are_refused(tmp_path, how, message):
    write_encoder(tiny_qwen3(), tmp_path / "q.gguf", **how)
    with pytest.raises(GGUFError, match=rf"q\.gguf: .*{message}"):
        load_text_encoder(tmp_path / "q.gguf")


@pytest.mark.parametrize(
    ("heads", "shared", "width", "message"),
    [
        (4, 2, 33, "4 heads of q and 2 of k, of width 33"),
        (4, 3, 32, "4 heads of q and 3 of k"),
        (4.5, 2, 32, "heads of width 32 and 144 rows of q"),
    ],
)
def test_heads_that_do_not_go_together_are_refused(heads, shared, width, message):
    shapes = {name: tuple(parameter.shape) for name, parameter in tiny_qwen3().named_parameters()}
    shapes["model.layers.0.self_attn.q_norm.weight"] = (width,)
    for kind, rows in (("q", int(heads * width)), ("k", shared * width)):
        shapes[f"model.layers.0.self_attn.{kind}_proj.weight"] = (rows, TINY["hidden_size"])
    with pytest.raises(GGUFError, match=f"{message}.*The file is damaged"):
        QWEN3.read_config(QWEN3.facts(shapes, {}))


def test_damaged_headers_raise_one_error(tmp_path):
    path, _ = written(tmp_path)
    whole = path.read_bytes()
    header = whole.index(b"output_norm.weight") + 40
    rng, refused = np.random.default_rng(5), 0
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.integers(header, size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_text_encoder(path)
        except GGUFError:
            refused += 1
    # The rest hit texts that nobody reads, or values that stay legal.
    assert refused > 30


def stored(path):
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if name.startswith("qwen3.")}
    return {tensor.name: (tensor.tensor_type.name, bytes(tensor.data)) for tensor in reader.tensors}, keys


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_and_keys_survive_a_round_trip(tmp_path, tied):
    path, _ = written(tmp_path, tiny_qwen3(tied))
    fk.save_text_encoder(load_text_encoder(path, dtype=torch.float32), tmp_path / "second.gguf")
    assert stored(tmp_path / "second.gguf") == stored(path)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_matrices_are_quantized_on_the_way(tmp_path, tied):
    model = tiny_qwen3(tied, head_dim=64)
    fk.save_text_encoder(model, tmp_path / "q.gguf", format="Q4_K")
    kinds = {name: kind for name, (kind, _) in stored(tmp_path / "q.gguf")[0].items()}
    assert set(kinds) == set(llama_names(model, ARCH).values())
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q4_K"}
    loaded = load_text_encoder(tmp_path / "q.gguf", dtype=torch.float32)
    gate = model.model.layers[0].mlp.gate_proj.weight
    assert torch.equal(loaded.model.layers[0].mlp.gate_proj.qweight, fk.quantize(gate, "Q4_K"))


def test_what_cannot_be_written_leaves_no_file(tmp_path):
    target = tmp_path / "q.gguf"
    legal = re.escape("a T5EncoderModel such as pipe.text_encoder_2 or a Qwen3ForCausalLM such as")
    for wrong in (nn.Linear(2, 2), tiny_qwen3().model):
        with pytest.raises(TypeError, match=f"save_text_encoder takes {legal}.*got {type(wrong).__name__}"):
            fk.save_text_encoder(wrong, target)
    with pytest.raises(TypeError, match="save_t5 takes a T5EncoderModel such as pipe.text_encoder_2, got Qwen3ForCausalLM"):
        fk.save_t5(tiny_qwen3(), target)
    with pytest.raises(GGUFError, match=r"q_proj\.bias' is no parameter of a Qwen3 model that GGUF has a name for"):
        fk.save_text_encoder(tiny_qwen3(attention_bias=True), target)
    yarn = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 1024}
    with pytest.raises(GGUFError, match=r"scales its rotary positions \(yarn\), which is not written"):
        fk.save_text_encoder(tiny_qwen3(rope_parameters=yarn), target)
    with pytest.raises(GGUFError, match="meta device"), torch.device("meta"):
        fk.save_text_encoder(tiny_qwen3(), target)
    assert not list(tmp_path.iterdir())
