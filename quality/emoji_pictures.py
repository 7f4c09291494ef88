"""Noto's emoji as pictures of the text-to-image model are measured against them: captions, kinds, and features.

The pictures themselves stay out of the package; `ditc.exporter.train_emoji_classifier` writes what is read here.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import read_tables
from ditc.exporter.emoji_kinds import KINDS
from ditc.quality.classifier import Classifier
from ditc.quality.distributions import FeatureArray

__all__ = ["EmojiPictures", "emoji_classifier", "emoji_pictures"]

HELD_OUT = "held out"


@dataclass(frozen=True)
class EmojiPictures:
    """Real pictures, each with its caption, its kind, and whether it is of the training or held out, in one order.

    `features` are the classifier's, (n, 64) in float16.
    """

    captions: tuple[str, ...]
    kinds: tuple[str, ...]
    sides: tuple[str, ...]
    features: FeatureArray

    def __post_init__(self) -> None:
        counts = {len(self.captions), len(self.kinds), len(self.sides), len(self.features)}
        assert len(counts) == 1, counts

    @cached_property
    def held_out(self) -> NDArray[np.bool_]:
        """Those that no training has seen, (n,)."""
        return np.array([side == HELD_OUT for side in self.sides])

    @cached_property
    def classes(self) -> NDArray[np.int64]:
        """Number of each picture's kind, (n,), as the classifier counts them."""
        return np.array([KINDS.index(kind) for kind in self.kinds])


def emoji_classifier() -> Classifier:
    """Open the classifier: (n, 3, 32, 32) in [-1, 1] -> 64 features, and from these the numbers of 16 kinds."""
    with as_file(files("ditc.exporter") / "emoji_classifier.safetensors") as path:
        return Classifier.from_tensors(read_tables(path))


def emoji_pictures() -> EmojiPictures:
    """Read what the package holds of all 3,781 pictures."""
    folder = files("ditc.exporter")
    with (folder / "emoji_pictures.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with as_file(folder / "emoji_features.safetensors") as path:
        features = read_tables(path)["features"]
    captions, kinds, sides = (tuple(row[name] for row in rows) for name in ("caption", "kind", "side"))
    return EmojiPictures(captions, kinds, sides, features)
