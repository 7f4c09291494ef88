"""The classifier of emoji: what torch trains is what NumPy runs, and its card tells what its record holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ditc.exporter.emoji_data import Emoji
from ditc.exporter.emoji_kinds import BY_CATEGORY, BY_SUBCATEGORY, KINDS, kind_of
from ditc.exporter.train_emoji_classifier import (
    Labelled,
    accuracy,
    classifier,
    labelled,
    tensors_of,
    train,
    varied,
    write_pictures,
)
from ditc.quality.classifier import Classifier


def emoji(number: int, category: str, subcategory: str, variants: int = 1) -> Emoji:
    """A picture of one colour."""
    pixels = np.full((32, 32, 3), 40 * number, np.uint8)
    return Emoji(f"{number}.png", pixels, (f"thing {number}",), category, subcategory, f"thing {number}", "", variants)


@pytest.mark.parametrize(
    ("category", "subcategory", "kind"),
    [
        ("People & Body", "person-sport", "activity"),
        ("People & Body", "person-role", "person"),
        ("People & Body", "person-symbol", "sign"),
        ("People & Body", "hands", "hand"),
        ("People & Body", "family", "couple"),
        ("Smileys & Emotion", "face-hat", "smiley"),
        ("Smileys & Emotion", "monkey-face", "animal"),
        ("Travel & Places", "transport-air", "vehicle"),
        ("Symbols", "transport-sign", "sign"),
        ("Travel & Places", "place-map", "place"),
        ("Activities", "sport", "object"),
    ],
)
def test_a_kind_is_what_a_picture_looks_like(category: str, subcategory: str, kind: str) -> None:
    assert kind_of(category, subcategory) == kind


def test_every_kind_has_a_place_and_a_narrower_group_stands_before_a_wider_one() -> None:
    assert len(KINDS) == 16
    assert {*BY_SUBCATEGORY.values(), *BY_CATEGORY.values()} == set(KINDS)
    names = list(BY_SUBCATEGORY)
    hidden = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if b.startswith(a)]
    assert hidden == []


def test_numpy_computes_what_torch_trained() -> None:
    torch.manual_seed(0)
    model = classifier().eval()
    model.load_state_dict({name: p.half().float() for name, p in model.state_dict().items()})
    images = torch.rand(300, 3, 32, 32) * 2 - 1  # more than are convolved at once
    network = Classifier.from_tensors({name: tensor.numpy() for name, tensor in tensors_of(model).items()})
    features = network.features(images.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(features, model[:-1](images).numpy(), atol=1e-5)
        assert (network.classes(features) == model(images).argmax(dim=1).numpy()).all()


def test_pictures_outside_the_range_are_measured_as_they_would_be_saved() -> None:
    network = Classifier.from_tensors({name: tensor.numpy() for name, tensor in tensors_of(classifier()).items()})
    images = 3 * np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(network.features(images), network.features(np.clip(images, -1, 1)))


def test_it_learns_to_tell_colours_apart_and_is_rounded_to_float16() -> None:
    pictures = labelled([emoji(1, "Flags", "flag"), emoji(5, "Objects", "tool")])
    model = train(pictures, steps=60)
    assert accuracy(model, pictures)["right"] == 1
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())


def test_pictures_of_one_emoji_weigh_less_each() -> None:
    pictures = labelled([emoji(1, "Flags", "flag"), emoji(2, "People & Body", "hands", variants=4)])
    assert pictures.weights.tolist() == [1, 0.5]
    wrong_about_the_hand = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, len(KINDS)))
    torch.nn.init.zeros_(wrong_about_the_hand[1].weight)
    with torch.no_grad():
        wrong_about_the_hand[1].bias.copy_(torch.eye(len(KINDS))[KINDS.index("flag")])
    shares = accuracy(wrong_about_the_hand, pictures)
    assert (shares["right"], shares["right_weighted"]) == (0.5, pytest.approx(2 / 3))


def test_varied_pictures_stay_pictures_on_white() -> None:
    white = varied(torch.ones(200, 3, 32, 32))
    assert white.min() > -1.0
    assert white.mean() > 0.8
    dark = varied(-torch.ones(200, 3, 32, 32))
    assert dark.shape == white.shape
    assert dark.max() > 0.5  # what is turned or scaled away from leaves white


def test_what_is_compared_with_stands_in_one_order(tmp_path: Path) -> None:
    split = {"train": [emoji(1, "Flags", "flag")], "held out": [emoji(2, "Objects", "tool")]}
    model = classifier().eval()
    write_pictures(model, split, tmp_path)
    lines = (tmp_path / "emoji_pictures.tsv").read_text().splitlines()
    assert lines == ["caption\tkind\tside", "thing 1\tflag\ttrain", "thing 2\tobject\theld out"]
    features = load_file(tmp_path / "emoji_features.safetensors")["features"]
    pictures: Labelled = labelled([*split["train"], *split["held out"]])
    with torch.no_grad():
        assert torch.equal(features, model[:-1](pictures.pixels).half())
