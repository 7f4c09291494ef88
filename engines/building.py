"""From a bundle to engines: every segment in a child process of its own, one at a time.

A crash or an out-of-memory kill ends one child and becomes one error; engines that were finished stay, and the same
command goes on with the rest. A second build does nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any

from ditc.bundle import Bundle
from ditc.engines.calibrator import CalibrationRequest
from ditc.engines.memory_needs import MemoryNeeds, memory_needs
from ditc.engines.store import (
    CALIBRATION_SET,
    EXPLICIT,
    BuildSettings,
    EngineKey,
    EngineRecord,
    EngineStore,
    segment_file,
)
from ditc.engines.trt_runtime import calibration_cache, wanted_key
from ditc.engines.trt_worker import PLAN, TIMINGS, BuildRequest, MachineDescription
from ditc.errors import CheckError, InputError
from ditc.files import atomic_write, locked, writing
from ditc.openable import check_utf8
from ditc.program import CONDITION, UPDATE
from ditc.progress import Progress

__all__ = [
    "BuiltSegment",
    "PlannedBuild",
    "build_engines",
    "build_file",
    "describe_machine",
    "device_segments",
    "plan_build",
]

# not `-m`: that would put the current folder first on the path, and run a tensorrt.py that lies there
START = "import sys; sys.path[:] = filter(None, sys.path); from ditc.engines.trt_worker import main; "
WORKER = (sys.executable, "-c", START + "sys.exit(main(sys.argv[1:]))")


@dataclass(frozen=True)
class BuiltSegment:
    """The engine of one segment: built now, or found from an earlier build."""

    key: EngineKey
    record: EngineRecord
    built: bool


def device_segments(bundle: Bundle) -> list[str]:
    """All segments that a trajectory on a device calls; `condition` comes first, a calibrator needs its engine."""
    return [*bundle.manifest.program.calls, UPDATE]


def describe_machine(calibration: str = EXPLICIT) -> MachineDescription:
    """TensorRT, GPU and memory of this machine, asked of a child so that no GPU memory stays in use here.

    Raises InputError where there is no GPU, no TensorRT, or none that has this kind of calibration.
    """
    description = _child(["describe", calibration], "looking at the GPU", lambda *_: None)
    return MachineDescription.model_validate(description)


@dataclass(frozen=True)
class PlannedBuild:
    """All decisions before TensorRT is asked to build."""

    bundle: Bundle
    settings: BuildSettings
    store: EngineStore
    machine: MachineDescription
    memory: MemoryNeeds
    timing_cache: Path | None

    @property
    def keys(self) -> list[EngineKey]:
        """The keys of all engines, in the order in which they are built."""
        return [self.key(name) for name in device_segments(self.bundle)]

    def key(self, name: str) -> EngineKey:
        return wanted_key(self.bundle, name, self.machine.platform, self.settings)


def plan_build(
    bundle: Bundle, settings: BuildSettings, *, store: Path | None = None, timing_cache: Path | None = None
) -> PlannedBuild:
    """Look at bundle and machine. Raises InputError where the one does not fit the other."""
    if settings.replay and timing_cache is None:
        raise InputError("--replay builds from a timing cache alone; name one with --timing-cache FILE")
    if timing_cache is not None and settings.replay and not timing_cache.is_file():
        raise InputError(f"{timing_cache} does not exist; --replay needs the timing cache of an earlier build")
    for name in device_segments(bundle):
        segment_file(bundle, name, settings.calibration)
    engines = EngineStore.of(bundle, store)
    for path in (bundle.path, engines.folder, timing_cache or engines.folder):
        check_utf8(path, "TensorRT's builder")
    if settings.calibration != EXPLICIT:
        check_calibratable(bundle)
    memory = memory_needs(bundle, settings.calibration)
    machine = describe_machine(settings.calibration)
    if settings.hardware_compatible and machine.platform.system.endswith("-tegra"):
        raise InputError("--hardware-compatible engines don't exist on JetPack; leave the option out")
    memory.check_fits(machine.total_bytes, settings.workspace_bytes, machine.platform.gpu)
    return PlannedBuild(bundle, settings, engines, machine, memory, timing_cache)


def build_engines(planned: PlannedBuild, progress: Progress) -> list[BuiltSegment]:
    """Build what is missing, one segment after the other. Raises CheckError where TensorRT finds no way."""
    folder = planned.store.folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"another build is writing {folder}; wait for it"):
        for left in folder.glob(".building-*"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        run = _BuildRun(planned, progress)
        return [run.segment(key) for key in planned.keys]


def build_file(segment: Path, sizes: Mapping[str, int], settings: BuildSettings) -> bytes:
    """The plan of one ONNX file, built in a child process and kept nowhere."""
    with tempfile.TemporaryDirectory(prefix="ditc-build-") as folder:
        request = BuildRequest(
            segment=segment.absolute(),
            sizes=dict(sizes),
            settings=settings,
            folder=Path(folder),
            parent=os.getpid(),
        )
        path = Path(folder) / "request.json"
        path.write_bytes(request.model_dump_json().encode())
        _child([str(path)], f"building {segment.name}", lambda *_: None)
        return (Path(folder) / PLAN).read_bytes()


def check_calibratable(bundle: Bundle) -> None:
    """Raise InputError where a calibrator of TensorRT 10 can't be fed from this bundle."""
    partial = [p.name for p in bundle.manifest.program.segments if any(p.compute) and not all(p.compute)]
    if partial:
        raise InputError(
            f"--calibration can't feed segment {partial[0]}, which computes only some branches; "
            "use the explicit form (leave --calibration out)"
        )
    if bundle.manifest.asked.rotate is not None:
        raise InputError(
            f"--calibration starts from the FP form, which knows nothing of --rotate {bundle.manifest.asked.rotate}; "
            "use the explicit form (leave --calibration out)"
        )
    if not (bundle.path / CALIBRATION_SET).is_file():
        raise InputError(f"{bundle.path} has no calibration set; compile it with --precision w8a8")


