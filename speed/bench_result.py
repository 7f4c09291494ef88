"""The result of `ditc bench`, as a value that is printed, kept and compared."""

from __future__ import annotations

from typing import ClassVar

from ditc.engines.integer_form import Arithmetic
from ditc.machine import Machine
from ditc.spec import PartialRecord, Record
from ditc.speed.latency import SpreadLatency
from ditc.speed.roofline import Roofline
from ditc.speed.side_by_side import NoPeer, SideBySide

__all__ = ["Bench", "BenchedBundle", "CallLatency", "OutsideLatency", "StepTime"]


class BenchedBundle(Record):
    """The measured bundle; `steps` is how many a request has."""

    model: str
    precision: str
    steps: int


class CallLatency(SpreadLatency):
    """Seconds of the calls of one segment, and their share of all observed seconds."""

    share: float


class OutsideLatency(CallLatency):
    """The part of steps that is outside the engines; `seconds_per_step` is its mean."""

    seconds_per_step: float


class StepTime(Record):
    """Median seconds of a step over all observed requests, and the part of it inside the segment's engine."""

    index: int
    t: float
    segment: str
    seconds: float
    engine_seconds: float


class Bench(PartialRecord):
    """Latencies of requests of `batch` images, after `warmup` others that do not count.

    `request` is of whole requests; `segments`, `outside_engines` and `steps` of as many others, observed step by step.
    `arithmetic` is how integers ran, if there are any; `trace` names the files that were written.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"roofline", "against", "trace"})

    machine: Machine
    bundle: BenchedBundle
    arithmetic: Arithmetic | None
    batch: int
    warmup: int
    request: SpreadLatency
    seconds_per_image: float
    segments: dict[str, CallLatency]
    outside_engines: OutsideLatency
    steps: tuple[StepTime, ...]
    host_peak_memory_bytes: int
    roofline: Roofline | None = None
    against: SideBySide | NoPeer | None = None
    trace: tuple[str, ...] | None = None
