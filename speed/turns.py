"""Bundles in turn: each runs a request, then the next one, round after round, so that what disturbs meets all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ditc.progress import Progress
from ditc.runtime.options import HERE
from ditc.speed.side_by_side import RUN, bundle_turn, take_turns

__all__ = ["seconds_in_turn"]

WARMUP = 1  # rounds that are forgotten


def seconds_in_turn(bundles: Sequence[Path], rounds: int, progress: Progress) -> tuple[float, ...]:
    """Return the seconds per image of each bundle, up to its latents: the median of full batches."""
    with ExitStack() as stack:
        pipes = [stack.enter_context(HERE.load(path)) for path in bundles]
        times = take_turns([bundle_turn(pipe) for pipe in pipes], rounds, WARMUP, progress)
    batches = (pipe.bundle.manifest.batch for pipe in pipes)
    return tuple(float(np.median(own[RUN])) / batch for own, batch in zip(times, batches, strict=True))
