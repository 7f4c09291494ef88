"""The child process of a build.

It talks in lines of JSON on stdout: {"phase", "done", "of"} while it works, {"error", "message"} where it refuses, and
{"result": ...} at the end. TensorRT can crash or be killed for want of memory; then only this process dies.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

from ditc.engines.calibrator import CalibrationRequest, check_calibrators, open_calibrator
from ditc.engines.store import EXPLICIT, BuildSettings, Platform
from ditc.errors import CheckError, DitcError
from ditc.files import atomic_write
from ditc.spec import Record

__all__ = ["BuildRequest", "MachineDescription", "main"]

PLAN, TIMINGS = "plan", "timings"  # what a build leaves in its folder


class BuildRequest(Record):
    """One segment to build into `folder`, and the process that waits for it."""

    segment: Path
    sizes: dict[str, int]
    settings: BuildSettings
    timing_cache: Path | None = None
    timing_cache_required: bool = False
    calibration: CalibrationRequest | None = None
    folder: Path
    parent: int


class MachineDescription(Record):
    """The machine that will build engines."""

    platform: Platform
    free_bytes: int
    total_bytes: int


class Parent:
    """The pipe to the parent. It alone gets lines of ours: whatever libraries print goes to stderr.

    TensorRT reports progress from several threads, so a line is written under a lock.
    """

    def __init__(self) -> None:
        self._pipe = os.fdopen(os.dup(1), "w")
        self._lock = Lock()
        os.dup2(2, 1)

    def say(self, **line: Any) -> None:
        with self._lock:
            self._pipe.write(json.dumps(line) + "\n")
            self._pipe.flush()


def describe(calibration: str) -> dict[str, Any]:
    """The machine, seen by a process that ends and gives its GPU memory back."""
    from ditc.engines.device import open_device
    from ditc.engines.trt import import_tensorrt, platform_of

    trt = import_tensorrt()
    if calibration != EXPLICIT:
        check_calibrators(trt, calibration)
    device = open_device()
    free, total = device.memory_bytes()
    description = MachineDescription(platform=platform_of(trt, device), free_bytes=free, total_bytes=total)
    return description.model_dump(mode="json")


def build(request: BuildRequest, parent: Parent) -> dict[str, Any]:
    """Build one segment; plan and timing cache are left in the request's folder."""
    from ditc.engines.trt import import_tensorrt
    from ditc.engines.trt_builder import TimingCache, build_engine

    trt = import_tensorrt()
    cache = TimingCache(required=request.timing_cache_required)
    if request.timing_cache is not None and request.timing_cache.is_file():
        cache = TimingCache(
            request.timing_cache.read_bytes(), f"timing cache {request.timing_cache}", request.timing_cache_required
        )

    def report(phase: str, done: int, total: int) -> bool:
        if total:
            parent.say(phase=phase, done=done, of=total)
        return os.getppid() == request.parent  # nobody waits any more: stop

    with contextlib.ExitStack() as stack:
        calibrator = None
        if request.settings.calibration != EXPLICIT and request.calibration is not None:
            calibrator = stack.enter_context(
                open_calibrator(trt, request.settings.calibration, request.calibration, request.sizes)
            )
        built = build_engine(
            trt,
            request.segment,
            request.sizes,
            request.settings,
            timing_cache=cache,
            report=report,
            calibrator=calibrator,
        )
        failure = getattr(calibrator, "failure", None)
        if failure is not None:
            raise failure
    atomic_write(request.folder / PLAN, built.plan)
    atomic_write(request.folder / TIMINGS, built.timing_cache)
    return {"device_memory_bytes": 0 if request.settings.version_compatible else _scratch_bytes(trt, built.plan)}


def _scratch_bytes(trt: Any, plan: bytes) -> int:
    """Return the memory that a run needs beside the weights; opening the engine also shows that it opens at all.

    A version-compatible plan opens under the lean runtime only, so of that it stays unknown.
    """
    from ditc.engines.trt import open_runtime

    runtime, log = open_runtime(trt)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise CheckError(f"TensorRT {trt.__version__} does not take back the plan it has just made: {log.last_error}")
    return int(engine.device_memory_size_v2)


def main(arguments: list[str]) -> int:
    """Run one request; the exit code only says whether a result was said."""
    parent = Parent()
    try:
        if arguments[0] == "describe":
            result = describe(arguments[1])
        else:
            result = build(BuildRequest.model_validate_json(Path(arguments[0]).read_bytes()), parent)
    except DitcError as e:
        parent.say(error="check" if isinstance(e, CheckError) else "input", message=str(e))
        return 1
    parent.say(result=result)
    return 0
