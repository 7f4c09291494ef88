"""Noto's emoji as pictures of the text-to-image model are measured against them: captions, kinds, and features.

The pictures themselves stay out of the package; `ditc.exporter.train_emoji_classifier` writes what is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import read_tables
from ditc.exporter.emoji_kinds import KINDS
from ditc.exporter.emoji_rows import emoji_rows
from ditc.quality.classifier import Classifier
from ditc.quality.distributions import FeatureArray

__all__ = ["EMOJI_SHAPE", "EmojiPictures", "emoji_classifier", "emoji_pictures", "kinds_of_captions"]

EMOJI_SHAPE = (3, 32, 32)

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
    with as_file(files("ditc.exporter") / "emoji_features.safetensors") as path:
        features = read_tables(path)["features"]
    captions, kinds, sides = zip(*emoji_rows(), strict=True)
    return EmojiPictures(captions, kinds, sides, features)


def kinds_of_captions(prompts: Sequence[str]) -> NDArray[np.int64] | None:
    """Return the number of each prompt's kind, (n,); None where one of them is no caption of a picture."""
    kinds = {row.caption: KINDS.index(row.kind) for row in emoji_rows()}
    if not prompts or not kinds.keys() >= set(prompts):
        return None
    return np.array([kinds[prompt] for prompt in prompts])
