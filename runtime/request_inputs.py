"""Arrays and seeds that a request is given, and what they have to be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditc.errors import InputError
from ditc.requests import whole_numbers

__all__ = ["check_noise", "image_streams"]


def check_noise(noise: object, count: int | None, name: str = "noise") -> None:
    """Raise InputError unless noise, where it is given, is an array of numbers with a sample for each of the images.

    A `count` of None is any.
    """
    if noise is None:
        return
    if not isinstance(noise, np.ndarray) or noise.dtype.kind not in "fiu":
        kind = noise.dtype if isinstance(noise, np.ndarray) else type(noise).__name__
        raise InputError(f"{name} must be a NumPy array of float32, found {kind}; take np.asarray(..., np.float32)")
    if not noise.ndim or (count is not None and len(noise) != count):
        raise InputError(f"{name} must have one sample per image: {count} images, found {len(np.atleast_1d(noise))}")


def image_streams(count: int, seed: int | None, seeds: Sequence[int] | None, first: int) -> list[tuple[int, int]]:
    """(seed, number of the image) of each of `count` images. Raises InputError for seeds that don't fit."""
    if seeds is None:
        number, start = whole_numbers("seed and first", [0 if seed is None else seed, first], "7 and 0")
        return [(number, start + place) for place in range(count)]
    if seed is not None or first:
        raise InputError("give seed and first, or seeds with one seed for each image; found both")
    own = whole_numbers("seeds", seeds, "[7, 5]")
    if len(own) != count:
        raise InputError(f"seeds must be one for each image: {count} images, found {len(own)} seeds")
    return [(image_seed, 0) for image_seed in own]
