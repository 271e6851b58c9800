"""Files of llama.cpp-named text encoders for tests, written with gguf-py.

Names are those of its table. Nothing is taken from flux_kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

TINY = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
# rope_theta of the published Qwen3 models' config.json
THETA = 1e6
KINDS = ("Q8_0", "Q5_1", "Q4_0")


def tiny_qwen3(tied: bool = True, **changes) -> Qwen3ForCausalLM:
    """Build a random model in float32 whose norm scales are not all 1."""
    rope = {"rope_type": "default", "rope_theta": THETA}
    config = Qwen3Config(**{**TINY, "rope_parameters": rope, "tie_word_embeddings": tied, **changes})
    return with_random_vectors(Qwen3ForCausalLM, config)


def with_random_vectors(model_class: Any, config: Any) -> Any:
    """Build a random model.

    What transformers starts as ones or zeros is random too, so that a missing one is seen.
    """
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.uniform_(0.5, 1.5)
    return model


def llama_names(model: nn.Module, arch: gguf.MODEL_ARCH) -> dict[str, str]:
    """Map a model's parameters to llama.cpp's names, by gguf-py's own table."""
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in model.named_parameters()}


def type_of(parameter: str, shape: tuple[int, ...], kinds=KINDS, table: str = "Q8_0") -> str:
    """Return a type as llama.cpp's converter would give: vectors stay F32."""
    if len(shape) == 1:
        return "F32"
    return table if "embed_tokens" in parameter else kinds[sum(map(ord, parameter)) % len(kinds)]


def write_encoder(
    model: nn.Module,
    path: Path,
    arch: gguf.MODEL_ARCH = gguf.MODEL_ARCH.QWEN3,
    *,
    names: Mapping[str, str] | None = None,
    types=type_of,
    keys: Mapping[str, Any] | None = None,
    permuted: Mapping[str, int] | None = None,
    extra=(),
    leave_out=(),
) -> dict[str, torch.Tensor]:
    """Write an encoder with gguf-py; return the values that its tensors decode to, float32, by parameter.

    `keys`: changes to the key-values, None for one that is left out; `permuted`: end of a parameter's name -> heads whose rows
    llama.cpp's converter interleaves; `extra`: (name, float array) of tensors to add; `leave_out`: parameters to leave away.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    for key, value in {**key_values(model.config, gguf.MODEL_ARCH_NAMES[arch]), **(keys or {})}.items():
        if value is not None:
            add = {float: writer.add_float32, str: writer.add_string}.get(type(value), writer.add_uint32)
            add(key, value)
    names = names or llama_names(model, arch)
    return write_tensors(writer, model, names.__getitem__, types, extra, leave_out, permuted or {})


def write_tensors(
    writer: gguf.GGUFWriter,
    model: nn.Module,
    name: Callable[[str], str],
    types: Callable[[str, tuple[int, ...]], str],
    extra,
    leave_out,
    permuted: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    """Write a model's tensors and close the file; arguments and result as `write_encoder`."""
    decoded = {}
    for parameter, value in model.named_parameters():
        if parameter in leave_out:
            continue
        number = gguf.GGMLQuantizationType[types(parameter, tuple(value.shape))]
        heads = next((heads for end, heads in permuted.items() if parameter.endswith(end)), None)
        packed = gguf.quantize(value.detach().numpy(), number)
        written = packed if heads is None else permute(packed, heads)
        writer.add_tensor(name(parameter), written, raw_dtype=number)
        decoded[parameter] = torch.from_numpy(gguf.dequantize(packed, number))
    for given, value in extra:
        writer.add_tensor(given, np.asarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Move rows as `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py does."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def key_values(config: Any, arch: str) -> dict[str, Any]:
    """Return the key-values that llama.cpp's converter writes for a language model."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head,
        f"{arch}.attention.value_length": head,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def decoded_twin(model: Any, values: Mapping[str, torch.Tensor]) -> Any:
    """Fill a model with decoded values."""
    model.load_state_dict(values, strict=False)
    model.tie_weights()
    return model
