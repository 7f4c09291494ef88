"""Text encoders of pipelines' folders: what diffusers' own pipelines encode from the same prompts, refusals else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, StableDiffusion3Pipeline
from refusals import refusal_of
from safetensors.torch import load_file, save_file
from text_folders import flux_folder, sd3_folder, t5_folder, write_index, write_t5_tokenizer
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from ditc.exporter import text_tokenizers
from ditc.exporter.protocol import relative_error
from ditc.exporter.text_encoders import TextEncoder, check_text, text_of_folder
from ditc.exporter.text_modules import EncoderModule, module_of_folder
from ditc.spec import Condition
from tests.core.test_conditions import spec_of
from tests.models.captioned import CLIP_IDS, POOLED, TOKENS, WIDTH, captioned, clip_config, clip_encoder, t5_encoder
from tests.models.token_mixer import seeded

PROMPTS = ["A small Cactus, wearing a straw hat ", "", "two dogs", "the sea and the wind " * 40]
CLIP_PROMPTS = ["a cat in the rain", "", "an owl, reading", "the sea and the wind " * 40]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each pipeline, not to be changed."""
    root = tmp_path_factory.mktemp("pipelines")
    t5_folder(root / "alpha")
    t5_folder(root / "sigma", "PixArtSigmaPipeline")
    sd3_folder(root / "sd3")
    flux_folder(root / "flux")
    return root


@pytest.fixture
def folder(folders: Path, tmp_path: Path) -> Path:
    """A PixArt's, to be changed."""
    return Path(shutil.copytree(folders / "alpha", tmp_path / "pipeline"))


