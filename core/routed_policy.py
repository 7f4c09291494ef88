"""The policy of trained routers, `l2c`: what it is given, and the schedule that follows (Learning-to-Cache)."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ditc.errors import AdviceWarning, InputError
from ditc.policy_sources import Sources
from ditc.routers import MOST_SEGMENTS, THETA, Routers, computed_rows, merged_rows
from ditc.schedule import CacheSchedule
from ditc.spec import ModelSpec

__all__ = ["l2c", "settled_l2c"]

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class _Routed:
    """A file of routers, the score above which a branch computes, and how many different rows there may be."""

    file: Path
    theta: float
    segments: int


ROUTED = re.compile(rf"(?P<file>.+?)(?::(?P<theta>{NUMBER})(?::(?P<segments>\d{{1,4}}))?)?", re.ASCII)


def l2c(spec: ModelSpec, steps: int, argument: str | None, sources: Sources) -> CacheSchedule:
    """In every second step compute the branches whose trained score lies above theta (arXiv 2406.01733).

    Each distinct row that computes some branches is a segment, so rows are merged until `segments` of them differ,
    beside those that compute everything; one that stands for several computes what any of them does.
    """
    given = _routed(argument)
    if sources.read_routers is None:
        raise InputError(f"policy l2c:{argument} decides by routers that torch wrote; compile a model with it")
    routers = sources.read_routers(given.file)
    if len(routers.logits) != steps:
        count = len(routers.logits)
        raise InputError(f"{given.file} has routers for {count} steps, the sampler takes {steps}; set --steps {count}")
    width = len(routers.logits[0])
    if width != len(spec.branches) or routers.branches not in (None, spec.branches):
        raise InputError(
            f"{given.file} has routers for {width} branches{_names(routers)}, {spec.name} has {len(spec.branches)}, "
            f"{', '.join(spec.branches[:2])}, ...; train routers for this model"
        )
    asked = computed_rows(routers, given.theta)
    rows = merged_rows(asked, given.segments)
    if rows != asked:
        more, least = (sum(map(sum, each)) for each in (rows, asked))
        warnings.warn(
            f"the routers ask for {_partial(asked)} different rows, and {given.segments} segments for them compute "
            f"{more} branches, not {least}; more segments: --policy l2c:FILE:{given.theta:g}:{_partial(asked)}",
            AdviceWarning,
            stacklevel=2,
        )
    return CacheSchedule(compute=rows)


def _names(routers: Routers) -> str:
    return "" if routers.branches is None else f", {', '.join(routers.branches[:2])}, ..."


def _partial(rows: Sequence[tuple[bool, ...]]) -> int:
    """Return how many different rows there are beside that which computes everything."""
    return len({row for row in rows if not all(row)})


def _routed(argument: str | None) -> _Routed:
    match = ROUTED.fullmatch(argument or "")
    theta = float(match["theta"] or THETA) if match else math.nan
    segments = int(match["segments"] or MOST_SEGMENTS) if match else 0
    if match is None or not 0 <= theta <= 1 or segments < 1:
        raise InputError(
            "policy l2c needs FILE[:THETA[:SEGMENTS]], routers, the score of 0 to 1 above which a branch computes, and "
            f"how many different rows there may be, found {argument!r}; write for example --policy l2c:routers.pt:0.1:4"
        )
    return _Routed(Path(match["file"]), theta, segments)


def settled_l2c(argument: str | None) -> str:
    """Return the argument with its score and its number of segments."""
    given = _routed(argument)
    return f"{given.file}:{given.theta}:{given.segments}"
