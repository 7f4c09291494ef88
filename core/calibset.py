"""The calibration set: selected points with their origin, as one npz file without pickle."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import BundleError
from ditc.files import atomic_write

__all__ = ["CalibSet"]


@dataclass(frozen=True)
class CalibSet:
    """Points (sample, step, t, x, label), all with a leading axis of the same length; `weight` sums to it.

    `x` is (n, channels, *space) as the network took it, `sample` and `step` say where in the pool it was.
    """

    x: NDArray[np.float32]
    sample: NDArray[np.int64]
    step: NDArray[np.int64]
    t: NDArray[np.float64]
    label: NDArray[np.int64]
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: NDArray[Any]) -> CalibSet:
        """The points at `index`, in its order."""
        return CalibSet(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def digest(self) -> str:
        """SHA-256 over all fields, in hex."""
        digest = hashlib.sha256()
        for field in fields(self):
            array = np.ascontiguousarray(getattr(self, field.name))
            digest.update(f"{field.name}{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        buffer = BytesIO()
        np.savez(buffer, **{field.name: getattr(self, field.name) for field in fields(self)})
        atomic_write(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> CalibSet:
        """Raises BundleError for a file that is no calibration set."""
        try:
            with path.open("rb") as file:
                arrays = np.load(file, allow_pickle=False)
                return CalibSet(**{field.name: arrays[field.name] for field in fields(CalibSet)})
        except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as e:
            raise BundleError(f"{path} is not a calibration set ({e}); compile the bundle again") from e
