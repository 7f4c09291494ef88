"""A transformer of a user's own that takes prompts: tiny random encoders of two classes, with tokenizers."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from ditc.exporter.shipped_prompts import shipped_prompts
from ditc.exporter.text_encoders import TextEncoder
from ditc.exporter.text_modules import EncoderModule
from ditc.spec import Condition
from tests.models.token_mixer import DIM, Mixer, TokenMixer, seeded

TOKENS, WIDTH = 12, 16  # of the T5
POOLED_TOKENS, POOLED = 10, 8  # of the CLIP
T5_IDS, CLIP_IDS = 260, 200


@cache
def words() -> Counter[str]:
    """The words of the shipped prompts with how often they come; training would not give every process the same."""
    return Counter(word for prompt in shipped_prompts() for word in prompt.lower().split())


@cache
def t5_tokenizer() -> bytes:
    """A tokenizer.json as T5's: pieces with a mark for a space, an end."""
    letters = sorted({letter for word in words() for letter in word if letter.isascii()})
    common = [(f"\u2581{word}", math.log(count / 1000)) for word, count in words().most_common(120)]
    pieces = [*common, ("\u2581", -4.0), *((letter, -5.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer.to_str().encode()


@cache
def clip_tokenizer() -> bytes:
    """A tokenizer.json as CLIP's: lower case, letters that join, a begin and an end, which also fills up."""
    letters = sorted({letter for word in words() for letter in word if letter.isascii()})
    merges = [("t", "h"), ("th", "e</w>"), ("a", "n"), ("i", "n"), ("in", "g</w>"), ("an", "d</w>")]
    joined = [first + second for first, second in merges]
    pieces = ["<begin>", "<end>", *letters, *(f"{letter}</w>" for letter in letters), *joined]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<end>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 0), ("<end>", 1)]
    )
    return tokenizer.to_str().encode()


def t5_config(**changes: Any) -> T5Config:
    sizes = {"vocab_size": T5_IDS, "d_model": WIDTH, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5Config(**{**sizes, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, **changes})


def clip_config(**changes: Any) -> CLIPTextConfig:
    sizes = {"vocab_size": CLIP_IDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": POOLED_TOKENS}
    return CLIPTextConfig(**{**sizes, **ids, "num_attention_heads": 4, "projection_dim": POOLED, **changes})


def t5_encoder(**changes: Any) -> TextEncoder:
    """A tiny T5 that gives its last states and the mask."""
    given: dict[str, Any] = {
        "name": "t5",
        "module": EncoderModule(seeded(T5EncoderModel, t5_config()), ("last",), masked=True),
        "tokenizer": t5_tokenizer(),
        "length": TOKENS,
        "vocabulary": T5_IDS,
        "gives": ("text",),
        "mask": "text_mask",
        "cleaning": "lower-strip",
        "kind": "T5EncoderModel",
    }
    return TextEncoder(**{**given, **changes})


def clip_encoder(**changes: Any) -> TextEncoder:
    """A tiny CLIP that gives its projected vector."""
    given: dict[str, Any] = {
        "name": "clip",
        "module": EncoderModule(seeded(CLIPTextModelWithProjection, clip_config()), ("pooled",), masked=False),
        "tokenizer": clip_tokenizer(),
        "length": POOLED_TOKENS,
        "vocabulary": CLIP_IDS,
        "gives": ("pooled",),
        "pad_id": 1,
        "kind": "CLIPTextModelWithProjection",
    }
    return TextEncoder(**{**given, **changes})


class Attending(Mixer):
    """A branch that attends to the words of a text that its mask shows."""

    def compute(self, h: Tensor, parts: dict[str, Tensor]) -> Tensor:
        keys, values = parts["text"][:, None].chunk(2, dim=-1)
        read = nn.functional.scaled_dot_product_attention(h[:, None], keys, values, attn_mask=parts["bias"][:, None])
        return self.down(torch.cat([read[:, 0], self.up(h)[..., DIM:]], dim=-1))


class Captioned(TokenMixer):
    """Texts of a T5, with its mask, and a vector of a CLIP; each with a negative one."""

    def __init__(self) -> None:
        super().__init__(3, (4, 4))
        self.words, self.whole = nn.Linear(WIDTH, 2 * DIM), nn.Linear(POOLED, DIM)
        self.branches.append(Attending("layers.3.cross", 16, 2))
        self.text = (t5_encoder(), clip_encoder())

    def stated(self) -> dict[str, Any]:
        conditions = (
            Condition(name="text", shape=(TOKENS, WIDTH), null="given"),
            Condition(name="text_mask", dtype="int64", classes=2, shape=(TOKENS,), null="given"),
            Condition(name="pooled", shape=(POOLED,), null="given"),
        )
        return {"conditions": conditions}

    def request_tables(self, text: Tensor, mask: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        return {"text": self.words(text), "bias": (mask[:, None].float() - 1) * 10000}

    def condition(self, t: Tensor, *conditions: Tensor) -> dict[str, Tensor]:
        c = nn.functional.silu(self.embedded_time(t)[:, None] + self.whole(conditions[2]))
        return {"modulation": self.modulation(c).unflatten(-1, (-1, DIM))}

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        c = nn.functional.silu(self.embedded_time(t) + self.whole(conditions[2]))
        parts = {"modulation": self.modulation(c).unflatten(-1, (-1, DIM)), **self.request_tables(*conditions)}
        h = self.embed(x)
        for branch in self.branches:
            h = branch.merge(h, branch.compute(h, parts), parts)
        return self.head(h, parts)


def captioned() -> Captioned:
    """A model with two text encoders."""
    return seeded(Captioned)
