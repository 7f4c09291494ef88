"""Features that generated images are measured by: a table of extractors, and where real images come from."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import read_tables
from ditc.errors import InputError, unknown_name
from ditc.quality.classifier import Classifier
from ditc.quality.distributions import FeatureArray, frechet_distance
from ditc.quality.emoji_pictures import EMOJI_SHAPE, emoji_classifier, emoji_pictures, kinds_of_captions
from ditc.runtime.executor import Samples
from ditc.spec import Record

__all__ = [
    "FEATURES",
    "DigitQuality",
    "Extractor",
    "RealFeatures",
    "check_sources",
    "default_extractor",
    "default_real",
    "digit_quality",
    "open_extractor",
    "real_digits",
    "real_features",
]

Shape = tuple[int, ...]  # (channels, height, width)

DIGITS, EMOJI = "digits", "emoji"
DIGITS_SHAPE = (1, 8, 8)
OWN_SHAPES: dict[str, Shape] = {DIGITS: DIGITS_SHAPE, EMOJI: EMOJI_SHAPE}  # of the models that have real images here
MOST_PIXELS = 1024  # a Frechet distance over more pixels would need more images than anyone draws
READ_AT_ONCE = 64
PICTURES = (".png", ".jpg", ".jpeg")
NO_NPZ = (ValueError, OSError, EOFError, zipfile.BadZipFile)  # what NumPy says of one that is broken


@dataclass(frozen=True)
class Extractor:
    """Features of images in [-1, 1]: (n, channels, height, width) -> (n, features).

    `classes` names the class of each image from its features, (n,); None where the network knows no such classes.
    `asked` names the classes of prompts, (n,), or None where one of them says of no class; for models of prompts.
    """

    name: str
    about: str
    features: Callable[[Samples], FeatureArray]
    classes: Callable[[FeatureArray], NDArray[np.int64]] | None = None
    asked: Callable[[Sequence[str]], NDArray[np.int64] | None] | None = None


def _check_own(name: str, shape: Shape) -> None:
    if shape != OWN_SHAPES[name]:
        raise InputError(f"features {name!r} take images of shape {OWN_SHAPES[name]}, found {shape}; choose others")


def _digits(shape: Shape) -> Extractor:
    _check_own(DIGITS, shape)
    with as_file(files("ditc.exporter") / "digit_classifier.safetensors") as path:
        network = Classifier.from_tensors(read_tables(path))
    about = "last hidden layer of a classifier trained on the real digits (exporter/digit_classifier.md)"
    return Extractor(DIGITS, about, network.features, network.classes)


def _emoji(shape: Shape) -> Extractor:
    _check_own(EMOJI, shape)
    network = emoji_classifier()
    about = "last hidden layer of a classifier of sixteen kinds of emoji (exporter/emoji_classifier.md)"
    return Extractor(EMOJI, about, network.features, network.classes, kinds_of_captions)


def _pixels(shape: Shape) -> Extractor:
    if prod(shape) > MOST_PIXELS:
        raise InputError(f"features 'pixels' are for images of up to {MOST_PIXELS} numbers, found {prod(shape)}")
    return Extractor("pixels", "the pixels themselves", lambda images: np.clip(images, -1, 1).reshape(len(images), -1))


def _inception(shape: Shape) -> Extractor:
    from ditc.quality.pretrained import inception_features

    about = "pool3 of Inception v3, 2,048 numbers, as torch-fidelity computes them"
    return Extractor("inception", about, inception_features())


FEATURES: dict[str, Callable[[Shape], Extractor]] = {
    DIGITS: _digits,
    EMOJI: _emoji,
    "pixels": _pixels,
    "inception": _inception,
}


def open_extractor(name: str, shape: Shape) -> Extractor:
    """Open the extractor of a name for images of a shape; raises InputError where it doesn't fit or isn't installed."""
    if name not in FEATURES:
        raise unknown_name("features", name, FEATURES)
    return FEATURES[name](shape)


def check_sources(features: str | None, real: str | None) -> None:
    """Raise InputError where features are unknown or not installed, or real images are not there.

    None is the model's own. Whether they fit its images is seen when there are some.
    """
    if features is not None and features not in FEATURES:
        raise unknown_name("features", features, FEATURES)
    if features == "inception":
        from ditc.quality.pretrained import check_inception

        check_inception()
    if real is not None and real not in (*OWN_SHAPES, "fp"):
        _real_path(real)


def default_extractor(model: str, shape: Shape) -> str:
    """Name the extractor: a built-in model has its own, small images are their own, others take Inception's."""
    if OWN_SHAPES.get(model) == shape:
        return model
    return "pixels" if prod(shape) <= MOST_PIXELS else "inception"


def default_real(model: str, shape: Shape) -> str:
    """Name real images: those of a built-in model, else FP of other noise: no model says what it was trained on."""
    return model if OWN_SHAPES.get(model) == shape else "fp"


@dataclass(frozen=True)
class RealFeatures:
    """Features of real images, (n, features), and where those came from."""

    about: str
    features: FeatureArray


def real_features(source: str, extractor: Extractor, shape: Shape) -> RealFeatures:
    """Return features of the images that `source` names.

    "digits", "emoji" (features of their own classifier), a folder of pictures of the model's size, or an .npz file: of
    images as `arr_0`, uint8 (n, height, width, channels), or of `features` with the `extractor` that made them.
    """
    if source in OWN_SHAPES and shape != OWN_SHAPES[source]:
        raise InputError(
            f"the real {source} have shape {OWN_SHAPES[source]}, this model makes {shape}; name other images"
        )
    if source == DIGITS:
        images, _ = real_digits()
        return RealFeatures(f"scikit-learn's {len(images):,} digits", extractor.features(images))
    if source == EMOJI:
        if extractor.name != EMOJI:
            raise InputError(
                f"of the real emoji there are features of their classifier alone, found features {extractor.name!r}; "
                "leave --features out, or name a folder of pictures with --real"
            )
        features = emoji_pictures().features
        return RealFeatures(f"Noto's {len(features):,} emoji", features)
    path = _real_path(source)
    return (_features_of_folder if path.is_dir() else _features_of_npz)(path, extractor, shape)


