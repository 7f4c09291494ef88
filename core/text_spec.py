"""A text encoder as a bundle keeps it: the way from a prompt to its tokens, and the conditions that its segment gives.

A bundle that takes prompts has a folder with, for each encoder, a tokenizer and a segment. The segment takes the ids
and the attention mask of one prompt and returns conditions; one more condition may be that mask itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from ditc.choices import Cleaning, PaddingSide
from ditc.spec import Condition, ModelSpec, Record

__all__ = ["ATTENTION_MASK", "CLEANINGS", "INPUT_IDS", "TEXT", "TextSpec", "text_conditions", "text_contradictions"]

TEXT = "text"  # the folder of a bundle, and how the names of the segments in it begin
INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"  # the ports of such a segment, int64 (batch, length)
NAME = r"^[a-z][a-z0-9_]*$"

CLEANINGS: Mapping[Cleaning, Callable[[str], str]] = {
    "none": lambda prompt: prompt,
    "lower-strip": lambda prompt: prompt.lower().strip(),
}


class TextSpec(Record):
    """A text encoder: how a prompt is cleaned and tokenized for it, and which conditions of the model it gives.

    A prompt is `length` tokens: cut to them with its special tokens kept, or filled up with `pad_id` on `padding_side`.
    `gives` are the conditions that the segment returns, `mask` is the one that is the attention mask, None for none.
    Ids are below `vocabulary`. `kind` is the encoder's class, for people.
    """

    name: str = Field(pattern=NAME)
    kind: str
    parameters: int = Field(ge=0)
    vocabulary: int = Field(ge=1)
    length: int = Field(ge=1)
    pad_id: int = Field(ge=0)
    padding_side: PaddingSide = "right"
    cleaning: Cleaning = "none"
    gives: Annotated[tuple[str, ...], Field(min_length=1)]
    mask: str | None = None

    @model_validator(mode="after")
    def _pads_with_a_token(self) -> TextSpec:
        if self.pad_id >= self.vocabulary:
            raise ValueError(f"pad_id is {self.pad_id}, and the vocabulary has {self.vocabulary} ids")
        return self

    @property
    def conditions(self) -> tuple[str, ...]:
        """Every condition that a prompt gives through this encoder."""
        return self.gives if self.mask is None else (*self.gives, self.mask)

    @property
    def segment(self) -> str:
        """The name of its segment."""
        return f"{TEXT}.{self.name}"

    @property
    def tokenizer(self) -> str:
        """The name of its tokenizer's file."""
        return f"tokenizer.{self.name}.json"

    @property
    def files(self) -> tuple[str, str]:
        """The files of a bundle that it needs: graph and tokenizer."""
        return f"{TEXT}/{self.segment}.onnx", f"{TEXT}/{self.tokenizer}"


def text_conditions(encoders: Sequence[TextSpec]) -> list[str]:
    """Return the names of the conditions that prompts give."""
    return [name for encoder in encoders for name in encoder.conditions]


def text_contradictions(model: ModelSpec, encoders: Sequence[TextSpec]) -> Iterator[str]:
    """Yield a sentence for each way in which encoders do not fit the conditions of a model."""
    known = {condition.name: condition for condition in model.conditions if not condition.fresh}
    names, given = set[str](), set[str]()
    for encoder in encoders:
        if encoder.name in names:
            yield f"two text encoders are called {encoder.name!r}"
        names.add(encoder.name)
        for name in encoder.conditions:
            if name not in known:
                listed = ", ".join(map(repr, known)) or "none"
                yield f"text encoder {encoder.name} gives {name!r}, and the conditions of {model.name} are: {listed}"
            if name in given:
                yield f"the condition {name!r} is given twice by text encoders"
            given.add(name)
        mask = known.get(encoder.mask or "")
        if mask is not None and not _is_mask(mask, encoder.length):
            yield (
                f"the condition {mask.name!r} is the attention mask of text encoder {encoder.name}: expected int64 of "
                f"2 classes and shape ({encoder.length},), found {mask.dtype} of shape {mask.shape}"
            )


def _is_mask(condition: Condition, length: int) -> bool:
    return (condition.classes, condition.shape) == (2, (length,))
