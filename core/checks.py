"""Measurements of the stages of a compile, as the manifest's `checks` keep them: a record for each stage.

A bundle keeps its checks as they were written, whichever version wrote them. These records are how they are read: keys
that came later may be missing where they have a default here, and keys that are gone are passed over.
"""

from __future__ import annotations

from pydantic import ConfigDict

from ditc.footprint import Footprint
from ditc.spec import Record

__all__ = [
    "Approximation",
    "Checks",
    "CompensationRange",
    "IntegerKernels",
    "PoolSize",
    "Rotated",
    "SmoothedLayer",
    "Smoothing",
    "StorageError",
    "TextCheck",
    "ValueRange",
    "Verification",
    "Watched",
]


class _Read(Record):
    """A record that older and newer versions may have written with other keys beside."""

    model_config = ConfigDict(extra="ignore")


class PoolSize(_Read):
    """The number of points in the pool, and of the images that they come from."""

    points: int
    images: int


class SmoothedLayer(_Read):
    """The factors of a layer: their range, and the exponent; `alpha` of None is a layer that is best without any."""

    alpha: float | None
    least: float
    largest: float


class Smoothing(_Read):
    """The outcome of smoothing: of `linears` layers `smoothed` have factors, `left` offer no place to fold them into.

    `parity` is the largest relative error that folding causes, by segment.
    """

    method: str
    linears: int
    smoothed: int
    layers: dict[str, SmoothedLayer] = {}
    left: tuple[str, ...] = ()
    parity: dict[str, float] = {}


class Rotated(_Read):
    """The outcome of rotating: what `linears` layers read, in groups of `size` channels.

    Of the layers in `folded` that costs nothing; `products` with a fixed matrix stand in front of the others in the
    `full` segment. `parity` is the largest relative error that rotating causes in FP, by segment.
    """

    size: int
    linears: int
    folded: tuple[str, ...] = ()
    products: int = 0
    parity: dict[str, float] = {}


class IntegerKernels(_Read):
    """Of the `linears` of a segment, how many ran an `integer` kernel."""

    linears: int
    integer: int


class StorageError(_Read):
    """The relative error of a segment's outputs that storing its weights as FP16 causes."""

    relative_error: float


class ValueRange(_Read):
    """Least, mean and largest of some numbers."""

    least: float
    mean: float
    largest: float


class Approximation(_Read):
    """The numbers fitted for steps that reuse, over `images` pairs: the range of weights, and of shifts if any.

    Where they are learned, `ridge` counts the steps by the strength that was chosen for them, and `rollout` is the
    relative error of samples on the noise that they are learned on, mean over the steps: with each of the tables that
    there was to choose from.
    """

    method: str
    images: int
    scale: ValueRange
    shift: ValueRange | None = None
    ridge: dict[str, int] = {}
    rollout: dict[str, float] = {}


class Verification(_Read):
    """Samples of `images` trajectories against the exact ones.

    The PSNR in dB is of the finished samples; `relative_error` and `std_ratio`, the ratio of their deviations to the
    exact ones', are of the samples after each step.
    """

    images: int
    psnr_db_mean: float
    psnr_db_min: float
    relative_error: tuple[float, ...]
    std_ratio: tuple[float, ...]


class CompensationRange(_Read):
    """Mean, least and largest of the compensation's factors K."""

    k_mean: float
    k_min: float
    k_max: float


class Watched(_Read):
    """The statistics of `images` FP images that decided the schedule, where its policy sees any.

    `changes` has for each kind of branch a row per step: the mean relative L1 change of its outputs since the step
    before, the one before that, and so on as far as the policy looks.
    """

    images: int
    changes: dict[str, tuple[tuple[float, ...], ...]] = {}


class TextCheck(_Read):
    """The error of an exported text encoder against torch, and its largest activation on prompts, with its place."""

    parity: float
    largest_activation: float
    largest_at: str


class Checks(_Read):
    """Measurements on the way, by stage; None for a stage that this bundle did not need.

    `parity` is the error of each exported segment against torch; `tensorrt` has a sentence for each of TensorRT's rules
    that the typed form of a segment breaks; `text` is by encoder.
    """

    text: dict[str, TextCheck] | None = None
    watch: Watched | None = None
    parity: dict[str, float] | None = None
    pool: PoolSize | None = None
    smooth: Smoothing | None = None
    rotate: Rotated | None = None
    kernels: dict[str, IntegerKernels] | None = None
    storage: dict[str, StorageError] | None = None
    approximation: Approximation | None = None
    tensorrt: dict[str, tuple[str, ...]] | None = None
    footprints: dict[str, Footprint] | None = None
    verify: Verification | None = None
    compensation: CompensationRange | None = None
