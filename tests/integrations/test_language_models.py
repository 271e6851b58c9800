"""Causal language models of transformers after swap_linear.

They generate, and the tokens are the dequantized model's.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers.quantizers.base import HfQuantizer

import flux_kernels as fk
from flux_kernels.layers.linear import GGUFLinear
from flux_kernels.swap.model_quantizer import SwappedModelQuantizer

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
# Name -> what its configuration takes in addition to SIZES.
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": dict(head_dim=16),
    "Mistral": dict(head_dim=16),
    "Gemma": dict(head_dim=16),
    "Phi3": {},
    "GPTNeoX": {},
    "Olmo2": {},
}


def model_of(family: str) -> transformers.PreTrainedModel:
    """Make a tiny model whose logits differ enough for greedy decoding to be no matter of rounding."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    """A swapped model and its dequantized copy."""
    model = model_of(request.param)
    fk.swap_linear(model, format="Q8_0")
    assert sum(isinstance(module, GGUFLinear) for module in model.modules()) >= 8
    return model, copy.deepcopy(model).dequantize()


@pytest.mark.parametrize(
    "how",
    [
        dict(do_sample=False),
        dict(do_sample=False, cache_implementation="static"),
        dict(do_sample=False, num_beams=2),
        dict(do_sample=False, use_cache=False),
    ],
    ids=["greedy", "static cache", "beams", "no cache"],
)
def test_generate_gives_the_tokens_of_the_dequantized_model(pair, how):
    model, plain = pair
    prompt = torch.tensor([[3, 14, 15, 9, 2], [6, 5, 35, 8, 9]])
    kept = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=12, **how)
    got, wanted = (each.generate(prompt, **kept) for each in (model, plain))
    assert got.shape == (2, 17)
    # No constant text that any weights would give.
    assert got[:, 5:].unique().numel() > 2
    assert torch.equal(got, wanted)


def test_the_stand_in_answers_all_that_a_quantizer_is_asked():
    """Every public attribute of transformers' own base class that is a plain question has an answer here."""
    questions = {name for name in vars(HfQuantizer) if name.startswith(("is_", "requires_"))} - {"is_serializable"}
    assert questions
    for name in questions:
        assert isinstance(getattr(SwappedModelQuantizer(), name), bool), name


def test_a_trainer_takes_a_swapped_model_with_an_adapter(tmp_path):
    """`Trainer` refuses quantized models that cannot be trained; a step through a LoRA changes it."""
    from peft import LoraConfig, get_peft_model

    model = model_of("Llama")
    fk.swap_linear(model, format="Q8_0")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    rows = [dict(input_ids=torch.arange(8), labels=torch.arange(8))] * 2
    how = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    transformers.Trainer(model, how, train_dataset=rows).train()
    after = dict(model.named_parameters())
    assert before and all(not torch.equal(value, after[name]) for name, value in before.items())
