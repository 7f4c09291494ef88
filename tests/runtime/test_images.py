"""Images on disk: every pixel where and what it should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ditc.errors import InputError
from ditc.runtime.images import grid, save_png, to_bytes

LAW = settings(deadline=None)  # a busy machine stalls now and then


def gradient(channels: int) -> np.ndarray:
    """Every byte value that a channel can have, another in each pixel."""
    levels = np.arange(channels * 6 * 5) * 7 % 256
    return (levels.reshape(channels, 6, 5) / 127.5 - 1).astype(np.float32)


@LAW
@given(st.integers(0, 255))
def test_a_byte_survives_the_way_to_minus_one_to_one_and_back(value: int) -> None:
    assert to_bytes(np.array([value / 127.5 - 1], np.float32))[0] == value


def test_values_out_of_range_are_clipped() -> None:
    values = np.array([-100, -1.0, 0, 1, 1.001, np.inf, -np.inf], np.float32)
    assert to_bytes(values).tolist() == [0, 0, 128, 255, 255, 255, 0]


def test_a_grid_places_each_image_with_a_gap_around_it() -> None:
    rows = [np.full((3, 1, 4, 5), -0.5, np.float32), np.full((3, 1, 4, 5), 0.25, np.float32)]
    picture = grid(rows, gap=2)
    assert picture.shape == (1, 2 * (4 + 2) + 2, 3 * (5 + 2) + 2)
    assert picture.dtype == np.float32
    for r, value in enumerate((-0.5, 0.25)):
        for c in range(3):
            cell = picture[0, 2 + 6 * r : 6 + 6 * r, 2 + 7 * c : 7 + 7 * c]
            assert cell.shape == (4, 5)
            assert (cell == value).all()
    assert (picture == 1).sum() == picture.size - 6 * 20


def test_a_grid_keeps_the_order_of_pixels_channels_and_images() -> None:
    images = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    picture = grid([images], gap=0)
    np.testing.assert_array_equal(picture, np.concatenate([images[0], images[1]], axis=2))


def test_a_scaled_grid_repeats_pixels_and_not_the_gap() -> None:
    images = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    picture = grid([images], scale=3, gap=1)
    assert picture.shape == (1, 8, 8)
    np.testing.assert_array_equal(picture[0, 1:-1, 1:-1], np.kron(images[0, 0], np.ones((3, 3))))


def test_a_short_row_is_filled_with_white() -> None:
    rows = [np.zeros((3, 1, 2, 2), np.float32), np.zeros((1, 1, 2, 2), np.float32)]
    picture = grid(rows, gap=0)
    assert picture.shape == (1, 4, 6)
    assert (picture[0, 2:, 2:] == 1).all()
    assert (picture[0, :2] == 0).all()


def test_a_grey_image_survives_the_png(tmp_path: Path) -> None:
    save_png(gradient(1), tmp_path / "deep" / "grey.png")
    with Image.open(tmp_path / "deep" / "grey.png") as picture:
        assert (picture.mode, picture.size) == ("L", (5, 6))
        np.testing.assert_array_equal(np.asarray(picture), to_bytes(gradient(1))[0])


def test_an_rgb_image_survives_the_png(tmp_path: Path) -> None:
    save_png(gradient(3), tmp_path / "colour.png")
    with Image.open(tmp_path / "colour.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (5, 6))
        np.testing.assert_array_equal(np.asarray(picture), to_bytes(gradient(3)).transpose(1, 2, 0))


def test_a_latent_of_four_channels_shows_its_first_three(tmp_path: Path) -> None:
    save_png(gradient(4), tmp_path / "latent.png")
    with Image.open(tmp_path / "latent.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), to_bytes(gradient(4)[:3]).transpose(1, 2, 0))


def test_what_a_png_was_made_from_stands_in_its_text_chunks(tmp_path: Path) -> None:
    image = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    text = {"Software": "ditc 1", "ditc.model": "Größe 千"}
    save_png(image, tmp_path / "a.png", text)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text == text  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(picture), to_bytes(image)[0])


def test_an_image_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"can't write .*image\.png"):
        save_png(gradient(1), tmp_path / "file" / "image.png")
