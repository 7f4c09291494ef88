"""The pipeline folder of the text-to-image model: diffusers and transformers compute from it what the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditc.exporter.emoji_folder import write_emoji_folder
from ditc.exporter.emoji_model import (
    MAX_TOKENS,
    TEXT_ENCODER,
    TRANSFORMER,
    EmojiModel,
    TextIds,
    build_emoji_model,
    text_ids,
    train_tokenizer,
)
from ditc.exporter.pipeline_index import class_in_index

TINY = {**TRANSFORMER, "num_layers": 1}
TINY_TEXT = {**TEXT_ENCODER, "num_layers": 1, "vocab_size": 64}
PROMPTS = ["a red apple", "Waving hand, dark skin tone!", "", "\u82f9\u679c", "word " * 40]


@pytest.fixture(scope="module")
def model() -> EmojiModel:
    torch.manual_seed(0)
    return build_emoji_model(TINY, TINY_TEXT).eval()


@pytest.fixture(scope="module")
def tokens() -> TextIds:
    return text_ids(train_tokenizer(PROMPTS, size=60), PROMPTS)


@pytest.fixture(scope="module")
def folder(model: EmojiModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "emoji"
    write_emoji_folder(model, train_tokenizer(PROMPTS, size=60).to_str().encode(), path)
    return path


def test_transformers_cuts_prompts_into_the_same_tokens(folder: Path, tokens: TextIds) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    cut = tokenizer(PROMPTS, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    assert torch.equal(cut.input_ids, tokens.ids)
    assert torch.equal(cut.attention_mask, tokens.mask)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == MAX_TOKENS


def test_both_networks_come_back_and_compute_the_same(folder: Path, model: EmojiModel, tokens: TextIds) -> None:
    from diffusers import PixArtTransformer2DModel
    from transformers import T5EncoderModel

    read = EmojiModel(
        PixArtTransformer2DModel.from_pretrained(folder / "transformer"),
        T5EncoderModel.from_pretrained(folder / "text_encoder"),
    ).eval()
    x, sigma = torch.randn(len(PROMPTS), 3, 32, 32), torch.linspace(0, 1, len(PROMPTS))
    with torch.no_grad():
        torch.testing.assert_close(read(x, sigma, tokens), model(x, sigma, tokens), atol=1e-5, rtol=0)


def test_its_scheduler_walks_from_noise_to_the_picture(folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 1000
    assert (scheduler.sigmas[0], scheduler.sigmas[-1]) == (1, 0)
    torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)


def test_the_index_names_the_classes(folder: Path) -> None:
    assert class_in_index(folder, "transformer") == "PixArtTransformer2DModel"
    assert class_in_index(folder, "text_encoder") == "T5EncoderModel"
    assert class_in_index(folder, "vae") is None
