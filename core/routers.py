"""Routers of Learning-to-Cache (arXiv 2406.01733): a score for every branch at every step, and the rows that follow.

Steps go in pairs from the clean end on. The first of a pair computes; in the second one a branch computes where its
score, the sigmoid of a logit, lies above theta, and reuses its output of the first one elsewhere. (Algorithm 2 of the
paper says it the other way round; the penalty on scores, and the released code, say this.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

__all__ = ["MOST_SEGMENTS", "THETA", "Routers", "computed_rows", "merged_rows", "reuses"]

THETA, MOST_SEGMENTS = 0.1, 4
Row = tuple[bool, ...]


@dataclass(frozen=True)
class Routers:
    """Logits (steps, branches), the last step of a trajectory, the clean end, first: so are they trained and released.

    Every second one, from the first on, is of a step that may reuse; the others are read by nobody. `branches` are
    the names of those that they were trained for, None where their file names none.
    """

    logits: tuple[tuple[float, ...], ...]
    branches: tuple[str, ...] | None = None


def reuses(steps: int) -> list[int]:
    """Return the steps that may reuse, in the order of a trajectory: every second one, the last one among them."""
    return [step for step in range(1, steps) if (steps - 1 - step) % 2 == 0]


def computed_rows(routers: Routers, theta: float) -> tuple[Row, ...]:
    """Return which branches compute at each step, (steps, branches), in the order of a trajectory.

    At theta 0 all do, whatever the logits, and at 1 none does in a step that may reuse.
    """
    steps, bound = len(routers.logits), _logit(theta)
    rows = [(True,) * len(routers.logits[0])] * steps
    for step in reuses(steps):
        rows[step] = tuple(value > bound for value in routers.logits[steps - 1 - step])
    return tuple(rows)


def _logit(score: float) -> float:
    if score <= 0 or score >= 1:
        return math.copysign(math.inf, score - 0.5)
    return math.log(score) - math.log1p(-score)


def merged_rows(rows: Sequence[Row], most: int) -> tuple[Row, ...]:
    """Return rows of which at most so many differ, beside those that compute everything.

    Rows become one that computes what any of them does: never less than was asked for. Of all pairs the one goes first
    that adds the fewest branches over all steps, and a row may come to compute everything. Exact is what needs no
    merging; else it is greedy, as clustering by union is, and nested: more rows never compute more.
    """
    width = len(rows[0]) if rows else 0
    whole = (1 << width) - 1
    asked = [sum(cell << place for place, cell in enumerate(row)) for row in rows]
    becomes = {mask: mask for mask in asked}
    counts = Counter(asked)
    while len(masks := sorted(counts.keys() - {whole})) > most:
        pairs = [*combinations(masks, 2), *((mask, whole) for mask in masks)]
        one, other = min(pairs, key=lambda pair: _added(pair[0], pair[1], counts))
        union, steps = one | other, counts.pop(one) + counts.pop(other, 0)
        counts[union] += steps
        becomes = {mask: union if now in (one, other) else now for mask, now in becomes.items()}
    return tuple(tuple(bool(becomes[mask] >> place & 1) for place in range(width)) for mask in asked)


def _added(one: int, other: int, counts: Counter[int]) -> int:
    """Return how many branches more compute, over all steps, where two masks become their union."""
    union = (one | other).bit_count()
    return counts[one] * (union - one.bit_count()) + counts[other] * (union - other.bit_count())
