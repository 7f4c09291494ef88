"""`ditc estimate` as a function: time and memory of a bundle on a device, from its work and the device's rates.

    products   operations / rate, or weights / bandwidth where that is longer (they stream in while the products run)
    the rest   bytes that all other operators move / bandwidth, each operator by itself

So a segment's time is the sum of the two. Fusion makes it less, launches and scheduling make it more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ditc.bundle import Bundle, open_bundle
from ditc.engines.memory_needs import footprints, memory_needs
from ditc.errors import InputError, unknown_name
from ditc.footprint import Footprint
from ditc.program import CONDITION, UPDATE
from ditc.spec import Record
from ditc.speed.rates import DEVICES, HERE, MEASURED, REACHED, Rates, Shares, segment_seconds

__all__ = [
    "Estimate",
    "Seconds",
    "SegmentEstimate",
    "estimate_bundle",
]


class Seconds(Record):
    """Seconds at the full rates, and at the shares of them that are expected."""

    bound: float
    expected: float


class SegmentEstimate(Record):
    """Work of one call of a segment, and its seconds as `Seconds` has them."""

    weight_bytes: int
    int8_operations: int
    float_operations: int
    moved_bytes: int
    bound: float
    expected: float


class Estimate(Record):
    """Time and memory of a bundle on a device: by segment, per image, and whether it fits."""

    device: Rates
    shares: Shares
    segments: dict[str, SegmentEstimate]
    seconds_per_image: Seconds
    memory_bytes: int
    fits: bool


def estimate_bundle(path: Path, device: str) -> Estimate:
    """Return time per segment and per image, and memory, on a device. Raises InputError for one that is not known."""
    bundle = open_bundle(path)
    works = footprints(bundle)
    if not any(work.int8_operations + work.float_operations for work in works.values()):
        raise InputError(f"{path} was compiled by a ditc that counted no operations; compile it again")
    rates, shares = _rates(device)
    segments = {
        name: _segment(_as_run(work, bundle.manifest.precision, rates), rates, shares) for name, work in works.items()
    }
    memory = memory_needs(bundle).total
    return Estimate(
        device=rates,
        shares=shares,
        segments=segments,
        seconds_per_image=Seconds(
            bound=_per_image(bundle, {name: segment.bound for name, segment in segments.items()}),
            expected=_per_image(bundle, {name: segment.expected for name, segment in segments.items()}),
        ),
        memory_bytes=memory,
        fits=memory < rates.memory_bytes,
    )


def _segment(work: Footprint, rates: Rates, shares: Shares) -> SegmentEstimate:
    return SegmentEstimate(
        weight_bytes=work.weight_bytes,
        int8_operations=work.int8_operations,
        float_operations=work.float_operations,
        moved_bytes=work.moved_bytes,
        bound=segment_seconds(work, rates, MEASURED),
        expected=segment_seconds(work, rates, shares),
    )


def _as_run(work: Footprint, precision: str, rates: Rates) -> Footprint:
    """Return the work with floats as wide as the device's; the typed form, where that was counted, has two bytes."""
    factor = 1 if precision == "fp32" else rates.float_bytes / 2
    return work.model_copy(update={"moved_bytes": round(work.moved_bytes * factor)})


def _rates(device: str) -> tuple[Rates, Shares]:
    if device == HERE:
        from ditc.speed.ceilings import measured_rates  # needs the compiler's packages

        return measured_rates(), MEASURED
    if device not in DEVICES:
        raise unknown_name("device", device, (HERE, *DEVICES))
    return DEVICES[device], REACHED


def _per_image(bundle: Bundle, seconds: Mapping[str, float]) -> float:
    """Return a request's seconds over its images: conditioning once, every step with its update, the decoder."""
    program = bundle.manifest.program
    steps = sum(seconds[step.segment] + seconds[UPDATE] for step in program.steps)
    around = seconds[CONDITION] + sum(seconds[name] for name in program.epilogue)
    return (steps + around) / bundle.manifest.batch
