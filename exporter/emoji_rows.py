"""The pictures that the text-to-image model was trained on or never saw, as the package lists them: no pixels."""

from __future__ import annotations

import csv
from importlib.resources import files
from typing import NamedTuple

__all__ = ["EmojiRow", "emoji_rows", "typical_captions"]

TYPICAL = 480  # captions of all kinds, whose encodings a bundle carries
STRIDE = 271  # from one typical caption to the next: coprime to their number, so that the first ones alone are varied


class EmojiRow(NamedTuple):
    """One picture: its caption, its kind (`emoji_kinds`), and "train" or "held out"."""

    caption: str
    kind: str
    side: str


def emoji_rows() -> tuple[EmojiRow, ...]:
    """Return all 3,781 pictures, in the order of their features."""
    with (files("ditc.exporter") / "emoji_pictures.tsv").open(encoding="utf-8") as file:
        return tuple(EmojiRow(**row) for row in csv.DictReader(file, delimiter="\t"))


def typical_captions() -> tuple[str, ...]:
    """Return captions spread evenly over all pictures: as many of each kind, tone and side as there are in all."""
    rows = emoji_rows()
    captions = tuple(dict.fromkeys(rows[place * len(rows) // TYPICAL].caption for place in range(TYPICAL)))
    return tuple(captions[place * STRIDE % len(captions)] for place in range(len(captions)))
