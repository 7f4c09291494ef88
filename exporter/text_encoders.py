"""Text encoders of a model: modules from tokens to conditions, each with its tokenizer; those of a pipeline's folder.

A model that takes prompts has a member beside `decoder`:

    text: Sequence[TextEncoder]         # read only where prompts are wanted, so it may be a property that loads them

Each encoder gives conditions of the model: those that its module returns, in their order, and perhaps the attention
mask. A condition that is joined from several encoders is for the model to join: each encoder gives one of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditc.choices import Cleaning, PaddingSide
from ditc.errors import BundleError, CheckpointError, DitcError
from ditc.exporter.config_files import class_named, read_json
from ditc.exporter.pipeline_index import INDEX_FILE, class_in_index
from ditc.exporter.shipped_prompts import shipped_prompts
from ditc.exporter.text_activations import watched_activations
from ditc.exporter.text_modules import EncoderModule, module_of_folder
from ditc.exporter.text_tokenizers import check_tokenizer, tokenizer_of_folder
from ditc.spec import ModelSpec
from ditc.text_spec import TextSpec, text_contradictions
from ditc.tokenization import Tokenization

__all__ = ["PIPELINES", "TextEncoder", "check_text", "text_of_folder", "text_of_model"]

OVERFLOW_PROMPTS = 4  # are run by an encoder in another type than float32, to see whether it overflows
LOWERED = (  # of a pipeline that has more to clean with where two packages are there
    "prompts are lower-cased and stripped, as diffusers has it where beautifulsoup4 or ftfy is not installed; with "
    "both it takes web addresses, file names and more out of them"
)


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A text encoder of a model, in float32.

    `module` takes ids and attention mask, int64 (batch, length), and returns a tensor for each of `gives`. `tokenizer`
    is a tokenizer.json: its path or its bytes. `vocabulary` is how many ids the module knows. The rest is as `TextSpec`
    has it.
    """

    name: str
    module: nn.Module
    tokenizer: Path | bytes
    length: int
    vocabulary: int
    gives: tuple[str, ...]
    mask: str | None = None
    pad_id: int = 0
    padding_side: PaddingSide = "right"
    cleaning: Cleaning = "none"
    kind: str = ""
    assumptions: tuple[str, ...] = ()

    @property
    def spec(self) -> TextSpec:
        """The encoder as a bundle keeps it."""
        return TextSpec(
            name=self.name,
            kind=self.kind or type(self.module).__name__,
            parameters=sum(parameter.numel() for parameter in self.module.parameters()),
            vocabulary=self.vocabulary,
            length=self.length,
            pad_id=self.pad_id,
            padding_side=self.padding_side,
            cleaning=self.cleaning,
            gives=self.gives,
            mask=self.mask,
        )

    @property
    def json(self) -> bytes:
        """The bytes of the tokenizer.json. Raises CheckpointError where it can't be read."""
        if isinstance(self.tokenizer, bytes):
            return self.tokenizer
        try:
            return self.tokenizer.read_bytes()
        except OSError as e:
            raise CheckpointError(
                f"can't read {self.tokenizer}, the tokenizer of text encoder {self.name}: {e.strerror or e}"
            ) from e

    @property
    def tokenization(self) -> Tokenization:
        """The tokenizer, open. Raises CheckpointError where it is none."""
        try:
            return Tokenization.of(self.json, self.spec, f"the tokenizer of text encoder {self.name}")
        except BundleError as e:
            raise CheckpointError(str(e)) from e

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides what a prompt gives: settings, tokenizer, weights; in hex."""
        digest = hashlib.sha256(self.spec.model_dump_json().encode() + self.json)
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def tensors(self, ids: Any, mask: Any) -> tuple[Tensor, ...]:
        """Return what the module gives for tokens, int64 arrays (batch, length): a tensor for each of `gives`."""
        out = self.module(torch.from_numpy(ids), torch.from_numpy(mask))
        return (out,) if isinstance(out, Tensor) else tuple(out)


@dataclass(frozen=True)
class Slot:
    """A text encoder of a pipeline: its two parts in the index, and what is done with it.

    `takes` maps outputs of its class (`text_modules.ENCODERS`) to conditions.
    """

    name: str
    encoder: str
    tokenizer: str
    length: int
    takes: Mapping[str, str]
    mask: str | None = None
    cleaning: Cleaning = "none"


def _pixart(length: int) -> tuple[Slot, ...]:
    return (
        Slot("t5", "text_encoder", "tokenizer", length, {"last": "text"}, mask="text_mask", cleaning="lower-strip"),
    )


CLIP_LENGTH = 77
# class of a pipeline in model_index.json -> its text encoders, read in the sources of diffusers
PIPELINES: Mapping[str, tuple[Slot, ...]] = {
    "PixArtAlphaPipeline": _pixart(120),
    "PixArtSigmaPipeline": _pixart(300),
    "StableDiffusion3Pipeline": (
        Slot("clip_l", "text_encoder", "tokenizer", CLIP_LENGTH, {"penultimate": "clip_l", "pooled": "pooled_l"}),
        Slot("clip_g", "text_encoder_2", "tokenizer_2", CLIP_LENGTH, {"penultimate": "clip_g", "pooled": "pooled_g"}),
        Slot("t5", "text_encoder_3", "tokenizer_3", 256, {"last": "t5"}),
    ),
    "FluxPipeline": (
        Slot("clip", "text_encoder", "tokenizer", CLIP_LENGTH, {"pooled": "pooled"}),
        Slot("t5", "text_encoder_2", "tokenizer_2", 512, {"last": "text"}),
    ),
}


def text_of_folder(folder: Path, tokens: int | None = None) -> tuple[TextEncoder, ...]:
    """Return the text encoders of a pipeline's folder in diffusers' layout, in float32; none where it names none.

    `tokens` is how many T5, the last one, reads of a prompt; None for what the pipeline takes unless told. Raises
    CheckpointError for one that its model_index.json names and that is not there, or that is not known here.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return ()
    index = read_json(path, "the index of a pipeline")
    if not any(name.startswith("text_encoder") and class_in_index(folder, name) is not None for name in index):
        return ()
    kind = class_named(index)
    if kind not in PIPELINES:
        raise CheckpointError(
            f"{path} is of a {kind}, and ditc knows the text encoders of: {', '.join(PIPELINES)}; compile "
            "with --no-text and give embeddings"
        )
    *others, last = PIPELINES[kind]
    slots = (*others, last if tokens is None else replace(last, length=tokens))
    return tuple(_encoder_of(folder, slot) for slot in slots)


