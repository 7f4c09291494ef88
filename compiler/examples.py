"""Conditions of typical images: what a compile calibrates, fits and verifies with where a request can't be asked for.

The classes of a model take turns, and what prompts give is encoded from prompts. Of other conditions a model may state
examples, or its user gives a file of them; else they are drawn, which is assumed and said: numbers that a model never
meets calibrate it for what it never does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.compiler.text import EncodedPrompts, Text, text_of
from ditc.errors import CheckpointError, InputError
from ditc.progress import Progress, silent
from ditc.requests import Examples, example_names
from ditc.spec import LABEL, ModelSpec

__all__ = ["conditions_of", "examples_of"]

EXAMPLES_ASKED = 64  # of a model that states any
EXAMPLES_DRAWN = 16
SEED = 5_000_003


def conditions_of(
    model: Any,
    given: Mapping[str, Any] | None = None,
    prompts: str | PathLike[str] | Sequence[str] | None = None,
    *,
    wanted: bool = True,
    progress: Progress = silent,
) -> tuple[Text, Examples]:
    """Return a model's text encoders, where wanted, and its examples, whose spec says what was assumed of both.

    `given` are a user's conditions, `prompts` a file or a list. Raises InputError where they don't fit the model.
    """
    text = text_of(model, given, prompts, wanted=wanted, progress=progress)
    examples, assumed = examples_of(model, given, text.encoded)
    if assumed := (*text.assumptions, *assumed):
        spec = model.spec.model_copy(update={"assumptions": (*model.spec.assumptions, *assumed)})
        examples = replace(examples, spec=spec)
    return text, examples


def examples_of(
    model: Any, given: Mapping[str, Any] | None = None, encoded: EncodedPrompts | None = None
) -> tuple[Examples, tuple[str, ...]]:
    """Return a model's examples, and a line for what was assumed of them.

    `given` are a user's, `encoded` those that prompts gave. Raises InputError where they don't fit the model.
    """
    spec = model.spec
    arrays, prompts = ({}, ()) if encoded is None else (dict(encoded.arrays), encoded.prompts.prompts)
    names = [name for name in example_names(spec) if name not in arrays]
    if given is not None:
        return Examples.checked(spec, {**arrays, **given}, prompts), ()
    if names and hasattr(model, "example_conditions"):
        return _stated(model, spec, arrays, prompts), ()
    examples = Examples.checked(spec, {**arrays, **{name: _drawn(spec, name) for name in names}}, prompts)
    if not names:
        return examples, ()
    return examples, (
        f"what {', '.join(names)} typically hold is unknown: calibrated and verified on random numbers; give real ones "
        "with --conditions, or in the model's example_conditions()",
    )


def _stated(model: Any, spec: ModelSpec, arrays: Mapping[str, NDArray[Any]], prompts: tuple[str, ...]) -> Examples:
    tensors = model.example_conditions(EXAMPLES_ASKED)
    stated = {name: np.asarray(tensor.detach().cpu()) for name, tensor in tensors.items() if name != LABEL}
    try:
        return Examples.checked(spec, {**stated, **arrays}, prompts)
    except InputError as e:
        raise CheckpointError(f"example_conditions() doesn't fit its model: {e}") from e


def _drawn(spec: ModelSpec, name: str) -> NDArray[Any]:
    """Unit normal noise, or integers in turn, (EXAMPLES_DRAWN, *shape)."""
    condition = next(each for each in spec.inputs if name in (each.name, each.null_name))
    shape = (EXAMPLES_DRAWN, *condition.shape)
    if condition.classes is not None:
        return (np.arange(np.prod(shape)) % condition.classes).reshape(shape)
    return np.random.default_rng([SEED, *name.encode()]).standard_normal(shape, np.float32)
