"""A small classifier in NumPy: convolutions where it has any, then linear layers, with ReLU between.

Its last hidden layer gives features of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

__all__ = ["Classifier"]

Layer = tuple[NDArray[np.float32], NDArray[np.float32]]  # weight, bias
CONVOLVED_AT_ONCE = 256  # images whose windows are held


@dataclass(frozen=True)
class Classifier:
    """Layers as (weight (out, in), bias (out,)); the last one scores the classes.

    Before them `convolutions`, as (weight (out, in, 3, 3), bias (out,)), each of which halves height and width.
    """

    layers: tuple[Layer, ...]
    convolutions: tuple[Layer, ...] = ()

    @staticmethod
    def from_tensors(tensors: Mapping[str, NDArray[Any]]) -> Classifier:
        """Build it from tensors "conv0.weight", "conv0.bias" and so on, then "0.weight", "0.bias", "1.weight" ..."""
        arrays = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
        return Classifier(layers=_layers(arrays, ""), convolutions=_layers(arrays, "conv"))

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the last hidden layer, (n, features), of images in [-1, 1]."""
        hidden = self._convolved(np.clip(images, -1, 1))
        for weight, bias in self.layers[:-1]:
            hidden = np.maximum(hidden @ weight.T + bias, 0)
        return hidden

    def classes(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the class of each image, (n,), from its features."""
        weight, bias = self.layers[-1]
        return np.asarray((features @ weight.T + bias).argmax(axis=1), np.int64)

    def _convolved(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return numbers of each image, (n, channels * height * width), after the convolutions."""
        if not self.convolutions:
            return images.reshape(len(images), -1)
        starts = range(0, len(images), CONVOLVED_AT_ONCE)
        parts = (images[start : start + CONVOLVED_AT_ONCE] for start in starts)
        return np.concatenate([self._convolved_part(part) for part in parts])

    def _convolved_part(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        for weight, bias in self.convolutions:
            padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
            windows = sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2]  # (n, in, rows, columns, 3, 3)
            sums = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3))) + bias
            images = np.moveaxis(np.maximum(sums, 0), -1, 1)
        return images.reshape(len(images), -1)


def _layers(arrays: Mapping[str, NDArray[np.float32]], prefix: str) -> tuple[Layer, ...]:
    count = sum(f"{prefix}{i}.weight" in arrays for i in range(len(arrays)))
    return tuple((arrays[f"{prefix}{i}.weight"], arrays[f"{prefix}{i}.bias"]) for i in range(count))
