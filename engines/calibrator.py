"""INT8 calibrators of TensorRT 10 (`--calibration entropy|minmax`), fed with the points of the calibration set.

TensorRT 11 has no calibrators: there the explicit Q/DQ form is the only one, and on 10 it is the default. The cache of
a calibrator is keyed by network, shapes, points and method, written whole or not at all, and the next build takes it
up.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle, open_bundle
from ditc.calibset import CalibSet
from ditc.engines.device import Device, DeviceTensor, open_device
from ditc.engines.store import EngineStore
from ditc.engines.trt import open_runtime
from ditc.engines.trt_runtime import TensorRTEngine, calibration_cache, share_scratch
from ditc.errors import DitcError, InputError
from ditc.files import atomic_write
from ditc.guidance import Guidance
from ditc.program import AHEAD, CONDITION, REQUEST, TIMESTEPS
from ditc.spec import Record
from ditc.tables import tables_of_steps

__all__ = [
    "CALIBRATORS",
    "CalibrationRequest",
    "calibration_caches",
    "check_calibrators",
    "make_calibrator",
    "open_calibrator",
    "scales_from_cache",
]

CALIBRATORS = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}

Batch = Mapping[str, DeviceTensor]


class CalibrationRequest(Record):
    """Needs of a calibrator of TensorRT 10: the points, the engine that makes their tables, a cache to keep.

    `bundle` has the conditions of the points' images.
    """

    points: Path
    condition_plan: Path
    condition_sha256: str
    bundle: Path
    ahead: int = 0  # how many later steps' tables the segment takes
    cache: Path


def check_calibrators(trt: Any, method: str) -> Any:
    """TensorRT's base class of a calibrator. Raises InputError where this TensorRT has none."""
    base = getattr(trt, CALIBRATORS[method], None)
    if base is None:
        raise InputError(
            f"TensorRT {trt.__version__} has no INT8 calibrators (they ended with 10); "
            "leave --calibration out: the explicit Q/DQ form holds the scales already"
        )
    return base


def make_calibrator(trt: Any, method: str, batches: Iterator[Batch], cache: Path) -> Any:
    """A calibrator that hands TensorRT the device addresses of one batch after the other.

    TensorRT swallows exceptions raised inside it, so the first one is kept in `failure` and ends the feeding.
    """
    base = check_calibrators(trt, method)

    class Calibrator(base):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.failure: Exception | None = None
            self._batch: Batch = {}  # kept alive while TensorRT reads it

        def get_batch_size(self) -> int:
            return 1  # of networks with explicit batch TensorRT asks, and does not use the answer

        def get_batch(self, names: Sequence[str]) -> list[int] | None:
            try:
                self._batch = next(batches)
                return [self._batch[name].pointer for name in names]
            except StopIteration:
                return None
            except KeyError as e:
                self.failure = DitcError(f"the network asks for input {e}, which calibration does not make")
            except Exception as e:  # whatever it is, TensorRT would go on with the points so far
                self.failure = e
            return None

        def read_calibration_cache(self) -> bytes | None:
            return cache.read_bytes() if cache.is_file() else None

        def write_calibration_cache(self, data: bytes) -> None:
            if self.failure is not None:  # scales of half the points are none
                return
            try:
                atomic_write(cache, bytes(data))
            except Exception as e:
                self.failure = e

    return Calibrator()


@contextmanager
def open_calibrator(trt: Any, method: str, request: CalibrationRequest, sizes: Mapping[str, int]) -> Iterator[Any]:
    """A calibrator for a segment, with the `condition` engine that makes the tables of each batch."""
    check_calibrators(trt, method)
    device = open_device()
    runtime, log = open_runtime(trt)
    plan = request.condition_plan.read_bytes()
    if hashlib.sha256(plan).hexdigest() != request.condition_sha256:
        raise InputError(f"{request.condition_plan} changed during the build; give the same command again")
    condition = TensorRTEngine(trt, runtime, log, plan, CONDITION, device)
    scratch = share_scratch([condition], device)
    points = CalibSet.load(request.points)
    batches = calibration_batches(points, condition, device, sizes["batch"], request)
    yield make_calibrator(trt, method, batches, request.cache)
    device.synchronize()
    del scratch


