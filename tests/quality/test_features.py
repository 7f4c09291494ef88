"""Extractors of features and sources of real images; the pretrained networks are played, their lines are ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ditc.errors import InputError
from ditc.exporter.emoji_kinds import KINDS
from ditc.exporter.train_digits import digits_split
from ditc.quality import pretrained
from ditc.quality.emoji_pictures import EMOJI_SHAPE
from ditc.quality.features import (
    Extractor,
    check_sources,
    default_extractor,
    default_real,
    digit_quality,
    open_extractor,
    real_digits,
    real_features,
)
from ditc.runtime.images import save_png

EXPORTER = Path(__file__).parents[2] / "exporter"
COLOUR = (3, 16, 16)


def pictures(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(np.float32)


def test_the_classifier_is_as_right_on_held_out_digits_as_its_card_says() -> None:
    _, _, images, labels = (part.numpy() for part in digits_split())
    network = open_extractor("digits", (1, 8, 8))
    assert network.classes is not None
    features = network.features(images)
    assert features.shape == (360, 64)
    accuracy = float((network.classes(features) == labels).mean())
    recorded = json.loads((EXPORTER / "digit_classifier.training.json").read_text())
    assert accuracy == pytest.approx(recorded["accuracy_held_out"], abs=1e-6)
    assert accuracy > 0.98
    assert f"{accuracy:.1%}".replace("%", " %") in (EXPORTER / "digit_classifier.md").read_text()


def test_the_real_digits_are_those_the_model_was_trained_on() -> None:
    images, labels = real_digits()
    train, train_labels, *_ = (part.numpy() for part in digits_split())
    assert images.shape == (1797, 1, 8, 8)
    assert {(image.tobytes(), int(label)) for image, label in zip(train, train_labels, strict=True)} <= {
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    }


def test_real_digits_are_at_no_distance_from_themselves_and_noise_is_far() -> None:
    images, labels = real_digits()
    real, noise = digit_quality(images, labels), digit_quality(pictures(300, 1, 8, 8), np.zeros(300))
    assert real.frechet_distance == pytest.approx(0, abs=1e-6)
    assert real.frechet_distance_classifier == pytest.approx(0, abs=1e-3)
    assert real.class_agreement > 0.99
    assert noise.frechet_distance_classifier > 10
    assert noise.class_agreement < 0.5


def test_every_model_has_features_of_its_own() -> None:
    assert (default_extractor("digits", (1, 8, 8)), default_real("digits", (1, 8, 8))) == ("digits", "digits")
    assert (default_extractor("emoji", EMOJI_SHAPE), default_real("emoji", EMOJI_SHAPE)) == ("emoji", "emoji")
    assert (default_extractor("emoji", (3, 64, 64)), default_real("emoji", (3, 64, 64))) == ("inception", "fp")
    assert (default_extractor("small", (3, 8, 8)), default_real("small", (3, 8, 8))) == ("pixels", "fp")
    assert default_extractor("dit", (3, 256, 256)) == "inception"


def test_emoji_are_held_against_the_features_that_the_package_has() -> None:
    extractor = open_extractor("emoji", EMOJI_SHAPE)
    real = real_features("emoji", extractor, EMOJI_SHAPE)
    assert (real.features.shape, real.about) == ((3781, 64), "Noto's 3,781 emoji")
    assert extractor.asked is not None
    assert extractor.asked(("red heart", "dog face", "red heart")) == pytest.approx(
        [KINDS.index(kind) for kind in ("heart", "animal", "heart")]
    )
    assert extractor.asked(("red heart", "a dog on the moon")) is None
    assert extractor.asked(()) is None


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg", COLOUR, "unknown features 'vgg'; choose one of: digits, emoji, inception, pixels"),
        ("digits", COLOUR, r"take images of shape \(1, 8, 8\), found \(3, 16, 16\)"),
        ("emoji", COLOUR, r"take images of shape \(3, 32, 32\), found \(3, 16, 16\)"),
        ("pixels", (3, 64, 64), "up to 1024 numbers, found 12288"),
    ],
)
def test_features_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_extractor(name, shape)


def test_a_folder_of_pictures_and_an_archive_of_bytes_are_the_same_real_images(tmp_path: Path) -> None:
    images = pictures(70, *COLOUR)
    for number, image in enumerate(images):
        save_png(image, tmp_path / "real" / f"{number:03d}.png")
    pixels = np.moveaxis(np.round((images + 1) * 127.5).astype(np.uint8), 1, -1)
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    extractor = open_extractor("pixels", COLOUR)
    folder = real_features(str(tmp_path / "real"), extractor, COLOUR)
    archive = real_features(str(tmp_path / "real.npz"), extractor, COLOUR)
    assert folder.about == "70 pictures of real"
    np.testing.assert_array_equal(folder.features, archive.features)
    np.testing.assert_allclose(folder.features, images.reshape(70, -1), atol=1 / 127)


def test_grey_pictures_stay_grey(tmp_path: Path) -> None:
    image = pictures(1, 1, 16, 16)
    save_png(image[0], tmp_path / "a.png")
    real = real_features(str(tmp_path), open_extractor("pixels", (1, 16, 16)), (1, 16, 16))
    np.testing.assert_allclose(real.features, image.reshape(1, -1), atol=1 / 127)


def write_bad(folder: Path) -> None:
    """One of every kind of wrong source."""
    (folder / "empty").mkdir()
    save_png(pictures(1, 3, 8, 8)[0], folder / "small" / "a.png")
    (folder / "text").mkdir()
    (folder / "text" / "a.png").write_text("no picture")
    (folder / "text.npz").write_text("no archive")
    np.savez(folder / "odd.npz", mu=np.zeros(3))
    np.savez(folder / "floats.npz", arr_0=np.zeros((4, 16, 16, 3)))
    np.savez(folder / "other.npz", features=np.zeros((4, 64)), extractor=np.array("digits"))
    np.savez(folder / "objects.npz", arr_0=np.array([{}], object))
    np.save(folder / "array", np.zeros((4, 16, 16, 3), np.uint8))
    (folder / "array.npy").rename(folder / "array.npz")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "--real takes fp, digits, emoji, a folder of pictures or an .npz file, found"),
        ("empty", "holds no pictures"),
        ("small", r"a.png has shape \(3, 8, 8\), this model makes \(3, 16, 16\)"),
        ("text", "a.png is not a picture"),
        ("text.npz", "is not an .npz file of plain arrays"),
        ("objects.npz", "is not an .npz file of plain arrays"),
        ("odd.npz", "neither 'features' nor images as 'arr_0'"),
        ("array.npz", "holds one array"),
        ("floats.npz", r"expected images as uint8 \(n, 16, 16, 3\), found float64"),
        ("other.npz", "holds features of 'digits', these are 'pixels'"),
    ],
)
def test_a_source_that_can_not_be_real_images_is_one_line(source: str, message: str, tmp_path: Path) -> None:
    write_bad(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        real_features(str(tmp_path / source), open_extractor("pixels", COLOUR), COLOUR)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", ["", "nowhere", "empty", "text.npz", "odd.npz", "array.npz"])
def test_what_is_no_source_at_all_is_refused_before_there_are_images(source: str, tmp_path: Path) -> None:
    write_bad(tmp_path)
    with pytest.raises(InputError):
        check_sources(None, str(tmp_path / source) if source else "")


def test_digits_are_no_real_images_of_another_model() -> None:
    with pytest.raises(InputError, match=r"this model makes \(3, 16, 16\)"):
        real_features("digits", open_extractor("pixels", COLOUR), COLOUR)
    with pytest.raises(InputError, match=r"the real emoji have shape \(3, 32, 32\), this model makes \(3, 16, 16\)"):
        real_features("emoji", open_extractor("pixels", COLOUR), COLOUR)


def test_other_features_of_the_real_emoji_are_not_to_be_had() -> None:
    other = Extractor("inception", "", lambda images: images)
    with pytest.raises(InputError, match="features of their classifier alone, found features 'inception'"):
        real_features("emoji", other, EMOJI_SHAPE)


class PlayedInception(torch.nn.Module):
    """Takes what torch-fidelity 0.4's extractor takes, and says how it was asked."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.weights = Path(feature_extractor_weights_path)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (x.float().mean(dim=(2, 3)),)


