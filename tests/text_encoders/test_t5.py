"""load_t5: bit-equal to the decoded twin in every naming; refusals; offloading; against transformers."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import flux_kernels as fk
from flux_kernels import GGUFEmbedding, GGUFError, GGUFLinear, load_t5
from flux_kernels.generation.memory_plan import companions
from flux_kernels.text_encoders.encoders.t5 import T5

from ..conftest import random_packed
from ..flux_files import write_hole
from ..t5_files import TINY, decoded_twin, llama_name, tiny_t5, type_of, write_t5

IDS = torch.randint(0, TINY["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(3))
REL_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"


def encode(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


def written(tmp_path, model=None, **how):
    """Write a file; return (path, float32 output of the decoded twin)."""
    model = model or tiny_t5()
    path = tmp_path / "t5.gguf"
    values = write_t5(model, path, **how)
    return path, encode(decoded_twin(model, values))


def comfy_name(parameter):
    return f"t5xxl.transformer.{parameter}"


NAMINGS = {"llama.cpp": llama_name, "transformers": str, "with a prefix": comfy_name}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("naming", NAMINGS)
def test_equals_the_decoded_twin_bit_for_bit(tmp_path, naming, gated):
    path, expected = written(tmp_path, tiny_t5(gated), name=NAMINGS[naming], keys=naming == "llama.cpp")
    model = load_t5(path, dtype=torch.float32)
    assert torch.equal(encode(model), expected)


def test_every_packed_matrix_stays_packed_and_mapped(tmp_path):
    path, _ = written(tmp_path)
    model = load_t5(path, dtype=torch.float32)
    assert not [name for name, module in model.named_modules() if type(module) in (nn.Linear,)]
    assert type(model.shared) is GGUFEmbedding and model.encoder.embed_tokens is model.shared
    stored = fk.read_gguf(path).tensors
    packed = sum(tensor.nbytes for tensor in stored.values() if tensor.format in fk.FORMATS)
    footprint = fk.memory_footprint(model)
    assert packed == sum(size for kind, size in footprint.items() if kind in fk.FORMATS)
    query = model.encoder.block[1].layer[0].SelfAttention.q
    raw = path.read_bytes()
    tensor = stored["enc.blk.1.attn_q.weight"]
    assert query.qweight.numpy().tobytes() == raw[tensor.offset : tensor.offset + tensor.nbytes]


def test_no_more_than_one_tensor_is_decoded_at_a_time(tmp_path, monkeypatch):
    from flux_kernels import torch_backend
    from flux_kernels.torch_backend import reference

    path, _ = written(tmp_path)

    def forbidden(*args):
        raise AssertionError("a packed tensor was decoded while loading")

    monkeypatch.setattr(reference, "decode_rows", forbidden)
    monkeypatch.setattr(torch_backend, "dequantize", forbidden)
    load_t5(path)


def test_plain_types_load_too(tmp_path):
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    for kind in kinds:
        path, expected = written(tmp_path, types=lambda name, shape, kind=kind: type_of(name, shape, (kind,), kind))
        model = load_t5(path, dtype=torch.float32)
        assert type(model.shared) is nn.Embedding and torch.equal(encode(model), expected)


def test_a_quantized_bias_and_norms_are_decoded(tmp_path):
    path, expected = written(tmp_path, tiny_t5(num_heads=32, d_kv=8), types=lambda name, shape: "Q8_0")
    assert torch.equal(encode(load_t5(path, dtype=torch.float32)), expected)


def test_transformers_own_reader_agrees(tmp_path):
    """transformers decodes such files, takes the activation for relu, needs a vocab_size: mended here."""
    from transformers import T5EncoderModel

    path, expected = written(tmp_path)
    theirs = T5EncoderModel.from_pretrained(tmp_path, gguf_file=path.name).eval()
    for block in theirs.encoder.block:
        block.layer[1].DenseReluDense.act = tiny_t5().encoder.block[0].layer[1].DenseReluDense.act
    assert torch.equal(encode(theirs), expected)


def test_true_width_block(tmp_path):
    """T5 XXL's sizes with one block and a short table, against gguf-py's decode."""
    wide = {"vocab_size": 300, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 1, "num_heads": 64}
    with torch.device("meta"):
        twin = tiny_t5(**wide)
    write_random_q8_0(twin, tmp_path / "wide.gguf")
    values = {}
    for tensor in gguf.GGUFReader(tmp_path / "wide.gguf").tensors:
        values[tensor.name] = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    by_parameter = {name: values[llama_name(name)] for name, _ in twin.named_parameters()}
    twin.load_state_dict(by_parameter, strict=False, assign=True)
    twin.tie_weights()
    loaded = load_t5(tmp_path / "wide.gguf", dtype=torch.float32)
    assert loaded.config.d_ff == 10240 and loaded.config.num_heads == 64 and loaded.config.dense_act_fn == "gelu_new"
    assert torch.equal(encode(loaded), encode(twin))


def write_random_q8_0(model, path):
    """Write a file of random packed rows in the shapes of a model on the meta device."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    for index, (name, parameter) in enumerate(model.named_parameters()):
        shape = tuple(parameter.shape)
        if type_of(name, shape) == "F32":
            writer.add_tensor(llama_name(name), np.random.default_rng(index).standard_normal(shape).astype(np.float32))
        else:
            packed = random_packed("Q8_0", *shape, seed=index).numpy()
            writer.add_tensor(llama_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def test_a_full_size_file_loads_at_once_and_stays_mapped(tmp_path):
    """T5 XXL in Q8_0, 5.06 GB, its data a hole in the file: nothing is read and nothing is copied."""
    with torch.device("meta"):
        model = tiny_t5(**XXL)
    path = write_header(model, tmp_path / "xxl.gguf")
    assert round(path.stat().st_size / 1e7) == 506
    before = anonymous_bytes()
    started = time.perf_counter()
    loaded = load_t5(path)
    # It takes about 0.3 s alone on a core, and less memory than the largest tensor's 140 MB.
    assert time.perf_counter() - started < 20
    assert anonymous_bytes() - before < 100e6
    footprint = fk.memory_footprint(loaded)
    assert footprint["Q8_0"] > 0.999 * footprint["total"] and loaded.config.num_layers == 24
    # What `inspect` counts with.
    assert footprint["total"] == pytest.approx(companions(1024, 1024, 8.5)[1].weights, rel=1e-3)


def anonymous_bytes() -> int:
    """Return the process's memory that is not mapped from files."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory by kind is read from /proc, which only Linux has")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def write_header(model, path):
    """Write a Q8_0 file of a model on the meta device whose data are a hole."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return write_hole(
        path, "t5encoder", {llama_name(name): (type_of(name, shape, ("Q8_0",)), shape) for name, shape in shapes.items()}
    )


