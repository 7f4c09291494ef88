"""The text-to-image model as a pipeline folder, as diffusers and transformers write one: what other code reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ditc.exporter.emoji_model import EOS, MAX_TOKENS, PAD, UNKNOWN, EmojiModel, build_emoji_model, load_float16
from ditc.exporter.pipeline_index import INDEX_FILE
from ditc.files import atomic_folder

__all__ = ["emoji_from_tensors", "write_emoji_folder"]

INDEX = {
    "_class_name": "PixArtSigmaPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": [None, None],  # it draws pixels
}
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",  # which takes tokenizer.json as it is
    "model_max_length": MAX_TOKENS,
    "pad_token": PAD,
    "eos_token": EOS,
    "unk_token": UNKNOWN,
    "clean_up_tokenization_spaces": False,
}


def emoji_from_tensors(tensors: Mapping[str, Tensor]) -> EmojiModel:
    """Build the model with weights that were stored as float16; it computes in float32."""
    model = build_emoji_model()
    load_float16(model, tensors)
    return model.eval()


def write_emoji_folder(model: EmojiModel, tokenizer: bytes, folder: Path) -> None:
    """Write the folder: transformer, text encoder, tokenizer (the bytes of its tokenizer.json) and scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    transformer: Any = model.transformer
    text_encoder: Any = model.text_encoder
    scheduler: Any = FlowMatchEulerDiscreteScheduler
    with atomic_folder(folder) as new:
        transformer.save_pretrained(new / "transformer")
        text_encoder.save_pretrained(new / "text_encoder")
        scheduler().save_config(new / "scheduler")
        (new / "tokenizer").mkdir()
        (new / "tokenizer" / "tokenizer.json").write_bytes(tokenizer)
        (new / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=1) + "\n")
        (new / INDEX_FILE).write_text(json.dumps(INDEX, indent=1) + "\n")
