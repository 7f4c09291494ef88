"""Small folders of pipelines with text encoders, as diffusers lays them out; tokenizers are trained here."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel
from transformers.utils import logging

from ditc.exporter.shipped_prompts import shipped_prompts
from tests.models.captioned import clip_config, t5_config
from tests.models.token_mixer import seeded

logging.disable_progress_bar()

T5_PIECES, T5_ROWS = 300, 320
CLIP_LENGTH = 77


@cache
def spiece_model() -> bytes:
    """A SentencePiece model with T5's first ids and its normalization."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([prompt for prompt in shipped_prompts() if prompt]),
        model_writer=model,
        vocab_size=T5_PIECES,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
        max_sentence_length=5000,
    )
    return model.getvalue()


def write_t5_tokenizer(folder: Path, **changes: Any) -> Path:
    """T5's tokenizer as older folders have it: the SentencePiece model and its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece_model())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<unk>", **changes}))
    return folder


def write_clip_tokenizer(folder: Path, **changes: Any) -> Path:
    """CLIP's: letters with and without the mark of a word's end, some merges, its special tokens last."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,'-"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>", "an", "in", "ing</w>"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = ["#version: 0.2", "t h", "th e</w>", "a n", "i n", "in g</w>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **changes}))
    return folder


def clip_sizes(folder: Path) -> dict[str, int]:
    """The settings of an encoder that follow from the tokenizer in a folder."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {**ids, "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": CLIP_LENGTH}


def write_index(folder: Path, pipeline: str, parts: Mapping[str, str]) -> None:
    entries = {name: ["transformers", kind] for name, kind in parts.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **entries}))


def t5_folder(folder: Path, pipeline: str = "PixArtAlphaPipeline", **changes: Any) -> Path:
    """The text parts of a PixArt: a tiny T5 and its tokenizer."""
    write_t5_tokenizer(folder / "tokenizer")
    seeded(T5EncoderModel, t5_config(vocab_size=T5_ROWS, **changes)).save_pretrained(folder / "text_encoder")
    write_index(folder, pipeline, {"text_encoder": "T5EncoderModel", "tokenizer": "T5Tokenizer"})
    return folder


def sd3_folder(folder: Path) -> Path:
    """The text parts of an SD3: two CLIPs that project, one of them filled up with another token, and a T5."""
    write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad_token="a")
    write_t5_tokenizer(folder / "tokenizer_3")
    for number, width in (("", 16), ("_2", 24)):
        sizes = clip_sizes(folder / f"tokenizer{number}")
        encoder = seeded(CLIPTextModelWithProjection, clip_config(hidden_size=width, projection_dim=width, **sizes))
        encoder.save_pretrained(folder / f"text_encoder{number}")
    seeded(T5EncoderModel, t5_config(vocab_size=T5_ROWS)).save_pretrained(folder / "text_encoder_3")
    parts = {f"text_encoder{number}": "CLIPTextModelWithProjection" for number in ("", "_2")}
    parts |= {f"tokenizer{number}": "CLIPTokenizer" for number in ("", "_2")}
    parts |= {"text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5TokenizerFast"}
    write_index(folder, "StableDiffusion3Pipeline", parts)
    return folder


def flux_folder(folder: Path) -> Path:
    """The text parts of a FLUX: a CLIP for its pooled state, and a T5."""
    write_clip_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    seeded(CLIPTextModel, clip_config(**clip_sizes(folder / "tokenizer"))).save_pretrained(folder / "text_encoder")
    seeded(T5EncoderModel, t5_config(vocab_size=T5_ROWS)).save_pretrained(folder / "text_encoder_2")
    parts = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer", "text_encoder_2": "T5EncoderModel"}
    write_index(folder, "FluxPipeline", {**parts, "tokenizer_2": "T5TokenizerFast"})
    return folder
