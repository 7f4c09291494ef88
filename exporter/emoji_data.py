"""Pictures of emoji with captions: the data of the built-in text-to-image model.

Noto's emoji (Google, Apache-2.0) as the npm package emoji-datasource-google ships them, in one pinned version whose
archive is checked. Pictures of 64 x 64 pixels are put on white and averaged to 32 x 32.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditc.errors import InputError
from ditc.exporter.emoji_captions import activity_of, captions_of
from ditc.files import sha256_of

__all__ = ["Emoji", "Split", "emoji_archive", "pixels_of", "read_emoji", "split_of"]

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
ARCHIVE = f"{PACKAGE}-{VERSION}.tgz"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
SIZE = 32
HELD_OUT = 0.1
SPLIT_SEED = 2  # the first that leaves in the training what anybody asks for: a man, a red heart, a pizza, a ghost


@dataclass(frozen=True)
class Emoji:
    """One picture: `pixels` (32, 32, 3) uint8, captions (the main one first), category, and where it belongs.

    `activity` is one for all genders and skin tones of a thing; `tone` is the key of a skin tone, "" without one;
    `variants` counts the pictures of its emoji.
    """

    image: str
    pixels: NDArray[np.uint8]
    captions: tuple[str, ...]
    category: str
    subcategory: str
    activity: str
    tone: str
    variants: int


@dataclass(frozen=True)
class Split:
    """Training and held-out pictures, which share no activity and no picture."""

    train: tuple[Emoji, ...]
    held_out: tuple[Emoji, ...]


def emoji_archive(folder: Path) -> Path:
    """Return the package's archive in `folder`, fetched by npm where it isn't there. Raises InputError."""
    path = folder / ARCHIVE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError) as e:
            raise InputError(f"`{' '.join(command)}` failed ({e}); install npm, or put {ARCHIVE} into {folder}") from e
    digest = sha256_of(path)
    if digest != SHA256:
        raise InputError(f"{path} has SHA-256 {digest}, expected {SHA256}; remove it to have it fetched again")
    return path


def read_emoji(archive: Path) -> tuple[Emoji, ...]:
    """Read all pictures with their captions, in the order of emoji.json; the five swatches of skin are left out."""
    with tarfile.open(archive) as tar:
        stored = {
            member.name: tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.name == "package/emoji.json" or member.name.startswith("package/img/google/64/")
        }
    entries = json.loads(stored["package/emoji.json"])
    return tuple(
        _emoji(entry, tone, image, stored[f"package/img/google/64/{image}"])
        for entry in entries
        if entry["category"] != "Component"
        for tone, image in _variants(entry)
    )


def _variants(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (skin tone or "", file) of each picture of an emoji."""
    toned = entry.get("skin_variations", {})
    return [("", entry["image"])] + [(tone, variation["image"]) for tone, variation in toned.items()]


def _emoji(entry: dict[str, Any], tone: str, image: str, png: bytes) -> Emoji:
    return Emoji(
        image=image,
        pixels=_on_white(png),
        captions=captions_of(entry, tone),
        category=entry["category"],
        subcategory=entry["subcategory"],
        activity=activity_of(entry),
        tone=tone,
        variants=len(_variants(entry)),
    )


def _on_white(png: bytes) -> NDArray[np.uint8]:
    """Return a picture on white, each pixel the average of the 2 x 2 that it stands for."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as opened:
        picture = opened.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, picture).convert("RGB")
    return np.asarray(flat.resize((SIZE, SIZE), Image.Resampling.BOX), np.uint8)


def pixels_of(emoji: Sequence[Emoji]) -> Tensor:
    """Return pictures as networks take them, (n, 3, 32, 32) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([one.pixels for one in emoji]))
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def split_of(emoji: tuple[Emoji, ...], seed: int = SPLIT_SEED) -> Split:
    """Hold out a tenth of the activities of each category, by a seed; pictures that look the same stay together."""
    groups = _groups(emoji)
    members: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, group in enumerate(groups):
        members[emoji[group].category][group].append(index)
    generator, held_out = np.random.default_rng(seed), set()
    for category in sorted(members):
        keys = sorted(members[category])
        for key in generator.permutation(keys)[: round(HELD_OUT * len(keys))]:
            held_out.update(members[category][int(key)])
    return Split(
        train=tuple(one for i, one in enumerate(emoji) if i not in held_out),
        held_out=tuple(one for i, one in enumerate(emoji) if i in held_out),
    )


def _groups(emoji: tuple[Emoji, ...]) -> list[int]:
    """Return for each picture the first one of its group: those of one activity, and those that look the same."""
    root = list(range(len(emoji)))

    def top(index: int) -> int:
        while root[index] != index:
            index = root[index]
        return index

    seen: dict[Any, int] = {}
    for index, one in enumerate(emoji):
        for key in ((one.category, one.activity), one.pixels.tobytes()):
            first = top(seen.setdefault(key, index))
            low, high = sorted((first, top(index)))
            root[high] = low
    return [top(index) for index in range(len(emoji))]