def _real_path(source: str) -> Path:
    """Return a folder that holds pictures, or an .npz file that holds what is needed."""
    path = Path(source)
    if source and path.is_dir():
        _pictures(path)
    elif path.suffix == ".npz" and path.is_file():
        _open_npz(path).close()
    else:
        raise InputError(f"--real takes fp, digits, emoji, a folder of pictures or an .npz file, found {source!r}")
    return path


def _pictures(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not paths:
        raise InputError(f"{folder} holds no pictures; expected files ending in {', '.join(PICTURES)}")
    return paths


def _open_npz(path: Path) -> np.lib.npyio.NpzFile:
    try:
        arrays = np.load(path, allow_pickle=False)
    except NO_NPZ as e:
        raise InputError(f"{path} is not an .npz file of plain arrays ({e}); write it again") from e
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise InputError(f"{path} holds one array, not an .npz file of named ones; write it with numpy.savez")
    if not {"features", "arr_0"} & set(arrays.files):
        arrays.close()
        raise InputError(f"{path} holds neither 'features' nor images as 'arr_0'; see docs/evaluating.md")
    return arrays


def real_digits() -> tuple[Samples, NDArray[np.int64]]:
    """Load scikit-learn's digits: images (1797, 1, 8, 8) in [-1, 1], and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise InputError(
            "the real digits come with scikit-learn; install it with: pip install scikit-learn, or name the "
            "real.npz of an earlier `ditc evaluate --save` with --real"
        ) from e

    digits = load_digits()
    return np.asarray(digits.images[:, None] / 8.0 - 1.0, np.float32), np.asarray(digits.target, np.int64)


class DigitQuality(Record):
    """Frechet distances to the real digits, of pixels and of the classifier's features; the share of right classes."""

    frechet_distance: float
    frechet_distance_classifier: float
    class_agreement: float


def digit_quality(images: Samples, labels: NDArray[np.int64]) -> DigitQuality:
    """Measure generated digits, (n, 1, 8, 8), against the real ones, and the share that shows its label, (n,).

    The Frechet distance is over the 64 pixels, and over the classifier's 64 features.
    """
    classifier, pixels = open_extractor(DIGITS, DIGITS_SHAPE), open_extractor("pixels", DIGITS_SHAPE)
    real, _ = real_digits()
    assert classifier.classes is not None
    features = classifier.features(images)
    return DigitQuality(
        frechet_distance=frechet_distance(pixels.features(images), pixels.features(real)),
        frechet_distance_classifier=frechet_distance(features, classifier.features(real)),
        class_agreement=float((classifier.classes(features) == labels).mean()),
    )


def _features_of_folder(folder: Path, extractor: Extractor, shape: Shape) -> RealFeatures:
    paths = _pictures(folder)
    parts = [
        extractor.features(np.stack([_picture(path, shape) for path in paths[start : start + READ_AT_ONCE]]))
        for start in range(0, len(paths), READ_AT_ONCE)
    ]
    return RealFeatures(f"{len(paths):,} pictures of {folder.name}", np.concatenate(parts))


def _picture(path: Path, shape: Shape) -> Samples:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("L" if shape[0] == 1 else "RGB"), np.float32)
    except (UnidentifiedImageError, OSError) as e:
        raise InputError(f"{path} is not a picture that can be read; remove it or save it again") from e
    image = np.moveaxis(pixels.reshape(*pixels.shape[:2], -1), -1, 0) / np.float32(127.5) - 1
    if image.shape != shape:
        raise InputError(f"{path} has shape {image.shape}, this model makes {shape}; resize the pictures first")
    return np.asarray(image, np.float32)


def _features_of_npz(path: Path, extractor: Extractor, shape: Shape) -> RealFeatures:
    try:
        with _open_npz(path) as arrays:
            stored = {name: arrays[name] for name in ("features", "extractor", "arr_0") if name in arrays}
    except NO_NPZ as e:
        raise InputError(f"{path} is not an .npz file of plain arrays ({e}); write it again") from e
    if "features" in stored:
        made_by = str(stored.get("extractor", ""))
        if made_by != extractor.name:
            raise InputError(f"{path} holds features of {made_by!r}, these are {extractor.name!r}; set --features")
        return RealFeatures(f"{len(stored['features']):,} images of {path.name}", stored["features"])
    images = stored["arr_0"]
    return RealFeatures(f"{len(images):,} images of {path.name}", _features_of_bytes(path, images, extractor, shape))


def _features_of_bytes(path: Path, images: NDArray[Any], extractor: Extractor, shape: Shape) -> FeatureArray:
    channels, height, width = shape
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
        expected = f"uint8 (n, {height}, {width}, {channels})"
        raise InputError(f"{path}: expected images as {expected}, found {images.dtype} {images.shape}")
    parts = []
    for start in range(0, len(images), READ_AT_ONCE):
        part = np.moveaxis(images[start : start + READ_AT_ONCE], -1, 1)
        parts.append(extractor.features(np.asarray(part / np.float32(127.5) - 1, np.float32)))
    return np.concatenate(parts)
