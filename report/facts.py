"""What `ditc report` knows of a bundle: plain values, gathered once, written as JSON and rendered as a page.

A part that could not be had is a `Skipped` with its reason, in its place.
"""

from __future__ import annotations

from typing import Any

from ditc.bundle import Manifest
from ditc.engines.integer_form import Arithmetic
from ditc.runtime.closeness import StepDrift
from ditc.spec import Record
from ditc.speed.latency import Latency

__all__ = [
    "Activation",
    "Activations",
    "Calibration",
    "Cluster",
    "Drift",
    "Fidelity",
    "Measure",
    "PeerSpeed",
    "Picture",
    "Pictures",
    "Report",
    "SegmentTime",
    "Skipped",
    "Speed",
    "StepTime",
]

SCHEMA_VERSION = 1


class Skipped(Record):
    """Why a part is not there."""

    skipped: str


class Picture(Record):
    """An image of the bundle as PNG in base64, its FP twin, and their difference enlarged; None without FP."""

    label: int
    found: str
    exact: str | None = None
    difference: str | None = None
    psnr_db: float | None = None


class Pictures(Record):
    """Images on shared noise, each `height` x `width` pixels. Differences are enlarged `gain` times, about grey."""

    height: int
    width: int
    gain: float
    pictures: tuple[Picture, ...]


class Measure(Record):
    """Mean over all pairs, and the worst of them."""

    mean: float
    worst: float


class Fidelity(Record):
    """How close `images` finished samples are to FP's on the same noise; `of` says images or latents."""

    of: str
    images: int
    measures: dict[str, Measure]


class Drift(Record):
    """The samples after every step against FP's: of the bundle, and of the bundle without its compensation."""

    bundle: StepDrift
    uncompensated: StepDrift | None = None


class StepTime(Record):
    """Median seconds of a step over all observed requests, and the part of it inside the segment's engine."""

    index: int
    t: float
    segment: str
    seconds: float
    engine_seconds: float


class SegmentTime(Record):
    """Calls of one request, what one takes, and the share of the whole."""

    calls: int
    latency: Latency
    share: float


class PeerSpeed(Record):
    """What else was measured in turn: a step and a whole run, and how many times as long as the bundle's they take."""

    what: str
    step_seconds: float
    run_seconds: float
    ratio_step: float
    ratio_run: float


class Speed(Record):
    """Latencies of requests of `batch` images on `target`. `against` is what `ditc bench --against` reports."""

    target: str
    batch: int
    request: Latency
    seconds_per_image: float
    steps: tuple[StepTime, ...]
    segments: dict[str, SegmentTime]
    outside_share: float
    against: dict[str, Any]

    @property
    def peers(self) -> dict[str, PeerSpeed]:
        """The peers that were measured."""
        return {
            name: PeerSpeed(
                what=found["what"],
                step_seconds=found["step"]["median"],
                run_seconds=found["run"]["median"],
                ratio_step=found["ratio_step"],
                ratio_run=found["ratio_run"],
            )
            for name, found in self.against.get("peers", {}).items()
        }


class Activation(Record):
    """One activation that linear layers read. Both per recorded step: the largest magnitude seen, and the largest that
    INT8 stands for there; `limits` is empty where every tensor is measured as it comes.
    """

    layers: tuple[str, ...]
    largest: tuple[float, ...]
    limits: tuple[float, ...] = ()


class Activations(Record):
    """Activations of the FP program at `points` calibration points, by step."""

    binding: str
    method: str
    points: int
    steps: tuple[int, ...]
    activations: tuple[Activation, ...]


class Cluster(Record):
    """One of TAP's clusters of the chosen points: how many of them lie at which step."""

    steps: dict[int, int]

    @property
    def size(self) -> int:
        return sum(self.steps.values())

    @property
    def middle(self) -> float:
        """The mean step of its points."""
        return sum(step * count for step, count in self.steps.items()) / self.size


class Calibration(Record):
    """The calibration set: points of each step and class, and how TAP clusters them."""

    selector: str
    points: int
    images: int
    digest: str
    by_step: tuple[int, ...]
    by_class: dict[int, int]
    clusters: tuple[Cluster, ...] | Skipped


class Report(Record):
    """Everything about a bundle that a person wants to look at; `arithmetic` is how its integers ran, if it has any."""

    schema_version: int = SCHEMA_VERSION
    bundle: str
    made_at: str
    ditc_version: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    place: str
    arithmetic: Arithmetic | None = None
    manifest: Manifest
    pictures: Pictures | Skipped
    fidelity: Fidelity | Skipped
    drift: Drift | Skipped
    compensation: tuple[tuple[float, ...], ...] | None
    speed: Speed | Skipped
    activations: Activations | Skipped
    calibration: Calibration | Skipped
    evaluation: dict[str, Any] | None = None
