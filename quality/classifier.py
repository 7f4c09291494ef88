"""A small classifier in NumPy: linear layers with ReLU between. Its last hidden layer gives features of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Classifier"]


@dataclass(frozen=True)
class Classifier:
    """Layers as (weight (out, in), bias (out,)); the last one scores the classes."""

    layers: tuple[tuple[NDArray[np.float32], NDArray[np.float32]], ...]

    @staticmethod
    def from_tensors(tensors: Mapping[str, NDArray[Any]]) -> Classifier:
        """Build it from tensors "0.weight", "0.bias", "1.weight" and so on."""
        arrays = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
        return Classifier(tuple((arrays[f"{i}.weight"], arrays[f"{i}.bias"]) for i in range(len(arrays) // 2)))

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the last hidden layer, (n, features), of images in [-1, 1]."""
        hidden = np.clip(images, -1, 1).reshape(len(images), -1)
        for weight, bias in self.layers[:-1]:
            hidden = np.maximum(hidden @ weight.T + bias, 0)
        return hidden

    def classes(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the class of each image, (n,), from its features."""
        weight, bias = self.layers[-1]
        return np.asarray((features @ weight.T + bias).argmax(axis=1), np.int64)
