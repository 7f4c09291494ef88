"""Latents of a bundle as a later request has them, on graphs where there are any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ditc

LABELS = [0, 3, 4]


def latents(bundle: Path, target: str, labels: list[int] | None = None, **options: Any) -> NDArray[np.float32]:
    """The latents of a second request, which is the one that runs on graphs."""
    with ditc.load(bundle, target=target, **options) as pipe:
        pipe.latents([1], seed=1)
        return pipe.latents(LABELS if labels is None else labels, seed=3)