@dataclass(frozen=True)
class StepRows:
    """Rows of a bundle's tables of timesteps on the device, by input: a step's own, and in place of later ones too."""

    tables: Mapping[str, NDArray[np.float32]]
    tensors: Mapping[str, DeviceTensor]
    ahead: int

    @staticmethod
    def of(device: Device, tables: Mapping[str, NDArray[np.float32]], ahead: int) -> StepRows:
        own = {name: device.empty(table.shape[1:], "float32") for name, table in tables.items()}
        later = {
            f"{AHEAD}.{name}": device.empty((ahead, *table.shape[1:]), "float32")
            for name, table in tables.items()
            if ahead
        }
        return StepRows(tables, {**own, **later}, ahead)

    def upload(self, device: Device, step: int) -> None:
        """Put the rows of a step into their places."""
        for name, table in self.tables.items():
            device.upload(table[step], self.tensors[name])
            if self.ahead:
                device.upload(np.stack([table[step]] * self.ahead), self.tensors[f"{AHEAD}.{name}"])


def calibration_batches(
    points: CalibSet, condition: TensorRTEngine, device: Device, rows: int, request: CalibrationRequest
) -> Iterator[Batch]:
    """The inputs of a computing segment at every calibration point, batch by batch, on the device.

    Points of one step share a batch; the last of a step is filled up by repeating. `rows` counts guidance halves.
    """
    bundle = open_bundle(request.bundle)
    guidance, examples = Guidance.of(bundle.manifest.model, bundle.manifest.guidance), bundle.examples()
    images = rows // guidance.halves
    timesteps = {
        name: device.empty(port.fixed_shape, port.dtype)
        for name, port in condition.inputs.items()
        if name == TIMESTEPS  # a model whose tables of steps depend on them alone takes none
    }
    alone = StepRows.of(device, tables_of_steps(bundle.tables()), request.ahead)
    conditions = {each.name: device.empty((rows, *each.shape), each.dtype) for each in guidance.conditions}
    tables = {name: device.empty(port.fixed_shape, port.dtype) for name, port in condition.outputs.items()}
    of_steps = {name: table for name, table in tables.items() if not name.startswith(REQUEST)}
    once = {name: table for name, table in tables.items() if name not in of_steps}
    row = {name: device.empty(table.shape[1:], table.dtype) for name, table in of_steps.items()}
    later = {f"{AHEAD}.{name}": table.rows(0, request.ahead) for name, table in of_steps.items() if request.ahead}
    x = device.empty((rows, *points.x.shape[1:]), "float32")
    for name, tensor in (*timesteps.items(), *conditions.items(), *tables.items()):
        condition.bind(name, tensor)
    for step in np.unique(points.step):
        at_step = np.flatnonzero(points.step == step)
        for t in timesteps.values():
            device.upload(np.full(t.shape, points.t[at_step[0]], np.float32), t)
        alone.upload(device, int(step))
        for start in range(0, len(at_step), images):
            part = np.resize(at_step[start : start + images], images)
            asked = examples.of(points.sample[part], points.label[part].tolist())
            for name, values in guidance.row_conditions(asked).items():
                device.upload(np.ascontiguousarray(values), conditions[name])
            device.upload(guidance.rows(points.x[part]), x)
            condition.enqueue()
            for name, table in of_steps.items():
                device.copy(table.row(0), row[name])  # every step of this table is the same timestep
            device.synchronize()
            yield {"x": x, **row, **later, **once, **alone.tensors}  # TensorRT asks for those that the network has


def calibration_caches(bundle: Bundle) -> list[Path]:
    """The calibration caches of this very bundle in its own folder of engines."""
    paths = []
    for segment in (plan.name for plan in bundle.manifest.program.segments if plan.quantizes):
        for method in CALIBRATORS:
            try:
                paths.append(calibration_cache(EngineStore.of(bundle), bundle, segment, method))
            except InputError:  # no FP reference here, so none of its caches can be told from another's
                continue
    return [path for path in paths if path.is_file()]


def scales_from_cache(data: bytes) -> dict[str, float]:
    """The scales in a calibration cache: tensor name -> scale.

    Its lines are `name: hex`, the bits of a float32 in big-endian order; the first line names TensorRT and method.
    """
    header, *lines = data.decode("utf-8", "replace").splitlines() or [""]
    if not header.startswith("TRT-"):
        raise InputError(f"this is no calibration cache of TensorRT: it begins with {header[:20]!r}")
    scales = {}
    for line in filter(None, lines):
        name, _, bits = line.rpartition(":")
        try:
            scales[name] = float(struct.unpack(">f", bytes.fromhex(bits.strip()))[0])
        except (ValueError, struct.error) as e:
            raise InputError(f"the calibration cache is damaged at {line[:40]!r}; remove it and build again") from e
    return scales
