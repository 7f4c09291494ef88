"""Requests: the conditions that images are asked for with, as arrays by name; and those that stand for typical ones.

A condition's array has a row for each image, (n, *shape); one that is fresh noise has them for every step, (steps, n,
*shape). What the unconditional half of guidance gets in place of a condition is `Guidance`'s, unless a request gives it
under GIVEN_NULL and the condition's name.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError
from ditc.spec import LABEL, NO_CONDITION, Condition, ModelSpec

__all__ = [
    "Arrays",
    "Examples",
    "Request",
    "check_conditions",
    "example_names",
    "given_names",
    "read_conditions",
    "whole_numbers",
]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Request:
    """The conditions of `count` images, by name. Made by `Request.of`, which holds them to the model.

    `prompts` and `negatives` are the texts that conditions were encoded from, one for each image; none of arrays.
    """

    count: int
    arrays: Arrays
    prompts: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()

    @staticmethod
    def of(
        spec: ModelSpec,
        labels: Sequence[int] | None = None,
        conditions: Mapping[str, Any] | None = None,
        count: int | None = None,
    ) -> Request:
        """Return the request of some images: their classes, and arrays of all other conditions.

        `count` is needed where nothing else tells how many. Raises InputError for a class or a condition that the
        model doesn't have, one that is missing, and arrays of another type, shape or number of rows.
        """
        check_conditions(conditions)
        given = dict(conditions or {})
        if labels is not None and LABEL in given:
            raise InputError(f"give the classes as labels, or as the condition {LABEL!r}; found both")
        if labels is not None or (spec.num_classes is not None and LABEL not in given):
            given[LABEL] = _labels(spec, labels)
        arrays = {name: checked_array(spec, name, array) for name, array in given.items()}
        missing = [name for name in given_names(spec) if name not in arrays]
        if missing:
            raise InputError(
                f"{spec.name} needs {' and '.join(map(repr, missing))} of every image, found "
                f"{', '.join(map(repr, arrays)) or 'no condition'}; give an array of each, see `ditc inspect`"
            )
        rows = {name: len(array) for name, array in arrays.items()}
        numbers = {*rows.values(), *whole_numbers("count", [] if count is None else [count], "4")}
        if len(numbers) > 1:
            asked = "" if count is None else f", and {count} images are asked for"
            told = ", ".join(f"{name} has {n}" for name, n in rows.items())
            raise InputError(f"every condition needs a row for each image: {told}{asked}")
        if not numbers or min(numbers) < 1:
            raise InputError(f"{spec.name} was asked for no image; give count=1 or more")
        return Request(numbers.pop(), arrays)

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> list[int]:
        """The class of each image; 0 for a model without classes."""
        return [0] * self.count if LABEL not in self.arrays else [int(label) for label in self.arrays[LABEL]]

    def with_fresh(self, arrays: Arrays) -> Request:
        """Return the request with the noise of its conditions that are fresh at every step."""
        return replace(self, arrays={**self.arrays, **arrays}) if arrays else self

    def take(self, spec: ModelSpec, places: slice | Sequence[int] | NDArray[np.int64]) -> Request:
        """Return the request of some of the images, by their places."""
        fresh = {condition.name for condition in spec.conditions if condition.fresh}
        arrays = {name: array[:, places] if name in fresh else array[places] for name, array in self.arrays.items()}
        numbers = np.arange(self.count)[places]
        return Request(len(numbers), arrays, *(_in_turn(texts, numbers) for texts in (self.prompts, self.negatives)))

    def filled(self, spec: ModelSpec, count: int) -> Request:
        """Return a request of `count` images: these, repeated in turn."""
        return self if count == self.count else self.take(spec, np.resize(np.arange(self.count), count))

    def rows(self, condition: Condition) -> NDArray[Any]:
        """Return what the network takes of a condition for the images, (n, *shape), or (steps, n, *shape)."""
        if condition.name == NO_CONDITION.name:
            return np.zeros(self.count, np.int64)
        return self.arrays[condition.name]


def check_conditions(conditions: Any) -> None:
    """Raise InputError for conditions that are no arrays by name; None are none."""
    if conditions is not None and not isinstance(conditions, Mapping):
        raise InputError(f"conditions must be arrays by name, found {type(conditions).__name__}; give a dict")


def given_names(spec: ModelSpec) -> list[str]:
    """Return the names of the arrays that a request has to bring: conditions, and nulls that nobody else gives."""
    names = [name for each in spec.inputs if not each.fresh for name in (each.name, each.null_name)]
    return [name for name in names if name is not None]


def example_names(spec: ModelSpec) -> list[str]:
    """Return the names of the arrays that examples have: all that a request brings but the class."""
    return [name for name in given_names(spec) if name != LABEL]


def _in_turn(texts: Sequence[str], places: NDArray[np.int64]) -> tuple[str, ...]:
    """Return the texts at places, as often as they take turns; none where there are none."""
    return tuple(texts[place % len(texts)] for place in places) if texts else ()


def _labels(spec: ModelSpec, labels: Any) -> NDArray[np.int64]:
    numbers = whole_numbers("labels", () if labels is None else labels, "[3, 1, 4]")
    spec.check_labels(tuple(numbers))
    return np.array(numbers, np.int64)


def checked_array(spec: ModelSpec, name: str, array: Any) -> NDArray[Any]:
    """An array of a condition, in its type. Raises InputError where it doesn't fit."""
    known = {each: condition for condition in spec.inputs for each in (condition.name, condition.null_name)}
    condition = known.get(name)
    if condition is None or condition.fresh:
        kinds = ", ".join(map(repr, given_names(spec))) or "none"
        drawn = "draws it itself" if condition is not None else "has no such condition"
        raise InputError(f"{name!r} was given, and {spec.name} {drawn}; expected conditions: {kinds}")
    try:
        values = np.asarray(array)
    except ValueError as e:
        raise InputError(f"condition {name!r} is no array ({e}); give one of equal rows") from e
    wanted = "iu" if condition.dtype == "int64" else "fiu"
    if values.dtype.kind not in wanted or values.shape[1:] != condition.shape or not values.ndim:
        shape = ", ".join(map(str, ("n", *condition.shape)))
        raise InputError(
            f"condition {name!r} must be {condition.dtype} of shape ({shape}), found {values.dtype} {values.shape}"
        )
    with np.errstate(over="ignore"):  # what is too large is refused below
        values = np.ascontiguousarray(values, condition.dtype)
    if condition.classes is not None and values.size and not 0 <= values.min() <= values.max() < condition.classes:
        raise InputError(
            f"condition {name!r} holds {values.min()} to {values.max()}, expected 0 to {condition.classes - 1}"
        )
    if condition.classes is None and not np.isfinite(values).all():
        raise InputError(f"condition {name!r} holds NaN or infinite numbers")
    return values


