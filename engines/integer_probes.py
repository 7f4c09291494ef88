"""Small products whose operands saturate wherever anything can, and their exact results.

The graphs lie in `probes/` as files, since a deployment has no onnx to make them with; `probe_graphs` wrote them. Each
holds every form of integer product that segments have: CASES, with constant weights. Operands are multiples of powers
of two, so that the exact result is that of float64, and a correct kernel errs by the rounding of the scales alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.precision import LEVELS, levels_of
from ditc.tables import MIDPOINTS_INPUT, SCALES_INPUT

__all__ = [
    "CASES",
    "INSIDE",
    "OUTSIDE",
    "ROUNDING",
    "STEP",
    "Case",
    "bias",
    "largest_error",
    "probe_feeds",
    "probe_name",
    "probe_weight",
]

Feeds = Mapping[str, NDArray[Any]]
OpenProbe = Callable[[Path], Callable[[Feeds], Mapping[str, NDArray[Any]]]]

INSIDE, OUTSIDE = 66, 34  # beyond the tiles of the kernels, of 64 and 32, so that their remainders run too
ROWS = (1, 64)  # kernels for a vector are others than those for a matrix
STEP, WEIGHT_STEP = 2.0**-1, 2.0**-6
# relative error of a correct product, by the type around it; one that saturated is off by a tenth and more
ROUNDING = {"f32": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class Case:
    """Linear layers that read one activation. `bindings` is the row of BINDINGS; `layers` says which have a bias.

    The activation, in steps of its scale, is `high` nearly everywhere and else `low`; `middle` is its midpoint.
    """

    name: str
    binding: str
    low: int
    high: int
    layers: tuple[bool, ...]
    middle: int = 0

    @property
    def outputs(self) -> tuple[str, ...]:
        """The graph's output of each layer."""
        return tuple(f"{self.name}.{number}" for number in range(len(self.layers)))

    def activation(self, rows: int) -> NDArray[np.float32]:
        """(1, rows, INSIDE); every row holds both values."""
        place = np.add.outer(np.arange(rows), np.arange(INSIDE))
        steps = np.where(place % 11 == 7, self.low, self.high).astype(np.float32)
        return np.asarray(steps[np.newaxis] * np.float32(STEP))


# unsigned, all of them reach 255; with two values only, none of them rounds where scales are measured as they come
CASES = (
    Case("static", "static", -127, 127, (False, True)),
    Case("middle", "static", -27, 227, (True,), middle=100),
    Case("step", "per-step", -127, 127, (False, True)),
    Case("step_middle", "per-step", -27, 227, (True,), middle=100),
    Case("dynamic", "dynamic", 0, 255, (False, True)),
    Case("dynamic_alone", "dynamic", 0, 255, (False,)),  # measured, rounded and multiplied in one operator
    Case("dynamic_biased", "dynamic", 0, 255, (True,)),
)


def probe_weight(bits: int) -> NDArray[np.float32]:
    """(INSIDE, OUTSIDE): the largest weights of either sign in runs, a few others, and a largest one in each column."""
    levels = levels_of(bits)
    k, n = np.arange(INSIDE)[:, np.newaxis], np.arange(OUTSIDE)[np.newaxis]
    largest = np.where((k // 8 + n) % 3 == 0, -levels, levels)
    others = (k * n) % (2 * levels + 1) - levels
    steps = np.where((5 * k + 3 * n) % 13 == 5, others, largest).astype(np.float32)
    return np.asarray(steps * np.float32(WEIGHT_STEP))


def bias() -> NDArray[np.float32]:
    """(OUTSIDE,)."""
    return np.arange(OUTSIDE, dtype=np.float32)


def probe_feeds(rows: int) -> dict[str, NDArray[Any]]:
    """The inputs of a probe graph."""
    middles = [case.middle for case in CASES if case.binding == "per-step" and case.middle]
    columns = sum(case.binding == "per-step" for case in CASES)
    return {
        **{case.name: case.activation(rows) for case in CASES},
        SCALES_INPUT: np.full(columns, STEP * LEVELS, np.float32),
        MIDPOINTS_INPUT: np.array(middles, np.float32),
    }


def exact_outputs(rows: int, bits: int) -> dict[str, NDArray[np.float64]]:
    """Return a probe graph's exact outputs, each (1, rows, OUTSIDE)."""
    weight = probe_weight(bits).astype(np.float64)
    return {
        name: case.activation(rows).astype(np.float64) @ weight + (bias() if biased else 0)
        for case in CASES
        for name, biased in zip(case.outputs, case.layers, strict=True)
    }


def largest_error(open_probe: OpenProbe, kinds: Iterable[str], bits: int) -> float:
    """The largest relative error of any case, over the probe graphs of some `kinds` and every number of rows."""
    errors = []
    for kind in kinds:
        with as_file(files("ditc.engines") / "probes" / probe_name(kind, bits)) as path:
            run = open_probe(path)
            for rows in ROWS:
                outputs = run(probe_feeds(rows))
                errors += [_error(outputs[name], exact) for name, exact in exact_outputs(rows, bits).items()]
    return float(np.max(errors))  # of a NaN it is NaN, which nothing is below


def probe_name(kind: str, bits: int) -> str:
    """The file of a probe graph. `kind` is "portable", or the backend whose form it is."""
    return f"{kind}-{bits}.onnx"


def _error(output: NDArray[Any], exact: NDArray[np.float64]) -> float:
    return float(np.abs(output - exact).max() / np.abs(exact).max())
