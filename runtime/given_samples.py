"""Files of what a request begins with in place of noise: a picture, or samples as arrays."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import InputError
from ditc.guidance import Samples
from ditc.spec import ModelSpec

__all__ = ["read_samples"]

ARRAYS = (b"\x93NUMPY", b"PK")  # the first bytes of .npy and .npz files; any other file is a picture
LATENTS = "latents"  # the array of an .npz file that is taken where there are several
MODES = {1: "L", 3: "RGB"}  # channels -> the mode of a picture that has them
MODE_NAMES = {1: "grey", 3: "RGB without transparency"}


def read_samples(path: Path, spec: ModelSpec, count: int, *, decodes: bool) -> Samples:
    """Return finished samples for `count` images, float32 (count, channels, *space), from a file.

    It is a picture of the model's own size, where the model works on pixels, or an array of one sample or of one for
    each image, in the scale of the samples (`pipe.latents`), whatever the file's name. `decodes` says that a decoder
    makes the images, so that pictures are none. Raises InputError for what can't be read, or is of another form.
    """
    try:
        with path.open("rb") as file:
            first_bytes = file.read(max(map(len, ARRAYS)))
    except OSError as e:
        raise InputError(f"can't read {path}: {e.strerror or e}; give a picture, or an .npy or .npz file") from e
    if first_bytes.startswith(ARRAYS):
        samples = _checked_array(path, _array(path), spec)
    elif decodes or not spec.is_picture:
        raise InputError(
            f"{path} is no .npy or .npz file, and {spec.name} works on latents and has no encoder for pictures; give "
            f"latents of shape {spec.latent_shape} as pipe.latents() returns them, saved with np.save"
        )
    else:
        samples = _picture(path, spec)
    if len(samples) not in (1, count):
        raise InputError(f"{path} holds {len(samples)} samples for {count} images; give one, or one for each image")
    return np.repeat(samples, count, axis=0) if len(samples) < count else samples


def _array(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:  # NumPy leaves one that it opened itself open where it can't read it
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                return stored
            names = stored.files
            if len(names) != 1 and LATENTS not in names:
                raise InputError(
                    f"{path} holds {', '.join(map(repr, names)) or 'no array'}; expected one array, or one that is "
                    f"called {LATENTS!r}"
                )
            array: NDArray[Any] = stored[LATENTS if LATENTS in names else names[0]]
            return array
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
        raise InputError(f"can't read arrays from {path} ({e}); write it with np.save or np.savez") from e


def _checked_array(path: Path, array: NDArray[Any], spec: ModelSpec) -> Samples:
    shape = spec.latent_shape
    if array.dtype.kind != "f" or array.shape[-len(shape) :] != shape or array.ndim - len(shape) not in (0, 1):
        raise InputError(
            f"{path} holds {array.dtype} of shape {array.shape}, expected floats of shape {shape} or (n, "
            f"{', '.join(map(str, shape))}), in the scale of pipe.latents()"
        )
    return np.asarray(array.reshape(-1, *shape), np.float32)


def _picture(path: Path, spec: ModelSpec) -> Samples:
    """A picture as one sample in [-1, 1], (1, channels, height, width)."""
    from PIL import Image, UnidentifiedImageError

    channels, height, width = spec.latent_shape
    try:
        with Image.open(path) as opened:
            mode, size, pixels = opened.mode, opened.size, np.asarray(opened, np.float32)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"{path} is no picture that can be read, nor an .npy or .npz file; save it as PNG") from e
    if mode != MODES[channels] or size != (width, height):
        raise InputError(
            f"{path} is a picture of {size[0]} x {size[1]} pixels, mode {mode}, and {spec.name} works on {width} x "
            f"{height}, mode {MODES[channels]} ({MODE_NAMES[channels]}); save it so"
        )
    sample = np.moveaxis(pixels.reshape(height, width, channels), -1, 0)[None] / np.float32(127.5) - 1
    return np.asarray(sample, np.float32)
