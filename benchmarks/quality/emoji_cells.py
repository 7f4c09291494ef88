"""The cells of the text-to-image model: cache, integers and corrections at N = 3 and 5 of 25 Euler steps, guidance 2.

At N = 3 and 5 the network computes 9 and 5 steps. Its rivals are as many steps of a solver alone, their timesteps as
that solver places them; their images are held against those of 25 Euler steps like all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cells import Cell, Settings

__all__ = ["EMOJI_CELLS", "NAMES", "OWN", "SEEDS"]

SEEDS, IMAGES = 3, 2_000
OWN: Settings = {"steps": 25, "sampler": "euler", "cfg": 2.0}  # as its card says
FP: Settings = {"precision": "fp32", "select": "random", "smooth": "none"}
DEFAULT: Settings = {"precision": "w8a8", "select": "tap", "smooth": "smooth"}  # as ditc compiles
COMPUTED = {3: 9, 5: 5}  # steps, by N
SOLVERS = ("euler", "dpm++2m", "unipc")

NAMES: Mapping[str, Settings] = {
    "cache alone": {**FP, "reuse": "taylor"},
    "the default": {**DEFAULT, "reuse": "taylor"},
    "random points": {**DEFAULT, "select": "random", "reuse": "taylor"},
    "cache alone, held": {**FP, "reuse": "hold"},
    "cache alone, held, VC": {**FP, "reuse": "hold", "vc": "std"},
    "held": {**DEFAULT, "reuse": "hold"},
    "held, VC": {**DEFAULT, "reuse": "hold", "vc": "std"},
}


def every_cell() -> Iterator[Cell]:
    """Yield integers without a cache, then both intervals, each beside solvers of as many computed steps."""
    without = {**OWN, "policy": "none", "reuse": "hold", **DEFAULT}
    yield Cell("emoji, 25 computed", "integers alone", "emoji", without, SEEDS, IMAGES)
    for interval, computed in COMPUTED.items():
        group = f"emoji, {computed} computed"
        for name, settings in NAMES.items():
            at = {**OWN, "policy": f"fora:{interval}", **settings}
            yield Cell(group, name, "emoji", at, SEEDS, IMAGES)
        for sampler in SOLVERS:
            alone = {**OWN, "steps": computed, "sampler": sampler, "policy": "none", "reuse": "hold", **FP}
            yield Cell(group, f"{sampler} alone", "emoji", alone, SEEDS, IMAGES)


EMOJI_CELLS: tuple[Cell, ...] = tuple(every_cell())
