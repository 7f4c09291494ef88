"""The cells of the experiment: which settings are tried on which model, in which groups, how often."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

__all__ = ["BASE", "CELLS", "MODELS", "POINTS", "SAMPLERS", "SELECTORS", "STRATEGIES", "TUNED", "Cell"]

Settings = Mapping[str, Any]
TUNED = Path(__file__).with_name("tuned.json")  # what `tuned.py` found

# what a cell doesn't name: calibrated on random points of what deployment sees, nothing compensated
BASE: Settings = {
    "steps": 50,
    "cfg": 1.5,
    "sampler": "ddim",
    "policy": "fora:3",
    "precision": "w8a8",
    "select": "random",
    "points": 800,
    "pool_steps": "computed",
    "ranges": "mse",
    "scales": "static",
    "smooth": "none",
    "reuse": "hold",
    "vc": "none",
    "vc_images": 64,
}
MODELS, SAMPLERS = ("plain", "stressed"), ("ddim", "ddpm")
MAIN_SEEDS, MAIN_IMAGES = 5, 2_000
OTHER_SEEDS, OTHER_IMAGES = 3, 1_000
# the paper's control: as many points from each step of a run that knows no cache
UNCACHED = {"select": "uniform-time", "pool_steps": "uncached"}
SELECTORS: Mapping[str, Settings] = {
    "tap": {"select": "tap"},
    "random": {"select": "random"},
    "uniform in time, uncached": UNCACHED,
    "tap of activations": {"select": "tap-activations"},
}
POINTS = (16, 64, 256, 800, 3_200)
BOTH = {"select": "tap", "vc": "std"}  # the paper's method
STRATEGIES: Mapping[str, Settings] = {
    "naive": {},
    "tap": {"select": "tap"},
    "vc std": {"vc": "std"},
    "vc lsq": {"vc": "lsq"},
    "vc paper": {"vc": "paper"},
    "tap + vc std": BOTH,
    "taylor": {"reuse": "taylor"},
    "smooth": {"smooth": "smooth"},
    "smooth + tap + taylor": {"smooth": "smooth", "select": "tap", "reuse": "taylor"},
    "smooth + tap + taylor + vc std": {"smooth": "smooth", **BOTH, "reuse": "taylor"},
    "smooth + tap + vc std": {"smooth": "smooth", **BOTH},
}


# what neither the paper does nor ditc by default, and eq. 12 as printed, which destroys the images of every seed
BESIDE = ("vc paper", "taylor", "smooth", "smooth + tap + taylor + vc std", "smooth + tap + vc std")


@dataclass(frozen=True)
class Cell:
    """One row of a table: `settings` are what differs from BASE, `seeds` that many trials of `images` each."""

    group: str
    name: str
    model: str
    settings: Settings
    seeds: int = OTHER_SEEDS
    images: int = OTHER_IMAGES

    @property
    def every_setting(self) -> dict[str, Any]:
        return {**BASE, **self.settings}


def main_cells(sampler: str) -> Iterator[Cell]:
    """Both models at N = 3 and 5; smoothing is of the stressed and the plain model alike."""
    for model in MODELS:
        alone = {"sampler": sampler, "policy": "none"}
        yield Cell(sampler, "quantization alone", model, alone, MAIN_SEEDS, MAIN_IMAGES)
    for interval in (3, 5):
        at = {"sampler": sampler, "policy": f"fora:{interval}"}
        for vc in ("none", "std"):
            name = "cache alone" if vc == "none" else "cache + vc std"
            yield Cell(sampler, name, "plain", {**at, "precision": "fp32", "vc": vc}, MAIN_SEEDS, MAIN_IMAGES)
        for model, (name, settings) in product(MODELS, STRATEGIES.items()):
            seeds = OTHER_SEEDS if name in BESIDE else MAIN_SEEDS
            yield Cell(sampler, name, model, {**at, **settings}, seeds, MAIN_IMAGES)


def interval_cells() -> Iterator[Cell]:
    """The intervals between and beyond, and windows, in which an extrapolation reaches farther."""
    for policy, model in product(("fora:2", "fora:8", "window:5:2:2", "window:10:2:2"), MODELS):
        at = {"policy": policy}
        if model == "plain":
            yield Cell("intervals", "cache alone", model, {**at, "precision": "fp32"})
        for name in ("naive", "tap + vc std", "smooth + tap + vc std", "smooth + tap + taylor"):
            yield Cell("intervals", name, model, {**at, **STRATEGIES[name]})


def reuse_cells() -> Iterator[Cell]:
    """Yield reuses that are fitted to a step; the others are among the strategies."""
    for interval, model in product((3, 5), MODELS):
        at = {"policy": f"fora:{interval}"}
        yield Cell("reuse", "naive", model, at)
        for reuse, vc in product(("affine", "variance"), ("none", "std")):
            name = f"smooth + tap + {reuse}" + ("" if vc == "none" else f" + vc {vc}")
            yield Cell("reuse", name, model, {**at, "smooth": "smooth", "select": "tap", "reuse": reuse, "vc": vc})


def noise_cells() -> Iterator[Cell]:
    """Yield holding and extrapolating under fresh noise: shorter and longer intervals, some with both ends computed."""
    for policy, model in product(("fora:2", "fora:4", "fora:8", "window:5:2:2", "window:8:2:2"), MODELS):
        at = {"sampler": "ddpm", "policy": policy}
        yield Cell("noise", "naive", model, at)
        for reuse in ("hold", "taylor"):
            changes = {"smooth": "smooth", "select": "tap", "reuse": reuse}
            yield Cell("noise", f"smooth + tap + {reuse}", model, {**at, **changes})


def control_cells() -> Iterator[Cell]:
    """Yield selections that TAP is held against, with the largest magnitude as range, where the points matter most."""
    controls: Mapping[str, Settings] = {
        **SELECTORS,
        "kmeans": {"select": "kmeans"},
        "tap, alpha 0": {"select": "tap", "tap_alpha": 0.0},
        "tap, alpha 1": {"select": "tap", "tap_alpha": 1.0},
    }
    for model, points, (name, settings) in product(MODELS, (64, 800), controls.items()):
        yield Cell("controls", f"{name}, {points} points", model, {"points": points, "ranges": "max", **settings})


def points_cells() -> Iterator[Cell]:
    """Yield the numbers of calibration points; those of 64 and 800 are trials of the controls too."""
    for model, (name, settings), points in product(MODELS, SELECTORS.items(), POINTS):
        yield Cell("points", f"{name}, {points} points", model, {"points": points, "ranges": "max", **settings})


def quantizer_cells() -> Iterator[Cell]:
    """Yield ranges, scales, smoothing and bits, one at a time."""
    for model in MODELS:
        for ranges in ("max", "percentile", "mse", "entropy"):
            yield Cell("ranges", ranges, model, {"ranges": ranges})
        for scales in ("static", "per-step", "dynamic"):
            yield Cell("scales", scales, model, {"scales": scales})
        for method in ("none", "smooth", "balance"):
            yield Cell("smoothing", method, model, {"smooth": method})
        for precision, name in product(("w4a8", "w8a6"), ("naive", "tap + vc std", "smooth + tap + vc std")):
            yield Cell("bits", f"{precision}, {name}", model, {"precision": precision, **STRATEGIES[name]})


def seven_cells() -> Iterator[Cell]:
    """Yield seven bits of weights beside eight: without a cache, and as ditc compiles by default."""
    default = {"smooth": "smooth", "select": "tap"}
    for sampler, model, policy in product(SAMPLERS, MODELS, ("none", "fora:3", "fora:5")):
        extrapolates = policy != "none" and (sampler, policy) != ("ddpm", "fora:5")
        reuse = {"reuse": "taylor"} if extrapolates else {}
        for precision in ("w8a8", "w7a8"):
            # w8a8 is what BASE says: so the trials are those of other groups where they have them
            changes = {"sampler": sampler, "policy": policy, **default, **reuse}
            bits = {} if precision == "w8a8" else {"precision": precision}
            yield Cell("seven", precision, model, {**changes, **bits}, MAIN_SEEDS, MAIN_IMAGES)


def float_cells() -> Iterator[Cell]:
    """Yield steps at either end in floating point, where INT8 costs little and where six-bit activations cost much."""
    for model, precision, ends in product(MODELS, ("w8a8", "w8a6"), ("none", "8:0", "0:8", "8:8")):
        name = f"{precision}, " + ("all quantized" if ends == "none" else f"{ends} in floating point")
        changes = {} if ends == "none" else {"float_steps": ends}
        yield Cell("float", name, model, {"precision": precision, **changes})


def tuned_cells() -> Iterator[Cell]:
    """Yield the choices of `ditc tune`, where it has been run."""
    tuned = json.loads(TUNED.read_text())
    for search in tuned["searches"].values():
        settings = {"sampler": search["sampler"], "select": tuned["base"]["select"], **search["chosen"]["changes"]}
        yield Cell("tuned", "tuned", search["model"], settings, MAIN_SEEDS, MAIN_IMAGES)
        beside = {name: settings[name] for name in ("sampler", "policy")}
        yield Cell("tuned", "naive", search["model"], beside, MAIN_SEEDS, MAIN_IMAGES)


CELLS: tuple[Cell, ...] = (
    *(cell for sampler in SAMPLERS for cell in main_cells(sampler)),
    *tuned_cells(),
    *interval_cells(),
    *reuse_cells(),
    *noise_cells(),
    *control_cells(),
    *points_cells(),
    *quantizer_cells(),
    *float_cells(),
    *seven_cells(),
)