class PlayedLPIPS(torch.nn.Module):
    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "alex"

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape[1] == 3
        return (a - b).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where torch looks for weights, and both packages there."""
    monkeypatch.setattr(pretrained, "weights_folder", lambda: tmp_path)
    played: dict[str, dict[str, Any]] = {
        "torch_fidelity": {},
        "torch_fidelity.feature_extractor_inceptionv3": {"FeatureExtractorInceptionV3": PlayedInception},
        "lpips": {"LPIPS": PlayedLPIPS},
    }
    for name, values in played.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return tmp_path


def test_inception_takes_bytes_in_colour_and_its_weights_from_a_file(weights: Path) -> None:
    torch.save({"a": torch.zeros(1)}, weights / pretrained.INCEPTION_FILE)
    images = pictures(2, *COLOUR)
    features = open_extractor("inception", COLOUR).features(images)
    np.testing.assert_allclose(features, np.round((images + 1) * 127.5).mean(axis=(2, 3)), rtol=1e-5)
    assert open_extractor("inception", (1, 16, 16)).features(images[:, :1]).shape == (2, 3)


def test_inception_weights_that_run_code_are_refused(weights: Path) -> None:
    import pickle

    (weights / pretrained.INCEPTION_FILE).write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match="runs no code from a checkpoint"):
        open_extractor("inception", COLOUR)


def test_lpips_is_zero_between_equal_images_and_takes_grey_as_colour(weights: Path) -> None:
    (weights / "alexnet-owt-7be5be79.pth").touch()
    distance = pretrained.lpips_distance(64, 64)
    images = pictures(2, 1, 64, 64)
    np.testing.assert_array_equal(distance(images, images), 0)
    np.testing.assert_allclose(distance(images, -images), 4 * (images**2).mean(axis=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("broken", [None, RuntimeError("operator torchvision::nms does not exist")])
def test_what_is_missing_is_one_line_that_says_what_to_fetch(
    broken: Exception | None, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"weights-inception-2015-12-05-6726825d\.pth; fetch that file from"):
        open_extractor("inception", COLOUR)
    with pytest.raises(InputError, match=r"fetch torchvision's alexnet-owt-\*.pth to"):
        pretrained.lpips_distance(64, 64)
    with pytest.raises(InputError, match="images of 8 x 64 pixels are too small for it, it needs 32"):
        pretrained.lpips_distance(8, 64)
    for name in ("torch_fidelity.feature_extractor_inceptionv3", "lpips"):
        monkeypatch.setitem(sys.modules, name, None if broken is None else Unusable(name, broken))
    with pytest.raises(InputError, match="pip install torch-fidelity"):
        open_extractor("inception", COLOUR)
    with pytest.raises(InputError, match="pip install lpips"):
        pretrained.lpips_distance(64, 64)


class Unusable(ModuleType):
    """A package that fails as one built for another torch does."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error