def _encoder_of(folder: Path, slot: Slot) -> TextEncoder:
    kinds = {part: class_in_index(folder, part) for part in (slot.encoder, slot.tokenizer)}
    for part, kind in kinds.items():
        if kind is None:
            raise CheckpointError(
                f"{folder / INDEX_FILE} names no {part}, which prompts need; compile with --no-text and give embeddings"
            )
    kind = str(kinds[slot.encoder])
    file = tokenizer_of_folder(folder / slot.tokenizer, str(kinds[slot.tokenizer]))
    model, about = module_of_folder(folder / slot.encoder, kind)
    encoder = TextEncoder(
        name=slot.name,
        module=EncoderModule(model, tuple(slot.takes), masked=slot.mask is not None),
        tokenizer=file.json,
        length=slot.length,
        vocabulary=model.get_input_embeddings().num_embeddings,
        gives=tuple(slot.takes.values()),
        mask=slot.mask,
        pad_id=file.pad_id,
        padding_side=file.padding_side,
        cleaning=slot.cleaning,
        kind=kind,
        assumptions=(
            *(f"of the text encoder {slot.name} {line}" for line in about),
            *((LOWERED,) if slot.cleaning == "lower-strip" else ()),
        ),
    )
    check_vocabulary(encoder)
    check_tokenizer(file, encoder.spec)
    return encoder


