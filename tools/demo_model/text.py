"""Make the text side: two small tokenizers and two one-layer encoders that learn the prompts."""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from .prompts import COLOURS, DIGIT_WORDS, Request, sentences, vocabulary

LENGTH = 8
WIDTH = 256
_LEARNING_RATE = 1e-3
_BATCH = 128


class TextSide(NamedTuple):
    """Holds the four text components of a FluxPipeline."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: T5TokenizerFast
    text_encoder_2: T5EncoderModel


class PromptTable(NamedTuple):
    """Hold every prompt's tokens float32 [prompts, 8, 256], pooled [prompts, 256], rows by request."""

    tokens: torch.Tensor
    pooled: torch.Tensor
    rows: dict[Request, list[int]]


def clip_tokenizer() -> CLIPTokenizer:
    """Build a byte-level BPE tokenizer whose merges make each word of the prompts one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(vocabulary(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    entries = [*alphabet, *(letter + "</w>" for letter in alphabet), *(left + right for left, right in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    """Build a Unigram tokenizer of the prompts' words, capitalised too, and single letters."""
    words = vocabulary()
    pieces = ["▁" + form for word in words for form in dict.fromkeys((word, word.capitalize()))]
    letters = [chr(code) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    vocab += [(piece, -3.0) for piece in pieces] + [(letter, -9.0) for letter in letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=LENGTH)


def build(seed: int) -> TextSide:
    """Build the text side with untrained encoders."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=WIDTH,
        d_kv=64,
        d_ff=WIDTH,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="relu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return TextSide(tokenizer, CLIPTextModel(clip), tokenizer_2, T5EncoderModel(t5))


def _ids(tokenizer: CLIPTokenizer | T5TokenizerFast, prompts: list[str]) -> torch.Tensor:
    return tokenizer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def _spellings() -> list[tuple[Request, str]]:
    plain = [(request, text) for request, group in sentences().items() for text in group]
    return plain + [(request, text[0].upper() + text[1:]) for request, text in plain if text and not text[0].isdigit()]


def train(text: TextSide, *, steps: int, seed: int, report: Callable[[int, float], None]) -> float:
    """Teach both encoders to tell a prompt's digit and colour; return the share read right, 0..1."""
    torch.manual_seed(seed)
    spelled = _spellings()
    digits = torch.tensor([len(DIGIT_WORDS) if r.digit is None else r.digit for r, _ in spelled])
    colours = torch.tensor([len(COLOURS) if r.colour is None else r.colour for r, _ in spelled])
    clip_ids, t5_ids = (_ids(t, [s for _, s in spelled]) for t in (text.tokenizer, text.tokenizer_2))
    heads = nn.ModuleList([nn.Linear(WIDTH, len(DIGIT_WORDS) + len(COLOURS) + 2) for _ in range(2)])
    parameters = [*text.text_encoder.parameters(), *text.text_encoder_2.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.01)
    split = len(DIGIT_WORDS) + 1
    share = 0.0
    for step in range(steps):
        pick = torch.randint(len(spelled), (_BATCH,))
        pooled = heads[0](text.text_encoder(clip_ids[pick]).pooler_output)
        tokens = heads[1](text.text_encoder_2(t5_ids[pick]).last_hidden_state.mean(1))
        loss = sum(
            F.cross_entropy(out[:, :split], digits[pick]) + F.cross_entropy(out[:, split:], colours[pick])
            for out in (pooled, tokens)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = [
            (out[:, :split].argmax(1) == digits[pick]) & (out[:, split:].argmax(1) == colours[pick]) for out in (pooled, tokens)
        ]
        share = torch.stack(right).float().mean().item()
        report(step + 1, loss.item())
    return share


@torch.inference_mode()
def embed(text: TextSide) -> PromptTable:
    """Embed every prompt once, as the pipeline would with max_sequence_length=8."""
    spelled = _spellings()
    prompts = [sentence for _, sentence in spelled]
    rows: dict[Request, list[int]] = {}
    for index, (request, _) in enumerate(spelled):
        rows.setdefault(request, []).append(index)
    pooled = text.text_encoder(_ids(text.tokenizer, prompts)).pooler_output
    tokens = text.text_encoder_2(_ids(text.tokenizer_2, prompts)).last_hidden_state
    return PromptTable(tokens.clone(), pooled.clone(), rows)