def whole_numbers(name: str, values: Iterable[Any], example: str) -> list[int]:
    """Python's integers of any kind of them. Raises InputError for fractions, texts and nested rows."""
    try:
        return [index(value) for value in values]
    except TypeError as e:
        shown = " ".join(repr(values).split())
        raise InputError(f"{name} must be whole numbers, for example {example}; found {shown:.60}") from e


def read_conditions(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, by name. Raises InputError where it can't be read."""
    expected = "expected an .npz file with an array for each, as np.savez writes"
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{path} holds one array without a name; {expected}")
        with file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
        raise InputError(f"can't read conditions from {path} ({e}); {expected}") from e


@dataclass(frozen=True, eq=False)
class Examples:
    """The conditions of typical images, which stand for a user's where none are given: image i takes row i in turn.

    `arrays` are those of every condition but the class, (examples, *shape) each; the classes take turns by themselves.
    `prompts` are the texts that some of them were encoded from, row by row.
    """

    spec: ModelSpec
    arrays: Arrays
    prompts: tuple[str, ...] = ()

    @staticmethod
    def checked(spec: ModelSpec, arrays: Mapping[str, Any], prompts: tuple[str, ...] = ()) -> Examples:
        """Return examples, held to the model. Raises InputError where an array is missing, or of another form."""
        values = {name: checked_array(spec, name, array) for name, array in arrays.items()}
        names = example_names(spec)
        if values.keys() != {*names} or any(not len(array) for array in values.values()):
            told = ", ".join(f"{name} of {len(array)} rows" for name, array in values.items()) or "none"
            raise InputError(
                f"{spec.name} needs examples of {' and '.join(map(repr, names)) or 'nothing'}, found {told}"
            )
        return Examples(spec, values, prompts)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each array, in hex; empty for a model of classes alone."""
        return {
            name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
            for name, array in self.arrays.items()
        }

    def of(self, numbers: Sequence[int] | NDArray[np.int64], labels: Sequence[int] | None = None) -> Request:
        """Return the request of images by their numbers; their classes take turns unless they are given."""
        places = np.asarray(numbers, np.int64)
        arrays = {name: array[places % len(array)] for name, array in self.arrays.items()}
        if self.spec.num_classes is not None:
            own = places % self.spec.num_classes if labels is None else labels
            arrays[LABEL] = np.asarray(own, np.int64)
        return Request(len(places), arrays, _in_turn(self.prompts, places))

    def in_turn(self, first: int, count: int) -> Request:
        """Return the request of images `first` to `first + count`."""
        return self.of(range(first, first + count))