def check_vocabulary(encoder: TextEncoder) -> None:
    """Raise CheckpointError where the tokenizer gives ids that the module has no embedding of."""
    highest = encoder.tokenization.highest_id
    if highest >= encoder.vocabulary:
        raise CheckpointError(
            f"the tokenizer of text encoder {encoder.name} gives ids up to {highest}, and its embedding has "
            f"{encoder.vocabulary} rows; give the tokenizer that it was trained with"
        )


def text_of_model(model: Any) -> tuple[TextEncoder, ...]:
    """Return a model's text encoders, held to it; none of most models, whatever else they call `text`.

    Raises CheckpointError where they don't fit the model.
    """
    own = getattr(model, "text", None)
    if not isinstance(own, (tuple, list)) or (own and not any(isinstance(each, TextEncoder) for each in own)):
        return ()
    check_text(model.spec, own)
    return tuple(own)


def check_text(spec: ModelSpec, encoders: Sequence[TextEncoder]) -> None:
    """Raise CheckpointError unless encoders run on tokens, and give the conditions of the model that they say."""
    strangers = [each for each in encoders if not isinstance(each, TextEncoder)]
    if strangers:
        raise CheckpointError(f"text must be TextEncoders of {__name__}, found {type(strangers[0]).__name__}")
    for contradiction in text_contradictions(spec, _specs(encoders)):
        raise CheckpointError(contradiction)
    for encoder in encoders:
        check_vocabulary(encoder)
        _check_float32(encoder)
        _check_outputs(spec, encoder)


def _specs(encoders: Sequence[TextEncoder]) -> list[TextSpec]:
    try:
        return [encoder.spec for encoder in encoders]
    except ValueError as e:  # pydantic's
        raise CheckpointError(f"a text encoder can't be: {' '.join(str(e).split())}") from e


def _check_float32(encoder: TextEncoder) -> None:
    """Raise CheckpointError for weights of another type: activations of T5 lie beyond what FP16 holds."""
    for name, parameter in encoder.module.named_parameters():
        if parameter.dtype != torch.float32:
            raise CheckpointError(
                f"text encoder {encoder.name} is in {str(parameter.dtype).removeprefix('torch.')} ({name})"
                f"{_overflow_of(encoder)}, expected float32; give module.float()"
            )


def _overflow_of(encoder: TextEncoder) -> str:
    """Describe where the encoder overflows in the type that its weights have, on prompts; nothing where it does not."""
    tokens = encoder.tokenization.tokens(shipped_prompts()[:OVERFLOW_PROMPTS])
    with watched_activations(encoder.module) as largest, suppress(RuntimeError):  # not every type runs on a processor
        encoder.tensors(tokens.ids, tokens.mask)
    return "" if math.isfinite(largest.value) else f" and overflows there, in {largest.path}"


def _check_outputs(spec: ModelSpec, encoder: TextEncoder) -> None:
    """Run one prompt, and raise CheckpointError where the module gives other tensors than the conditions are."""
    tokens = encoder.tokenization.tokens(["a cat"])
    try:
        tensors = encoder.tensors(tokens.ids, tokens.mask)
    except DitcError:
        raise
    except Exception as e:  # the user's module may fail in any way
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CheckpointError(f"text encoder {encoder.name} can't run on tokens (1, {encoder.length}): {reason}") from e
    if len(tensors) != len(encoder.gives):
        raise CheckpointError(
            f"text encoder {encoder.name} gives {len(tensors)} tensors, expected {', '.join(encoder.gives)}"
        )
    conditions = {condition.name: condition for condition in spec.conditions}
    for name, tensor in zip(encoder.gives, tensors, strict=True):
        expected = conditions[name]
        kind = str(tensor.dtype).removeprefix("torch.")
        if (kind, tuple(tensor.shape)) != (expected.dtype, (1, *expected.shape)):
            raise CheckpointError(
                f"text encoder {encoder.name} gives {name!r} of {kind} {tuple(tensor.shape)}, expected "
                f"{expected.dtype} {(1, *expected.shape)} as the condition is"
            )
