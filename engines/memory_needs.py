"""The device memory that a trajectory needs, known before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from ditc.bundle import Bundle
from ditc.engines.device import ALIGNMENT
from ditc.engines.store import EXPLICIT
from ditc.engines.trt_runtime import profile_sizes
from ditc.errors import BundleError, InputError
from ditc.footprint import Footprint, PortShape
from ditc.program import AHEAD, CONDITION, DECODE, OF_STEP
from ditc.spec import Record

__all__ = ["MemoryNeeds", "footprints", "memory_needs"]


class MemoryNeeds(Record):
    """Bytes of device memory while a trajectory runs.

    `weights` by segment; `scratch` is the least one shared block must hold (TensorRT may want more); `caches` are the
    slots; `tables` and `samples` what passes between the segments.
    """

    weights: dict[str, int]
    scratch: int
    caches: int
    tables: int
    samples: int
    batch: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.scratch + self.caches + self.tables + self.samples

    def rows(self) -> Iterator[tuple[str, int]]:
        """The plan as lines of a table: (what, bytes)."""
        for name, size in self.weights.items():
            yield f"weights of {name}", size
        yield "scratch, shared", self.scratch
        yield "cache slots", self.caches
        yield "modulation tables", self.tables
        yield "samples", self.samples
        yield "together", self.total

    def check_fits(self, device_bytes: int, workspace_bytes: int, gpu: str) -> None:
        """Raise InputError where the profile can't run on the device, or the largest segment can't be built on it."""
        if self.total > device_bytes:
            raise InputError(
                f"batch {self.batch} needs at least {_mb(self.total)} to run, {gpu} has {_mb(device_bytes)}; "
                "compile the bundle with a smaller --batch"
            )
        largest = max(self.weights, key=lambda name: self.weights[name])
        needed = self.weights[largest] + workspace_bytes
        if needed > device_bytes:
            raise InputError(
                f"building {largest} may take {_mb(needed)} (weights and a workspace of {_mb(workspace_bytes)}), "
                f"{gpu} has {_mb(device_bytes)}; lower --workspace"
            )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.0f} MB"


def footprints(bundle: Bundle) -> dict[str, Footprint]:
    """The needs of every segment, as measured at compile time."""
    try:
        needs = bundle.manifest.measured("footprints").footprints
    except BundleError:
        needs = None
    if needs is None:
        raise InputError(f"{bundle.path} was compiled by a ditc that measured no memory needs; compile it again")
    return needs


def memory_needs(bundle: Bundle, calibration: str = EXPLICIT) -> MemoryNeeds:
    """The needs of a bundle's trajectory at its batch."""
    manifest = bundle.manifest
    needs = footprints(bundle)
    rows, steps = manifest.batch * manifest.halves, len(manifest.program.steps)
    condition = needs[CONDITION].outputs.values()
    slots = dict[int, int]()  # bytes of each, which holds values of one shape
    for step in manifest.program.steps:
        for value, slot in step.writes.items():
            port = needs[step.segment].outputs[f"cache.{value}"]
            slots[slot] = max(slots.get(slot, 0), port.size_bytes(profile_sizes(bundle, step.segment)))
    latent, prediction = (4 * prod(shape) for shape in (manifest.model.latent_shape, manifest.model.prediction_shape))
    decoded = needs[DECODE].outputs.values() if DECODE in needs else ()
    images = [port.size_bytes(profile_sizes(bundle, DECODE)) for port in decoded]
    factor = 1 if calibration == EXPLICIT else 2  # the calibrator's networks hand over FP32
    return MemoryNeeds(
        weights={name: need.weight_bytes for name, need in needs.items()},
        scratch=max(need.activation_bytes for need in needs.values()),
        caches=factor * sum(slots.values()),
        tables=factor * sum(_with_copies(port, profile_sizes(bundle, CONDITION)) for port in condition)
        + sum(_rows_of_steps(needs[step.segment]) for step in manifest.program.steps),
        samples=(3 * rows + steps * manifest.batch) * latent + rows * prediction + sum(images),
        batch=manifest.batch,
    )


def _rows_of_steps(need: Footprint) -> int:
    """Bytes of what a segment takes at a step that depends on the timestep alone, in full precision."""
    ports = (port for name, port in need.inputs.items() if name.removeprefix(f"{AHEAD}.").startswith(OF_STEP))
    return sum(port.size_bytes({}) for port in ports)


def _with_copies(port: PortShape, sizes: Mapping[str, int]) -> int:
    """A table, and its rows once more where their addresses would be odd."""
    size = port.size_bytes(sizes)
    return size if size // sizes["steps"] % ALIGNMENT == 0 else 2 * size