def given(encoder: TextEncoder, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Conditions of prompts, by name."""
    tokens = encoder.tokenization.tokens(prompts)
    arrays = dict(zip(encoder.gives, encoder.tensors(tokens.ids, tokens.mask), strict=True))
    return arrays | ({} if encoder.mask is None else {encoder.mask: torch.from_numpy(tokens.mask)})


def refusal(folder: Path, about: object = "") -> str:
    return refusal_of(lambda: text_of_folder(folder), about)


def encoder_and_tokenizer(folder: Path, number: str = "") -> dict[str, Any]:
    """T5's parts as diffusers would load them."""
    return {
        f"text_encoder{number}": T5EncoderModel.from_pretrained(folder / f"text_encoder{number}"),
        f"tokenizer{number}": T5Tokenizer.from_pretrained(folder / f"tokenizer{number}"),
    }


@pytest.mark.parametrize(
    ("kind", "name", "length"), [(PixArtAlphaPipeline, "alpha", 120), (PixArtSigmaPipeline, "sigma", 300)]
)
@torch.no_grad()
def test_a_pixart_encodes_as_diffusers_does(kind: Any, name: str, length: int, folders: Path) -> None:
    (encoder,) = text_of_folder(folders / name)
    assert (encoder.length, encoder.spec.conditions) == (length, ("text", "text_mask"))
    pipeline = kind(**encoder_and_tokenizer(folders / name), vae=None, transformer=None, scheduler=None)
    own, empty = given(encoder, PROMPTS), given(encoder, [""])
    text, mask, null, null_mask = pipeline.encode_prompt(PROMPTS, True, device="cpu", max_sequence_length=length)
    assert relative_error(own["text"], text) < 1e-6
    assert torch.equal(own["text_mask"], mask)
    assert relative_error(empty["text"], null[:1]) < 1e-6
    assert torch.equal(empty["text_mask"], null_mask[:1])
    assert own["text_mask"].sum(dim=1)[1] == 1  # the empty prompt is its end alone


def test_prompts_are_cleaned_as_diffusers_cleans_them_here(folders: Path) -> None:
    """Its cleaning of captions is on unless said otherwise, and falls back where a package for it is missing."""
    (encoder,) = text_of_folder(folders / "alpha")
    pipeline = PixArtAlphaPipeline(
        **encoder_and_tokenizer(folders / "alpha"), vae=None, transformer=None, scheduler=None
    )
    own = encoder.tokenization.tokens(PROMPTS)
    cleaned = pipeline._text_preprocessing(PROMPTS, clean_caption=False)
    assert np.array_equal(encoder.tokenization.tokens(cleaned).ids, own.ids)
    assert any("beautifulsoup4 or ftfy" in line for line in encoder.assumptions)


@torch.no_grad()
def test_three_encoders_of_an_sd3_give_what_diffusers_joins(folders: Path) -> None:
    encoders = text_of_folder(folders / "sd3")
    assert [encoder.name for encoder in encoders] == ["clip_l", "clip_g", "t5"]
    parts: dict[str, Any] = {
        f"text_encoder{n}": CLIPTextModelWithProjection.from_pretrained(folders / "sd3" / f"text_encoder{n}")
        for n in ("", "_2")
    }
    parts |= {f"tokenizer{n}": CLIPTokenizer.from_pretrained(folders / "sd3" / f"tokenizer{n}") for n in ("", "_2")}
    parts |= encoder_and_tokenizer(folders / "sd3", "_3")
    pipeline = StableDiffusion3Pipeline(**parts, vae=None, transformer=None, scheduler=None)
    own = {name: tensor for encoder in encoders for name, tensor in given(encoder, CLIP_PROMPTS).items()}
    for index, name in enumerate("lg"):
        states, pooled = pipeline._get_clip_prompt_embeds(CLIP_PROMPTS, clip_model_index=index, device="cpu")
        assert relative_error(own[f"clip_{name}"], states) < 1e-6
        assert relative_error(own[f"pooled_{name}"], pooled) < 1e-6
    assert relative_error(own["t5"], pipeline._get_t5_prompt_embeds(CLIP_PROMPTS, device="cpu")) < 1e-6
    assert encoders[0].pad_id != encoders[1].pad_id


@torch.no_grad()
def test_two_encoders_of_a_flux_give_what_diffusers_gives(folders: Path) -> None:
    clip, t5 = text_of_folder(folders / "flux")
    pipeline = FluxPipeline(
        text_encoder=CLIPTextModel.from_pretrained(folders / "flux" / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folders / "flux" / "tokenizer"),
        **encoder_and_tokenizer(folders / "flux", "_2"),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    assert relative_error(given(clip, CLIP_PROMPTS)["pooled"], pipeline._get_clip_prompt_embeds(CLIP_PROMPTS)) < 1e-6
    assert relative_error(given(t5, CLIP_PROMPTS)["text"], pipeline._get_t5_prompt_embeds(CLIP_PROMPTS)) < 1e-6


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
@torch.no_grad()
def test_the_penultimate_states_are_what_the_last_layer_reads(kind: Any) -> None:
    model = seeded(kind, clip_config())
    layers = (model.text_model if hasattr(model, "text_model") else model).encoder.layers
    read: list[torch.Tensor] = []
    layers[-1].register_forward_pre_hook(lambda _, given: read.append(given[0]))
    ids = torch.tensor([[0, 5, 6, 1, 1, 1, 1, 1, 1, 1]])
    states, pooled = EncoderModule(model, ("penultimate", "pooled"), masked=False)(ids, torch.ones_like(ids))
    assert torch.equal(states, read[0])
    assert pooled.shape == (1, POOLED if kind is CLIPTextModelWithProjection else 16)


def test_a_tokenizer_json_is_taken_as_it_is(folder: Path) -> None:
    (before,) = text_of_folder(folder)
    T5Tokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "spiece.model").unlink()
    (after,) = text_of_folder(folder)
    tokens = [encoder.tokenization.tokens(PROMPTS) for encoder in (before, after)]
    assert np.array_equal(tokens[0].ids, tokens[1].ids)


def test_a_conversion_that_gives_other_ids_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = text_tokenizers._sentencepiece_ids

    def other(*arguments: Any) -> list[list[int]]:
        ids = rows(*arguments)
        ids[3][0] += 1
        return ids

    monkeypatch.setattr(text_tokenizers, "_sentencepiece_ids", other)
    assert "gives other ids than SentencePiece for" in refusal(folder, folder / "tokenizer")


def test_a_folder_without_text_has_no_encoders(tmp_path: Path) -> None:
    assert text_of_folder(tmp_path) == ()
    write_index(tmp_path, "DiTPipeline", {"vae": "AutoencoderKL"})
    assert text_of_folder(tmp_path) == ()


def without(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)


def renamed_class(folder: Path, part: str, kind: str | None) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index[part] = [None, None] if kind is None else ["transformers", kind]
    (folder / "model_index.json").write_text(json.dumps(index))


def without_weight(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(tensors, path, {"format": "pt"})


def with_infinity(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.final_layer_norm.weight"][0] = torch.inf
    save_file(tensors, path, {"format": "pt"})


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHANGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: without(folder, "text_encoder"), "text_encoder, where the T5EncoderModel of the pipeline should"),
    (lambda folder: without(folder, "tokenizer"), "tokenizer, where the T5Tokenizer of the pipeline should lie"),
    (lambda folder: (folder / "tokenizer" / "spiece.model").unlink(), "holds no T5Tokenizer: none of spiece.model"),
    (lambda folder: (folder / "tokenizer" / "spiece.model").write_bytes(b"no"), "can't be read as a T5Tokenizer"),
    (
        lambda folder: renamed_class(folder, "text_encoder", "LlamaModel"),
        "unknown class of a text encoder 'LlamaModel'",
    ),
    (lambda folder: renamed_class(folder, "tokenizer", "LlamaTokenizer"), "unknown class of a tokenizer 'LlamaToken"),
    (lambda folder: renamed_class(folder, "tokenizer", None), "names no tokenizer, which prompts need"),
    (lambda folder: write_index(folder, "KandinskyPipeline", {"text_encoder": "X"}), "is of a KandinskyPipeline, and"),
    (lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(), "no weights of a text encoder in"),
    (lambda folder: (folder / "text_encoder" / "model.safetensors").write_bytes(b"x"), "can't be read as a T5Encoder"),
    (without_weight, "missing encoder.block.1.layer.0.SelfAttention.q.weight"),
    (with_infinity, "encoder.final_layer_norm.weight contains NaN or infinity"),
    (lambda folder: configured(folder, model_type="clip_text_model"), "model_type is 'clip_text_model', expected t5"),
    (lambda folder: configured(folder, d_ff=64), "can't be read as a T5EncoderModel"),
    (lambda folder: write_t5_tokenizer(folder / "tokenizer", extra_ids=100), "has 320 rows; give the tokenizer"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[told for _, told in CHANGES])
def test_a_folder_that_is_not_whole_is_refused(change: Callable[[Path], Any], told: str, folder: Path) -> None:
    change(folder)
    assert told in refusal(folder)


def test_the_only_variant_of_weights_is_taken_and_said(folder: Path) -> None:
    home = folder / "text_encoder"
    model, _ = module_of_folder(home, "T5EncoderModel")
    (home / "model.safetensors").unlink()
    model.half().save_pretrained(home, variant="fp16")
    (encoder,) = text_of_folder(folder)
    assert {parameter.dtype for parameter in encoder.module.parameters()} == {torch.float32}
    assert any("variant fp16" in line for line in encoder.assumptions)
    model.save_pretrained(home, variant="ema")
    assert "in the variants ema, fp16 only" in refusal(folder)


CONDITIONS = (
    Condition(name="text", shape=(TOKENS, WIDTH), null="given"),
    Condition(name="text_mask", dtype="int64", classes=2, shape=(TOKENS,), null="given"),
    Condition(name="pooled", shape=(POOLED,), null="given"),
)


class Failing(torch.nn.Module):
    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        raise RuntimeError("no such thing\nat all")


@pytest.mark.parametrize(
    ("encoders", "told"),
    [
        ([t5_encoder(gives=("words",))], "gives 'words', and the conditions of token-mixer are: 'text', 'text_mask'"),
        ([t5_encoder(), t5_encoder(name="other")], "the condition 'text' is given twice by text encoders"),
        ([t5_encoder(), clip_encoder(name="t5")], "two text encoders are called 't5'"),
        (
            [t5_encoder(mask="pooled")],
            r"the condition 'pooled' is the attention mask of text encoder t5: expected int64",
        ),
        ([t5_encoder(length=11)], r"shape (11,), found int64 of shape (12,)"),
        ([t5_encoder(length=11, mask=None)], r"gives 'text' of float32 (1, 11, 16), expected float32 (1, 12, 16)"),
        ([t5_encoder(gives=("text", "pooled"))], "gives 1 tensors, expected text, pooled"),
        ([t5_encoder(vocabulary=100)], "and its embedding has 100 rows"),
        ([clip_encoder(pad_id=CLIP_IDS)], "pad_id is 200, and the vocabulary has 200 ids"),
        ([t5_encoder(name="T5")], "a text encoder can't be"),
        ([t5_encoder(module=Failing())], "text encoder t5 can't run on tokens (1, 12): no such thing"),
        ([t5_encoder(tokenizer=b"{}")], "the tokenizer of text encoder t5 is no tokenizer"),
        ([t5_encoder(tokenizer=Path("nowhere.json"))], "can't read nowhere.json, the tokenizer of text encoder t5"),
        ([t5_encoder(), "t5"], "text must be TextEncoders"),
    ],
)
def test_an_encoder_that_does_not_fit_its_model_is_refused(encoders: Any, told: str) -> None:
    spec = spec_of(name="token-mixer", conditions=CONDITIONS)
    assert told in refusal_of(lambda: check_text(spec, encoders))


@pytest.mark.parametrize(("scale", "told"), [(1.0, "(model.shared"), (3e4, "and overflows there, in model.encoder")])
def test_an_encoder_in_fp16_is_refused_with_its_overflow(scale: float, told: str) -> None:
    encoder = t5_encoder(mask=None)
    with torch.no_grad():
        for name, parameter in encoder.module.named_parameters():
            if name.endswith("wo.weight"):
                parameter *= scale
    encoder.module.half()
    spec = spec_of(conditions=CONDITIONS)
    message = refusal_of(lambda: check_text(spec, [encoder]), "text encoder t5 is in float16")
    assert told in message
    assert ("overflows" in message) == (scale > 1)


def test_a_member_called_text_that_is_something_else_is_left_alone() -> None:
    from ditc.exporter.text_encoders import text_of_model

    model = captioned()
    for other in ("hello", ("a", "b"), None, ()):
        model.text = other  # type: ignore[assignment]
        assert text_of_model(model) == ()
