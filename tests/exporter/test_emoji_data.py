"""Pictures of emoji out of an archive, and their split; the archive here is a small one of the same form."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditc.errors import InputError
from ditc.exporter import emoji_data
from ditc.exporter.emoji_data import ARCHIVE, Emoji, emoji_archive, read_emoji, split_of
from ditc.files import sha256_of


def png(colour: tuple[int, ...]) -> bytes:
    """A picture of 64 x 64 whose upper half is clear and whose lower half has one colour."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste(colour, (0, 32, 64, 64))
    data = io.BytesIO()
    picture.save(data, "png")
    return data.getvalue()


def entry(name: str, category: str, image: str, tones: tuple[str, ...] = ()) -> dict[str, Any]:
    variations = {tone: {"image": f"{image}-{tone}.png"} for tone in tones}
    short = name.lower().replace(" ", "_")
    about = {"name": name, "category": category, "subcategory": "other", "short_name": short, "short_names": [short]}
    return about | {"image": f"{image}.png"} | ({"skin_variations": variations} if tones else {})


ENTRIES = [
    entry("RED APPLE", "Food & Drink", "apple"),
    entry("WOMAN RUNNING", "People & Body", "woman", ("1F3FB", "1F3FF")),
    entry("MAN RUNNING", "People & Body", "man", ("1F3FB", "1F3FF")),
    entry("EMOJI MODIFIER", "Component", "swatch"),
]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    files = {"emoji.json": json.dumps(ENTRIES).encode()}
    images = [v["image"] for e in ENTRIES for v in (e, *e.get("skin_variations", {}).values())]
    files |= {f"img/google/64/{image}": png((200, 8 * number, 0, 255)) for number, image in enumerate(images)}
    path = tmp_path / ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_each_skin_tone_is_a_picture_of_its_own_and_swatches_are_none(archive: Path) -> None:
    emoji = read_emoji(archive)
    assert [one.image for one in emoji] == [
        "apple.png",
        "woman.png",
        "woman-1F3FB.png",
        "woman-1F3FF.png",
        "man.png",
        "man-1F3FB.png",
        "man-1F3FF.png",
    ]
    assert [one.variants for one in emoji] == [1, 3, 3, 3, 3, 3, 3]
    assert emoji[3].captions[0] == "woman running, dark skin tone"
    assert emoji[3].tone == "1F3FF"


def test_pictures_stand_on_white_at_half_their_size(archive: Path) -> None:
    apple = read_emoji(archive)[0].pixels
    assert apple.shape == (32, 32, 3)
    assert apple.dtype == np.uint8
    assert (apple[:16] == 255).all()
    assert (apple[16:] == [200, 0, 0]).all()


def some(count: int, activities: int) -> tuple[Emoji, ...]:
    """`count` pictures that all differ, of so many activities in two categories."""
    rng = np.random.default_rng(0)
    return tuple(
        Emoji(
            image=f"{number}.png",
            pixels=rng.integers(0, 256, (32, 32, 3), np.uint8),
            captions=(f"thing {number}",),
            category=("A", "B")[number % activities % 2],
            subcategory="things",
            activity=f"activity {number % activities}",
            tone="",
            variants=1,
        )
        for number in range(count)
    )


def test_a_tenth_of_the_activities_of_each_category_is_held_out_and_none_is_on_both_sides() -> None:
    split = split_of(some(600, 200))
    assert (len(split.train), len(split.held_out)) == (540, 60)
    held_out = {one.activity for one in split.held_out}
    assert sorted(one.category for one in split.held_out) == ["A"] * 30 + ["B"] * 30
    assert held_out.isdisjoint(one.activity for one in split.train)
    assert split_of(some(600, 200)).held_out[0].image == split.held_out[0].image


def test_pictures_that_look_the_same_are_on_one_side() -> None:
    emoji = some(400, 400)
    twins = tuple(
        Emoji(**{**vars(one), "image": f"twin {one.image}", "activity": f"twin {one.activity}"}) for one in emoji
    )
    split = split_of(emoji + twins)
    held_out = {one.pixels.tobytes() for one in split.held_out}
    assert len(split.held_out) == 80
    assert held_out.isdisjoint(one.pixels.tobytes() for one in split.train)


def test_an_archive_of_other_bytes_is_refused(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"has SHA-256 [0-9a-f]{64}, expected fb5fd131.*; remove it"):
        emoji_archive(archive.parent)
    monkeypatch.setattr(emoji_data, "SHA256", sha256_of(archive))
    assert emoji_archive(archive.parent) == archive


def test_the_archive_is_fetched_by_name_and_version_where_it_is_missing(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """npm is played: a program that puts the archive where it runs, if it is asked for the pinned version."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\n[ "$*" = "pack --silent emoji-datasource-google@16.0.0" ] && cp {archive} .\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(emoji_data, "SHA256", sha256_of(archive))
    assert emoji_archive(tmp_path / "new").read_bytes() == archive.read_bytes()


def test_without_npm_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"npm pack --silent emoji-datasource-google@16.0.0` failed .*; install npm"):
        emoji_archive(tmp_path)
