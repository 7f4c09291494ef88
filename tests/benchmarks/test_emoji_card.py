"""The ground of `benchmarks/emoji_card.py`: nearest pictures, sides of equal number, rows of a sheet."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from ditc.exporter.emoji_data import Emoji, Split
from ditc.exporter.emoji_model import EmojiModel, TextIds, train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return __import__("emoji_card")


def emoji(number: int, side: str) -> Emoji:
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    return Emoji(f"{side} {number}", pixels, (f"{side} {number}",), "Flags", "flag", f"{side} {number}", "", 1)


@pytest.fixture
def split() -> Split:
    train, held_out = ([emoji(number, side) for number in range(count)] for side, count in (("train", 50), ("held", 5)))
    return Split(tuple(train), tuple(held_out))


def test_a_copy_is_at_no_distance_and_a_shift_of_all_pixels_at_its_size(card: ModuleType) -> None:
    training = np.random.default_rng(0).uniform(-1, 1, (20, 3, 32, 32)).astype(np.float32)
    distances, places = card.nearest(np.stack([training[7], training[3] + 0.25]), training)
    assert places.tolist() == [7, 3]
    assert distances == pytest.approx([0, 0.25], abs=1e-6)


def test_as_many_training_captions_as_held_out_ones_are_drawn(card: ModuleType, split: Split) -> None:
    sides = card.sides_of(split, None)
    assert sides["held_out"].captions == [f"held {number}" for number in range(5)]
    assert sides["train"].captions == [f"train {number}" for number in (0, 10, 20, 30, 40)]
    assert [len(side.emoji) for side in card.sides_of(split, 2).values()] == [2, 2]


def test_real_pictures_are_compared_without_an_activity_on_both_sides(card: ModuleType) -> None:
    many = tuple(emoji(number, "thing") for number in range(300))
    features = np.random.default_rng(0).standard_normal((300, 4))
    spread = card.real_distances(many, features, 20)
    assert list(spread) == ["5 %", "25 %", "50 %", "75 %", "95 %"]
    assert 0 < spread["5 %"] < spread["95 %"] < 10
    assert card.real_distances(many, np.repeat(features, 3, axis=1)[:, ::3], 20) == spread


def test_a_sheet_shows_rows_as_they_are_with_a_line_between_groups(card: ModuleType, tmp_path: Path) -> None:
    black, white = (np.full((card.COLUMNS, 3, 32, 32), value, np.float32) for value in (-1, 1))
    card.sheet([black, white[:0], white], tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (3 * (32 + 4 + 32), 3 * 32 * card.COLUMNS, 3)
    assert [int(pixels[row, 0, 0]) for row in (0, 3 * 34, 3 * 40)] == [0, 160, 255]


def test_guidance_goes_beyond_the_prompt_and_the_flow_is_walked_to_its_end(card: ModuleType) -> None:
    class Constant(EmojiModel):
        """The flow of a picture of one grey: 0.2 without words, 0.3 with some."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, x: torch.Tensor, sigma: torch.Tensor, text: TextIds) -> torch.Tensor:
            grey = torch.where(text.mask.sum(dim=1) > 1, 0.3, 0.2)[:, None, None, None]
            return (x - grey) / sigma.clamp_min(1e-6)[:, None, None, None]

    tokenizer = train_tokenizer(["a red apple", "flag"], size=60)
    plain, guided = (card.sample(Constant(), tokenizer, ["flag", "a red apple"], g, 5, 0) for g in (1.0, 3.0))
    assert plain == pytest.approx(0.3, abs=1e-3)
    assert guided == pytest.approx(0.5, abs=1e-3)
