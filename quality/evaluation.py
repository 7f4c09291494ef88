"""The measures of `ditc evaluate`, as a value that is printed, kept and compared."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ditc.machine import Machine
from ditc.quality.distributions import Distribution, DistributionValues
from ditc.runtime.closeness import StepDrift
from ditc.spec import PartialRecord, Record, Skipped

__all__ = [
    "Bootstrap",
    "Cells",
    "Distributions",
    "Drifts",
    "EvaluatedBundle",
    "Evaluation",
    "FeaturesUsed",
    "PairedMeasure",
    "RealImages",
    "SeedValues",
    "Veto",
]

Cells = tuple[tuple[float | None, ...], ...]


class EvaluatedBundle(Record):
    """The bundle that was evaluated; from `policy` on what it was compiled with, None where it does not say."""

    model: str
    precision: str
    steps: int
    guidance: float
    policy: str | None
    reuse: str | None
    select: str | None
    ranges: str | None
    smooth: str | None
    vc: str | None
    seed: int | None


class Bootstrap(Record):
    """The draws behind the intervals: rounds, the level they cover, the seed."""

    rounds: int
    level: float
    seed: int


class PairedMeasure(PartialRecord):
    """Mean over all pairs with its interval, and the worst pair; `window` is the side of SSIM's in pixels."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"window"})

    mean: float
    low: float
    high: float
    worst: float
    window: int | None = None


class Drifts(PartialRecord):
    """The samples after every step against FP's: of the bundle, and of the bundle without its compensation."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"uncompensated"})

    bundle: StepDrift
    uncompensated: StepDrift | None = None

    @property
    def sides(self) -> dict[str, StepDrift]:
        """The drifts that are there, by name."""
        return {name: drift for name, drift in self if drift is not None}


class FeaturesUsed(Record):
    """The features that images were measured by."""

    name: str
    about: str
    dimensions: int


class RealImages(Record):
    """The real images that others were held against: how many, and where from."""

    n: int
    about: str


class SeedValues(Record):
    """The measures of the `n` images of one seed, without intervals."""

    seed: int
    n: int
    bundle: DistributionValues
    fp: DistributionValues


class Distributions(Record):
    """The bundle's images and FP's, each against the real ones, and the difference bundle - FP."""

    features: FeaturesUsed
    real: RealImages
    bundle: Distribution
    fp: Distribution
    difference: Distribution
    per_seed: tuple[SeedValues, ...]


class Veto(Record):
    """Noise, change and their ratio, each [steps][branches]; the formulas are at the head of `quality/veto.py`.

    `since` is the step whose output would be reused, None where the branch computes and nothing is to be compared;
    `change` and `ratio` are None there, and `ratio` also where nothing changes at all.
    """

    model: str
    images: int
    seed: int
    lag: int | None
    branches: tuple[str, ...]
    t: tuple[float, ...]
    since: tuple[tuple[int | None, ...], ...]
    noise: Cells
    change: Cells
    ratio: Cells

    vetoed: float = Field(description="the share of the ratios that are above 1")


class Evaluation(PartialRecord):
    """The quality of a bundle's images: `images` of each of `seeds`, `n` in all.

    `paired` are the measures of pairs on the same noise, by name; `steps` the drifts of some of them after each step.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"veto"})

    machine: Machine
    bundle: EvaluatedBundle
    images: int
    seeds: tuple[int, ...]
    n: int
    bootstrap: Bootstrap
    paired: dict[str, PairedMeasure | Skipped]
    steps: Drifts
    distribution: Distributions | Skipped
    veto: Veto | None = None

    @property
    def measured_pairs(self) -> dict[str, PairedMeasure]:
        """Those of `paired` that were measured."""
        return {name: measure for name, measure in self.paired.items() if isinstance(measure, PairedMeasure)}
