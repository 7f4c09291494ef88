"""The real emoji that the package holds features of, and the classifier that pictures are measured by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ditc.exporter.emoji_kinds import KINDS
from ditc.quality.emoji_pictures import EmojiPictures, emoji_classifier, emoji_pictures

EXPORTER = Path(__file__).parents[2] / "exporter"
FILES = "emoji_classifier.safetensors", "emoji_features.safetensors", "emoji_pictures.tsv"


@pytest.fixture(scope="module")
def pictures() -> EmojiPictures:
    return emoji_pictures()


def test_every_picture_has_a_caption_a_kind_a_side_and_features(pictures: EmojiPictures) -> None:
    assert pictures.features.shape == (3781, 64)
    assert (pictures.held_out.sum(), (~pictures.held_out).sum()) == (379, 3402)
    assert set(pictures.kinds) == set(KINDS)
    assert np.isfinite(pictures.features).all()
    assert len(set(pictures.captions)) > 3700
    assert {"red heart", "grinning face", "waving hand, dark skin tone", "flag of japan"} <= set(pictures.captions)


def test_the_classifier_is_as_right_on_the_real_pictures_as_its_card_says(pictures: EmojiPictures) -> None:
    right = emoji_classifier().classes(np.float32(pictures.features)) == pictures.classes
    shares = {"train": float(right[~pictures.held_out].mean()), "held_out": float(right[pictures.held_out].mean())}
    recorded = json.loads((EXPORTER / "emoji_classifier.training.json").read_text())
    card = (EXPORTER / "emoji_classifier.md").read_text()
    for side, share in shares.items():
        assert share == pytest.approx(recorded[side]["right"], abs=0.003)  # features were rounded
        assert f"{recorded[side]['right']:.1%}".replace("%", " %") in card


def test_the_classifier_takes_the_models_pictures() -> None:
    features = emoji_classifier().features(np.zeros((2, 3, 32, 32), np.float32))
    assert features.shape == (2, 64)
    assert (features >= 0).all()


def test_the_files_are_small() -> None:
    sizes = [(EXPORTER / name).stat().st_size for name in FILES]
    assert sizes[0] < 300_000
    assert sum(sizes) < 1_000_000
