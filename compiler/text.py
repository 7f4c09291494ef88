"""Prompts on the way of a compile: typical conditions encoded from them, and the stage that exports text encoders."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import getattr_static
from math import prod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditc.compiler.exporting import parity_of
from ditc.compiler.work import write_json
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import CheckpointError, InputError
from ditc.files import atomic_write
from ditc.host_memory import release_weights, return_free_memory
from ditc.progress import Progress
from ditc.prompt_lists import PromptList, checked_prompts, read_prompts, written_prompts
from ditc.spec import Condition, ModelSpec
from ditc.text_spec import ATTENTION_MASK, INPUT_IDS, TEXT, TextSpec, text_conditions

if TYPE_CHECKING:
    from ditc.exporter.segments import Segment
    from ditc.exporter.text_activations import LargestActivation
    from ditc.exporter.text_encoders import TextEncoder

__all__ = ["NO_TEXT", "EncodedPrompts", "Text", "export_text", "text_of"]

EXAMPLE_BYTES = 256 << 20  # of the conditions that stand for a user's: a prompt of T5-XXL's 300 tokens has 4.9 MB
AT_ONCE = 4  # prompts that torch encodes together
NULL_PROMPT = ""  # guidance leads away from it unless a request says otherwise
SEEN_AT_LEAST = 4  # prompts, where the conditions that they give are a user's own


@dataclass(frozen=True)
class EncodedPrompts:
    """Conditions encoded from `prompts`, a row for each; of their nulls one row, which is the empty prompt's.

    `largest` are the largest activations of each encoder on the way, by its name.
    """

    prompts: PromptList
    arrays: Mapping[str, NDArray[Any]]
    largest: Mapping[str, LargestActivation]


@dataclass(frozen=True)
class Text:
    """The text encoders that a bundle gets, none for most, and the conditions that prompts give.

    `specs` are the encoders as the bundle keeps them. `encoded` is None where nothing gives conditions, or a user gives
    them as arrays.
    """

    encoders: tuple[TextEncoder, ...] = ()
    specs: tuple[TextSpec, ...] = ()  # beside the encoders: one whose weights are released counts none
    encoded: EncodedPrompts | None = None

    @property
    def digests(self) -> list[str]:
        """A digest of each encoder."""
        return [encoder.digest for encoder in self.encoders]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """A line for each assumption about the encoders."""
        return tuple(line for encoder in self.encoders for line in encoder.assumptions)

    @property
    def prompts(self) -> PromptList | None:
        """The prompts that the compile runs on."""
        return None if self.encoded is None else self.encoded.prompts

    def release(self) -> None:
        """Empty the weights of the encoders, which are exported by now."""
        for encoder in self.encoders:
            release_weights(encoder.module)


NO_TEXT = Text()


def text_of(
    model: Any,
    given: Mapping[str, Any] | None,
    prompts: str | PathLike[str] | Sequence[str] | None,
    *,
    wanted: bool,
    progress: Progress,
) -> Text:
    """Return a model's text encoders, where they are wanted, and the conditions that `prompts` give through them.

    `given` are a user's conditions, which come before what prompts give. Raises InputError for an option that would do
    nothing, and CheckpointError for encoders that don't fit their model. A model's own are looked at only here.
    """
    name = model.spec.name
    if not wanted and not _may_have_text(model):
        raise InputError(f"{name} has no text encoders to leave out; leave out --no-text")
    if not wanted and prompts is not None:
        raise InputError("--no-text leaves out what would read --prompts; leave out one, or give --conditions")
    encoders = _encoders_of(model) if wanted and _may_have_text(model) else ()
    if not encoders:
        if prompts is not None:
            raise InputError(f"{name} has no text encoders, so --prompts would do nothing; leave it out")
        return NO_TEXT
    both = sorted(_given_by_text(model.spec, encoders) & set(given or ()))
    if both and prompts is not None:
        raise InputError(f"--prompts and --conditions both give {both[0]!r}; leave out one of the two")
    specs = tuple(encoder.spec for encoder in encoders)
    if both:
        return Text(encoders, specs)
    return Text(encoders, specs, _encoded_prompts(model.spec, encoders, _prompt_list(prompts, model), progress))


def _may_have_text(model: Any) -> bool:
    """Has a model a member that may be its text encoders? One that loads them is not asked for them yet."""
    return isinstance(getattr_static(model, "text", None), (tuple, list, property, cached_property))


def _encoders_of(model: Any) -> tuple[TextEncoder, ...]:
    from ditc.exporter.text_encoders import text_of_model

    return text_of_model(model)


def _prompt_list(given: str | PathLike[str] | Sequence[str] | None, model: Any = None) -> PromptList:
    """Return the prompts of a file or a list; for None what a model is typically asked for, or the shipped ones.

    Raises InputError where there are none, and CheckpointError for examples of a model's that are none.
    """
    if given is None and hasattr(model, "example_prompts"):
        try:
            return PromptList(f"examples of {model.spec.name}", _one_liners(model.example_prompts()))
        except InputError as e:
            raise CheckpointError(f"example_prompts() of {model.spec.name}: {e}") from e
    if given is None:
        from ditc.exporter.shipped_prompts import SHIPPED, shipped_prompts

        return PromptList(SHIPPED, shipped_prompts())
    if isinstance(given, (str, PathLike)):
        return PromptList(Path(given).name, read_prompts(Path(given)))
    return PromptList("a list", _one_liners(given))


def _one_liners(given: Any) -> tuple[str, ...]:
    """Return prompts that a file can hold, a line each. Raises InputError for others."""
    prompts = tuple(checked_prompts("prompts", given))
    written_prompts(prompts)
    return prompts


def _given_by_text(spec: ModelSpec, encoders: Sequence[TextEncoder]) -> set[str]:
    """Return the names of the arrays that prompts give: conditions, and nulls that a request has to bring."""
    return {name for each in _conditions(spec, encoders) for name in (each.name, each.null_name) if name is not None}


def _conditions(spec: ModelSpec, encoders: Sequence[TextEncoder]) -> list[Condition]:
    names = text_conditions([encoder.spec for encoder in encoders])
    return [condition for condition in spec.conditions if condition.name in names]


def _encoded_prompts(
    spec: ModelSpec, encoders: Sequence[TextEncoder], prompts: PromptList, progress: Progress
) -> EncodedPrompts:
    """Encode prompts by torch, as many from the first on as EXAMPLE_BYTES of conditions hold.

    Raises CheckpointError where an encoder gives NaN or infinity.
    """
    conditions = _conditions(spec, encoders)
    sizes = (prod(each.shape) * np.dtype(each.dtype).itemsize for each in conditions)
    prompts = PromptList(prompts.source, prompts.prompts[: max(1, EXAMPLE_BYTES // sum(sizes))])
    texts = (*prompts.prompts, NULL_PROMPT)
    rows: dict[str, NDArray[Any]] = {}
    largest: dict[str, LargestActivation] = {}
    for number, encoder in enumerate(encoders):
        progress("prompts", number, len(encoders))
        own, largest[encoder.name] = _encoded(encoder, texts)
        rows |= own
    progress("prompts", len(encoders), len(encoders))
    arrays = {each.name: rows[each.name][:-1] for each in conditions}
    nulls = {each.null_name: rows[each.name][-1:] for each in conditions if each.null_name is not None}
    return EncodedPrompts(prompts, {**arrays, **nulls}, largest)


def _encoded(encoder: TextEncoder, texts: Sequence[str]) -> tuple[dict[str, NDArray[Any]], LargestActivation]:
    """Return what an encoder gives for texts by the name of the condition, and its largest activation on the way."""
    from ditc.exporter.text_activations import watched_activations

    tokens = encoder.tokenization.tokens(texts)
    parts = defaultdict(list)
    with watched_activations(encoder.module) as largest:
        for first in range(0, len(texts), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            tensors = encoder.tensors(tokens.ids[part], tokens.mask[part])
            for name, tensor in zip(encoder.gives, tensors, strict=True):
                parts[name].append(tensor.numpy())
    if not math.isfinite(largest.value):
        raise CheckpointError(
            f"text encoder {encoder.name} gives NaN or infinity in {largest.path} on prompts of this compile; "
            "it is not usable"
        )
    masks = {} if encoder.mask is None else {encoder.mask: tokens.mask}
    return {**{name: np.concatenate(arrays) for name, arrays in parts.items()}, **masks}, largest


def export_text(text: Text, backend: OnnxRuntimeBackend, folder: Path) -> None:
    """Write each encoder as ONNX, held to torch, and its tokenizer; errors and activations go to text.json."""
    from ditc.exporter.onnx_export import export_segment, whole_graph

    prompts = (_prompt_list(None) if text.prompts is None else text.prompts).prompts
    measured = {}
    for encoder in text.encoders:
        spec, segment = encoder.spec, _segment_of(encoder, prompts)
        largest = (
            _encoded(encoder, prompts[:SEEN_AT_LEAST])[1]
            if text.encoded is None
            else text.encoded.largest[encoder.name]
        )
        path = folder / f"{spec.segment}.onnx"
        export_segment(segment, path, (), whole_graph)
        return_free_memory()
        atomic_write(folder / spec.tokenizer, encoder.json)
        measured[encoder.name] = {
            "parity": parity_of(backend, segment, path),
            "largest_activation": largest.value,
            "largest_at": largest.path,
        }
    write_json(folder / f"{TEXT}.json", measured)


def _segment_of(encoder: TextEncoder, prompts: Sequence[str]) -> Segment:
    """Return the encoder as a segment, with the tokens of two prompts as its example."""
    import torch

    from ditc.exporter.segments import Segment

    tokens = encoder.tokenization.tokens([*prompts[:1], NULL_PROMPT])
    inputs = {INPUT_IDS: torch.from_numpy(tokens.ids), ATTENTION_MASK: torch.from_numpy(tokens.mask)}
    open_dims = {name: {0: "batch"} for name in inputs}
    return Segment(encoder.spec.segment, encoder.module, inputs, encoder.gives, open_dims)
