"""Files that images may begin with: a picture, an array, and the line about any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditc.errors import InputError
from ditc.runtime.given_samples import read_samples
from ditc.runtime.images import save_png, to_bytes
from ditc.spec import ModelSpec

RNG = np.random.default_rng(0)


def spec_of(*latent: int) -> ModelSpec:
    channels, *space = latent
    return ModelSpec(
        name="small",
        family="dit",
        in_channels=channels,
        space=tuple(space),
        cfg_channels=channels,
        branches=("a",),
        branch_shape=(1, 1),
        parameters=0,
    )


RGB, LATENT = spec_of(3, 6, 8), spec_of(4, 6, 8)


def refusal(path: Path, spec: ModelSpec = RGB, count: int = 2, *, decodes: bool = False) -> str:
    with pytest.raises(InputError) as refused:
        read_samples(path, spec, count, decodes=decodes)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def arrays(path: Path, **named: Any) -> Path:
    np.savez(path, **named)
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["p.png", "p.bmp", "p"])
def test_a_picture_is_read_as_it_is_written(name: str, channels: int, tmp_path: Path) -> None:
    image = RNG.uniform(-1, 1, (channels, 6, 8)).astype(np.float32)
    save_png(image, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        picture.save(tmp_path / name, Path(name).suffix.removeprefix(".") or "png")
    (first, second) = read_samples(tmp_path / name, spec_of(channels, 6, 8), 2, decodes=False)
    assert first.dtype == np.float32
    assert np.array_equal(to_bytes(first), to_bytes(image))
    assert np.abs(first - image).max() <= 0.5 / 127.5 + 1e-6
    assert np.array_equal(first, second)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_array_of_one_sample_or_of_one_for_each_image_is_taken_as_it_is(dtype: Any, tmp_path: Path) -> None:
    samples = RNG.standard_normal((2, 4, 6, 8)).astype(dtype)
    expected = samples.astype(np.float32)
    np.save(tmp_path / "two.npy", samples)
    np.save(tmp_path / "one.npy", samples[0])
    arrays(tmp_path / "some.npz", latents=samples, labels=np.arange(2))
    arrays(tmp_path / "other.npz", arr_0=samples[1:])
    for name, rows in (("two.npy", (0, 1)), ("one.npy", (0, 0)), ("some.npz", (0, 1)), ("other.npz", (1, 1))):
        read = read_samples(tmp_path / name, LATENT, 2, decodes=True)
        assert read.dtype == np.float32
        assert np.array_equal(read, expected[list(rows)])


def test_a_vector_is_a_sample_too(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.arange(5.0))
    assert read_samples(tmp_path / "v.npy", spec_of(5), 3, decodes=False).shape == (3, 5)


@pytest.mark.parametrize(
    ("spec", "decodes"), [(LATENT, True), (LATENT, False), (RGB, True), (spec_of(3, 2, 6, 8), False)]
)
def test_a_picture_is_none_for_a_model_of_latents(spec: ModelSpec, decodes: bool, tmp_path: Path) -> None:
    save_png(np.zeros((3, 6, 8)), tmp_path / "p.png")
    message = refusal(tmp_path / "p.png", spec, decodes=decodes)
    assert "has no encoder for pictures; give latents of shape " + str(spec.latent_shape) in message


@pytest.mark.parametrize(
    ("mode", "size", "told"),
    [
        ("RGB", (6, 8), "6 x 8 pixels, mode RGB, and small works on 8 x 6, mode RGB"),
        ("L", (8, 6), "8 x 6 pixels, mode L, and small works on 8 x 6, mode RGB (RGB without transparency)"),
        ("RGBA", (8, 6), "mode RGBA"),
        ("P", (8, 6), "mode P"),
    ],
)
def test_a_picture_of_another_size_or_kind_is_refused(
    mode: str, size: tuple[int, int], told: str, tmp_path: Path
) -> None:
    Image.new(mode, size).save(tmp_path / "p.png")
    assert told in refusal(tmp_path / "p.png")


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((4, 6, 8), np.uint8), "holds uint8 of shape (4, 6, 8), expected floats of shape (4, 6, 8) or (n, 4"),
        (np.zeros((3, 6, 8)), "holds float64 of shape (3, 6, 8)"),
        (np.zeros((1, 1, 4, 6, 8)), "of shape (1, 1, 4, 6, 8)"),
        (np.zeros((4, 6, 8), complex), "holds complex128"),
        (np.zeros((3, 4, 6, 8)), "holds 3 samples for 2 images; give one, or one for each image"),
        (np.zeros((0, 4, 6, 8)), "holds 0 samples for 2 images"),
    ],
)
def test_an_array_of_another_form_is_refused(array: Any, told: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    assert told in refusal(tmp_path / "a.npy", LATENT)


def test_files_that_hold_nothing_of_the_kind_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.png")
    assert "Is a directory" in refusal(tmp_path)
    for name, content, told in (
        ("empty.png", b"", "is no picture that can be read"),
        ("text.npy", b"hello", "is no picture that can be read"),
        ("cut.npy", b"\x93NUMPY", "can't read arrays"),
        ("cut.npz", b"PK\x03\x04", "can't read arrays"),
    ):
        (tmp_path / name).write_bytes(content)
        assert told in refusal(tmp_path / name)
    assert "holds 'a', 'b'; expected one array, or one that is called 'latents'" in refusal(
        arrays(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    )
    assert "holds no array" in refusal(arrays(tmp_path / "no.npz"))
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    assert "can't read arrays" in refusal(tmp_path / "pickled.npy")


def test_a_picture_that_ends_too_soon_is_refused(tmp_path: Path) -> None:
    save_png(RNG.uniform(-1, 1, (3, 6, 8)), tmp_path / "p.png")
    content = (tmp_path / "p.png").read_bytes()
    for length in (9, 40, len(content) // 2):
        (tmp_path / "cut.png").write_bytes(content[:length])
        assert "is no picture that can be read" in refusal(tmp_path / "cut.png")
