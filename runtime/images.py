"""Images on disk: arrays in [-1, 1] to PNG files and grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.files import writing

__all__ = ["grid", "png_bytes", "save_png", "to_bytes"]

NO_TEXT: Mapping[str, str] = {}


def to_bytes(images: NDArray[Any]) -> NDArray[np.uint8]:
    """[-1, 1] floats to 0..255."""
    return np.asarray(np.round((np.clip(images, -1, 1) + 1) * 127.5), dtype=np.uint8)


def grid(rows: Sequence[NDArray[Any]], *, scale: int = 1, gap: int = 2) -> NDArray[np.float32]:
    """Rows of images, each (n, channels, height, width), as one picture (channels, H, W); every pixel `scale` wide."""
    count = max(len(row) for row in rows)
    channels, height, width = rows[0].shape[1:]
    cell = (height * scale + gap, width * scale + gap)
    picture = np.ones((channels, len(rows) * cell[0] + gap, count * cell[1] + gap), np.float32)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * cell[0] + gap, c * cell[1] + gap
            big = image.repeat(scale, axis=1).repeat(scale, axis=2)
            picture[:, top : top + height * scale, left : left + width * scale] = big
    return picture


def png_bytes(image: NDArray[Any], text: Mapping[str, str] = NO_TEXT) -> bytes:
    """One image (channels, height, width) in [-1, 1]; 1 channel is grey, 3 are RGB, of any other count the first 3.

    `text` goes into the file's text chunks, by keyword.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    pixels, data, chunks = to_bytes(image), BytesIO(), PngInfo()
    for keyword, words in text.items():
        chunks.add_text(keyword, words)
    picture = Image.fromarray(pixels[0] if len(pixels) in (1, 2) else np.moveaxis(pixels[:3], 0, -1))
    picture.save(data, "png", pnginfo=chunks)
    return data.getvalue()


def save_png(image: NDArray[Any], path: Path, text: Mapping[str, str] = NO_TEXT) -> None:
    """One image as `png_bytes` makes it, as a file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(image, text))
