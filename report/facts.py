"""The facts of a report on a bundle: plain values, gathered once, written as JSON and rendered as a page.

A part that could not be had is a `Skipped` with its reason, in its place.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import field_serializer, field_validator

from ditc.bundle import Manifest
from ditc.engines.integer_form import Arithmetic
from ditc.machine import Machine
from ditc.quality.evaluation import Evaluation
from ditc.runtime.closeness import StepDrift
from ditc.spec import PartialRecord, Record, Skipped
from ditc.speed.bench_result import StepTime
from ditc.speed.latency import Latency
from ditc.speed.side_by_side import NoPeer, PeerTimes, SideBySide

__all__ = [
    "Activation",
    "Activations",
    "Calibration",
    "Cluster",
    "Drift",
    "Fidelity",
    "Measure",
    "Picture",
    "Pictures",
    "Report",
    "ReportSettings",
    "SegmentTime",
    "Skipped",
    "Speed",
    "StepTime",
]

SCHEMA_VERSION = 1


class Picture(PartialRecord):
    """An image of the bundle as PNG in base64, its FP twin, and their difference enlarged; None without FP.

    `prompt` is the text that it was made from, where there is one.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"prompt"})

    label: int | None  # None of a model without classes
    prompt: str | None = None
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
    """Closeness of `images` finished samples to FP's on the same noise; `of` says images or latents."""

    of: str
    images: int
    measures: dict[str, Measure]


class Drift(Record):
    """The samples after every step against FP's: of the bundle, and of the bundle without its compensation."""

    bundle: StepDrift
    uncompensated: StepDrift | None = None


class SegmentTime(Record):
    """Calls of one request, what one takes, and the share of the whole."""

    calls: int
    latency: Latency
    share: float


class Speed(Record):
    """Latencies of requests of `batch` images on `target`. `against` is what `ditc bench --against` reports.

    As JSON it is empty where no peer was asked for.
    """

    target: str
    batch: int
    request: Latency
    seconds_per_image: float
    steps: tuple[StepTime, ...]
    segments: dict[str, SegmentTime]
    outside_share: float
    against: SideBySide | NoPeer | None

    @field_validator("against", mode="before")
    @classmethod
    def _nothing_is_none(cls, given: Any) -> Any:
        return None if given == {} else given

    @field_serializer("against")
    def _none_is_nothing(self, against: SideBySide | NoPeer | None) -> dict[str, Any]:
        return {} if against is None else against.model_dump(mode="json")

    @property
    def peers(self) -> dict[str, PeerTimes]:
        """The peers that were measured."""
        return {} if self.against is None else self.against.peers


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


class ReportSettings(Record):
    """Counts of images walked step by step, from `seed` on, and of timed requests."""

    images: int
    seed: int
    requests: int


class Report(Record):
    """Everything about a bundle that a person wants to look at; `arithmetic` is how its integers ran, if it has any."""

    schema_version: int = SCHEMA_VERSION
    bundle: str
    made_at: str
    ditc_version: str
    machine: Machine
    settings: ReportSettings
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
    evaluation: Evaluation | None = None