def test_damaged_headers_raise_one_error(tmp_path):
    path, _ = written(tmp_path)
    whole = path.read_bytes()
    header = whole.index(b"enc.output_norm.weight") + 40
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for place in rng.integers(header, size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_t5(path)
        except GGUFError:
            refused += 1
    # The rest hit texts that nobody reads, or values that stay legal.
    assert refused > 30


def test_sixteen_bit_runs_as_in_transformers(tmp_path):
    """bf16 throughout; in fp16 `wo` runs in float32, because its sums overflow there in the real T5."""
    path, expected = written(tmp_path)
    brain, half = load_t5(path), load_t5(path, dtype=torch.float16)
    for model, dtype, wo in ((brain, torch.bfloat16, torch.bfloat16), (half, torch.float16, torch.float32)):
        dense = model.encoder.block[0].layer[1].DenseReluDense
        assert model.dtype == dtype and dense.wo.weight.dtype == wo and dense.wi_0.weight.dtype == dtype
        out = encode(model)
        # one rounding has a relative error of eps / 2; some ten roundings add up along the way of two blocks
        assert out.dtype == dtype and (out - expected).norm() <= 10 * torch.finfo(dtype).eps * expected.norm()


def test_backend_and_compute_reach_the_layers(tmp_path):
    path, _ = written(tmp_path)
    model = load_t5(path, backend="torch", compute="int8")
    layers = [module for module in model.modules() if isinstance(module, GGUFLinear)]
    assert len(layers) == 14 and {(layer.backend, layer.compute) for layer in layers} == {("torch", "int8")}
    assert model.shared.backend == "torch"
    with pytest.raises(fk.BackendUnavailable, match="Unknown backend 'cuda'"):
        load_t5(path, backend="cuda")


def test_accelerate_and_group_offload_give_the_same(tmp_path):
    from accelerate import cpu_offload
    from diffusers.hooks import apply_group_offloading

    path, expected = written(tmp_path)
    sequential = cpu_offload(load_t5(path, dtype=torch.float32), execution_device=torch.device("cpu"))
    assert sequential.shared.qweight.device.type == "meta" and torch.equal(encode(sequential), expected)
    for level in ("leaf_level", "block_level"):
        grouped = load_t5(path, dtype=torch.float32)
        apply_group_offloading(grouped, torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
        assert torch.equal(encode(grouped), expected)


def test_a_lora_on_every_linear_layer(tmp_path):
    """T5 casts activations to the dtype of an adapted layer's weight; peft would take the packed bytes."""
    from peft import LoraConfig, get_peft_model

    path, _ = written(tmp_path)
    model = fk.load_t5(path, dtype=torch.float32)
    before = encode(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q", "v", "wi_0", "wo"]))
    # B starts at zero.
    assert torch.equal(encode(adapted), before)
    layer = next(module for name, module in adapted.named_modules() if name.endswith("DenseReluDense.wo"))
    assert layer.weight.dtype == torch.float32 and layer.weight.shape == (layer.out_features, layer.in_features)


def test_copies_state_dicts_and_decoding(tmp_path):
    path, expected = written(tmp_path)
    model = load_t5(path, dtype=torch.float32)
    assert torch.equal(encode(copy.deepcopy(model)), expected)
    other = load_t5(path, dtype=torch.float32)
    with torch.no_grad():
        other.shared.qweight.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(encode(other), expected)
    plain = other.dequantize()
    assert type(plain.shared) is nn.Embedding and plain.encoder.embed_tokens is plain.shared
    assert torch.equal(encode(plain), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_and_exports_in_one_graph(tmp_path, dtype):
    path, _ = written(tmp_path)
    model = load_t5(path, dtype=dtype)
    expected = encode(model)
    torch._dynamo.reset()
    assert torch.equal(encode(torch.compile(model, fullgraph=True, backend="aot_eager")), expected)
    exported = torch.export.export(model, (IDS,), strict=False).module()
    assert torch.equal(encode(exported), expected)


def test_saving_refuses_with_a_sentence(tmp_path):
    path, _ = written(tmp_path)
    with pytest.raises(GGUFError, match="cannot be written with save_pretrained.* T5 encoder with flux_kernels.save_t5"):
        load_t5(path).save_pretrained(tmp_path / "out")


def test_the_decoder_of_a_whole_t5_is_left_out(tmp_path):
    extra = [("dec.blk.0.attn_q.weight", np.zeros((4, 4))), ("output.weight", np.zeros((4, 4)))]
    path, expected = written(tmp_path, extra=extra)
    assert torch.equal(encode(load_t5(path, dtype=torch.float32)), expected)


def test_a_second_name_of_the_table_is_no_second_table(tmp_path):
    model = tiny_t5()
    extra = [("encoder.embed_tokens.weight", np.ones((300, 256)))]
    path, expected = written(tmp_path, model, name=str, keys=False, extra=extra)
    assert torch.equal(encode(load_t5(path, dtype=torch.float32)), expected)
    names = {"shared.weight": "encoder.embed_tokens.weight"}
    path, expected = written(tmp_path, tiny_t5(), name=lambda name: names.get(name, name), keys=False)
    assert torch.equal(encode(load_t5(path, dtype=torch.float32)), expected)


def test_names_go_both_ways():
    for gated in (True, False):
        for name, _ in tiny_t5(gated).named_parameters():
            assert T5.written_name(name) == llama_name(name)
    with pytest.raises(GGUFError, match="no parameter of a T5 encoder"):
        T5.written_name("decoder.block.0.layer.0.SelfAttention.q.weight")


def test_tying_weights_again_changes_nothing(tmp_path):
    """transformers ties after many operations; the packed table has no parameter `weight` to tie."""
    path, expected = written(tmp_path)
    for model in (load_t5(path, dtype=torch.float32), copy.deepcopy(load_t5(path, dtype=torch.float32))):
        model.tie_weights()
        assert model.encoder.embed_tokens is model.shared and torch.equal(encode(model), expected)