@dataclass(frozen=True)
class _BuildRun:
    """One build: what all its segments share."""

    planned: PlannedBuild
    progress: Progress

    def segment(self, key: EngineKey) -> BuiltSegment:
        """The engine of one segment, built now unless it is there."""
        name, store = key.segment, self.planned.store
        if store.has(key):
            self.progress(f"{name} (built earlier)", 1, 1)
            return BuiltSegment(key, store.record(key), built=False)
        start = perf_counter()
        with writing(store.folder), tempfile.TemporaryDirectory(prefix=".building-", dir=store.folder) as folder:
            request = Path(folder) / "request.json"
            request.write_bytes(self._request(key, Path(folder)).model_dump_json().encode())
            result = _child([str(request)], f"building segment {name}", self._on_line(name))
            plan = (Path(folder) / PLAN).read_bytes()
            timings = (Path(folder) / TIMINGS).read_bytes()
        record = EngineRecord.of(
            key, plan, device_memory_bytes=result["device_memory_bytes"], build_seconds=perf_counter() - start
        )
        store.put(record, plan)
        if not self.planned.settings.replay:
            atomic_write(self._timing_cache, timings)
        self.progress(name, 1, 1)
        return BuiltSegment(key, record, built=True)

    @property
    def _timing_cache(self) -> Path:
        return self.planned.timing_cache or self.planned.store.timing_cache_path(self.planned.machine.platform)

    def _request(self, key: EngineKey, folder: Path) -> BuildRequest:
        return BuildRequest(
            segment=segment_file(self.planned.bundle, key.segment, self.planned.settings.calibration).absolute(),
            sizes=key.sizes,
            settings=self.planned.settings,
            timing_cache=self._timing_cache.absolute(),
            timing_cache_required=self.planned.timing_cache is not None,
            calibration=self._calibration(key),
            folder=folder.absolute(),
            parent=os.getpid(),
        )

    def _calibration(self, key: EngineKey) -> CalibrationRequest | None:
        """Return the request of a segment that quantizes, whose tables come from the `condition` engine; else None."""
        bundle, store, method = self.planned.bundle, self.planned.store, self.planned.settings.calibration
        quantizing = {part.name for part in bundle.manifest.program.segments if part.quantizes}
        if method == EXPLICIT or key.segment not in quantizing:
            return None
        if any(condition.fresh for condition in bundle.manifest.model.conditions):
            raise InputError(
                f"--calibration {method} can't draw the fresh noise that {bundle.manifest.model.name} is given; leave "
                "it out: the explicit Q/DQ form holds the scales already"
            )
        condition = self.planned.key(CONDITION)
        return CalibrationRequest(
            points=(bundle.path / CALIBRATION_SET).absolute(),
            condition_plan=store.plan_path(condition).absolute(),
            condition_sha256=store.record(condition).sha256,
            bundle=bundle.path.absolute(),
            ahead=bundle.manifest.program.segment(key.segment).ahead,
            cache=calibration_cache(store, bundle, key.segment, method).absolute(),
        )

    def _on_line(self, name: str) -> Progress:
        """Return a listener to TensorRT's phases, one after the other; each moves the bar of its segment."""

        def report(phase: str, done: int, total: int) -> None:
            if done < total:
                self.progress(f"{name} ({phase})", done, total)

        return report


def _child(arguments: Sequence[str], doing: str, report: Progress) -> Any:
    """Run the worker and return its result. Its refusals are raised here; its death is one clear error."""
    with _worker(arguments) as (process, last_words):
        assert process.stdout is not None
        for text in process.stdout:
            line = json.loads(text)
            if "phase" in line:
                report(line["phase"], line["done"], line["of"])
            elif "error" in line:
                raise (CheckError if line["error"] == "check" else InputError)(line["message"])
            elif "result" in line:
                return line["result"]
        code = process.wait()
    raise CheckError(_why_dead(code, doing, list(last_words)))


def _remember(stream: Any, words: deque[str]) -> None:
    words.extend(line.strip() for line in stream if line.strip())


@contextmanager
def _worker(arguments: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], deque[str]]]:
    """The child, and what it says last on stderr, complete after the block. The child does not outlive it."""
    process = subprocess.Popen(  # noqa: S603  our own module, our own arguments
        [*WORKER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    last_words: deque[str] = deque(maxlen=20)
    listener = Thread(target=_remember, args=(process.stderr, last_words), daemon=True)
    listener.start()
    try:
        yield process, last_words
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        listener.join(timeout=5)  # it reads until the child's end; a stream must not be closed under it
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def _why_dead(code: int, doing: str, last_words: list[str]) -> str:
    advice = "engines built so far are kept, and the same command goes on from here"
    if code == -signal.SIGKILL:
        return (
            f"{doing}: the process was killed, likely for want of memory; close programs or lower --workspace; {advice}"
        )
    if code < 0:
        name = signal.Signals(-code).name
        return f"{doing}: TensorRT crashed ({name}); lower --optimization-level or update the driver; {advice}"
    said = last_words[-1] if last_words else "it said nothing"
    return f"{doing}: the process ended with code {code} and no result ({said}); {advice}"
