"""Built engines on disk: `KEY.plan`, and beside it `KEY.json`, which says what it is and vouches for its bytes.

The key is a digest over everything that an engine is valid for, and it is the file's name, so a stale engine can't be
picked up. A plan is executable content: nothing is handed to TensorRT whose hash does not match its record.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from ditc.bundle import REFERENCE, Bundle
from ditc.errors import InputError
from ditc.files import atomic_write, digest_of, sha256_of
from ditc.program import UPDATE
from ditc.spec import Record

__all__ = [
    "EXPLICIT",
    "BuildSettings",
    "EngineKey",
    "EngineRecord",
    "EngineStore",
    "Platform",
    "embedded_host_code",
    "segment_digest",
    "segment_file",
]

EXPLICIT = "explicit"
CALIBRATION_SET = "calib/calib.npz"
ENGINES = "engines"  # the folder inside a bundle
AGAIN = "build it here with: ditc build BUNDLE --target tensorrt"


class BuildSettings(Record):
    """Settings that decide an engine beside the network. `workspace_bytes` bounds TensorRT's scratch memory.

    `replay` builds from the timing cache alone and fails where a tactic is not in it, so that a build server makes the
    engines that were measured. `calibration` is "explicit" for the Q/DQ form, else the calibrator of TensorRT 10 that
    chooses the scales: "entropy" or "minmax".
    """

    optimization_level: int = Field(default=3, ge=0, le=5)
    workspace_bytes: int = Field(default=1 << 30, ge=1 << 20)
    version_compatible: bool = False
    hardware_compatible: bool = False
    replay: bool = False
    calibration: str = EXPLICIT


class Platform(Record):
    """The platform of a plan: TensorRT's version, the GPU, the operating system and the processor."""

    tensorrt: str
    gpu: str
    compute_capability: str
    system: str
    machine: str

    @property
    def is_ampere_or_later(self) -> bool:
        """True of GPUs that TensorRT's hardware compatibility covers."""
        return float(self.compute_capability) >= 8.0

    def __str__(self) -> str:
        return f"TensorRT {self.tensorrt}, {self.gpu} (SM {self.compute_capability}), {self.system} {self.machine}"


class EngineKey(Record):
    """Everything that an engine is valid for. `graph` is the digest of the segment's files."""

    segment: str = Field(pattern=r"^[\w.-]+$")
    graph: str
    platform: Platform
    sizes: dict[str, int]
    settings: BuildSettings

    @property
    def digest(self) -> str:
        """The key as the file's name. How a tactic was found does not change what the plan is good for."""
        return digest_of(self.model_dump(exclude={"settings": {"replay"}}))

    def serves(self, wanted: EngineKey) -> bool:
        """May an engine with this key run where `wanted` is asked for? The settings of the build are the builder's."""
        return self._mismatch(wanted) is None

    def _mismatch(self, wanted: EngineKey) -> str | None:
        """The first thing in which an engine with this key does not fit, as text."""
        if self.settings.version_compatible:
            return "for the lean runtime of a later TensorRT (--version-compatible)"
        if self.settings.calibration != wanted.settings.calibration:
            return f"built with {self.settings.calibration} calibration, asked for is {wanted.settings.calibration}"
        if self.graph != wanted.graph:
            return "for another network (the bundle has changed since)"
        if self.sizes != wanted.sizes:
            return f"for the shapes {self.sizes}, needed are {wanted.sizes}"
        bound = PLATFORM_FIELDS
        if self.settings.hardware_compatible and wanted.platform.is_ampere_or_later:
            bound = ("tensorrt", "system", "machine")
        for name in bound:
            its, needed = getattr(self.platform, name), getattr(wanted.platform, name)
            if its != needed:
                return f"for {PLATFORM_NAMES[name]} {its}, this machine has {needed}"
        return None


PLATFORM_NAMES = {
    "tensorrt": "TensorRT",
    "compute_capability": "SM",
    "gpu": "GPU",
    "system": "operating system",
    "machine": "processor",
}
PLATFORM_FIELDS = tuple(PLATFORM_NAMES)


class EngineRecord(Record):
    """A plan's description, and the hash that its bytes must have."""

    key: EngineKey
    sha256: str
    size_bytes: int
    device_memory_bytes: int
    build_seconds: float
    built_at: float

    @staticmethod
    def of(key: EngineKey, plan: bytes, *, device_memory_bytes: int, build_seconds: float) -> EngineRecord:
        """The record of a plan that has just been made; `built_at` is in seconds since 1970."""
        return EngineRecord(
            key=_stored(key),
            sha256=hashlib.sha256(plan).hexdigest(),
            size_bytes=len(plan),
            device_memory_bytes=device_memory_bytes,
            build_seconds=build_seconds,
            built_at=time.time(),
        )


def segment_file(bundle: Bundle, name: str, calibration: str = EXPLICIT) -> Path:
    """The file that TensorRT builds a segment from.

    With explicit quantization that is the typed form; a calibrator of TensorRT 10 starts from the FP32 form.
    """
    file = _segment_name(bundle, name, calibration)
    if file in bundle.manifest.files and (bundle.path / file).is_file():
        return bundle.path / file
    if calibration != EXPLICIT:
        raise InputError(
            f"{bundle.path} has no FP reference of segment {name}; compile it with --precision w8a8 --reference, "
            "or copy its reference/ folder too"
        )
    raise InputError(
        f"{bundle.path} has no form of segment {name} for TensorRT; "
        f"compile it again with --precision w8a8 or fp16, found --precision {bundle.manifest.precision}"
    )


def _segment_name(bundle: Bundle, name: str, calibration: str) -> str:
    if name == UPDATE:
        return f"segments/{name}.onnx"
    if calibration == EXPLICIT:
        return f"segments/{name}.trt.onnx"
    reference = f"{REFERENCE}{name}.onnx"
    quantizes = name in {plan.name for plan in bundle.manifest.program.segments if plan.quantizes}
    return reference if quantizes else f"segments/{name}.onnx"


def segment_digest(bundle: Bundle, name: str, calibration: str = EXPLICIT) -> str:
    """A digest of the graph and of every weights file that it may read, from the manifest."""
    extra = () if calibration == EXPLICIT else (CALIBRATION_SET,)
    return files_digest(bundle, segment_file(bundle, name, calibration), *extra)


def files_digest(bundle: Bundle, graph: Path, *extra: str) -> str:
    """A digest over an ONNX file, its weights and further files of a bundle, as its manifest vouches for them."""
    name = graph.relative_to(bundle.path).as_posix()
    portable = f"segments/{graph.name.split('.')[0]}.onnx.data"
    known = bundle.manifest.files
    names = {name, f"{name}.data", portable, *extra}
    return digest_of({file: known[file].sha256 for file in sorted(names) if file in known})


ELF = b"\x7fELF\x02\x01"  # 64 bits, little endian
HOST_MACHINES = {62: "x86-64", 183: "AArch64"}  # e_machine; a GPU's own code is an ELF file too, of machine 190


def embedded_host_code(plan: bytes) -> str | None:
    """The processor that a plan carries code for (an embedded plugin or lean runtime), None where there is none."""
    place = plan.find(ELF)
    while place >= 0:
        if place + 20 <= len(plan):
            machine = struct.unpack_from("<H", plan, place + 18)[0]
            if machine in HOST_MACHINES:
                return HOST_MACHINES[machine]
        place = plan.find(ELF, place + 1)
    return None


@dataclass(frozen=True)
class EngineStore:
    """A folder of plans and records."""

    folder: Path

    @staticmethod
    def of(bundle: Bundle, folder: Path | None = None) -> EngineStore:
        """The store of a bundle: its own folder, or another one."""
        return EngineStore(folder or bundle.path / ENGINES)

    def plan_path(self, key: EngineKey) -> Path:
        return self.folder / f"{key.segment}-{key.digest}.plan"

    def record_path(self, key: EngineKey) -> Path:
        return self.plan_path(key).with_suffix(".json")

    def timing_cache_path(self, platform: Platform) -> Path:
        """One timing cache for all segments: it is bound to the platform, not to the network."""
        return self.folder / f"timing-{digest_of(platform.model_dump())}.cache"

    def has(self, key: EngineKey) -> bool:
        """Is there a whole engine for this very key? A plan whose bytes have changed is none."""
        record = self._record(self.record_path(key))
        path = self.plan_path(key)
        return record is not None and record.key == _stored(key) and path.is_file() and sha256_of(path) == record.sha256

    def put(self, record: EngineRecord, plan: bytes) -> None:
        """Keep an engine. The record comes last: without it the plan is as good as absent."""
        atomic_write(self.plan_path(record.key), plan)
        atomic_write(self.record_path(record.key), record.model_dump_json(indent=1).encode() + b"\n")

    def record(self, key: EngineKey) -> EngineRecord:
        """The record of an engine that `has` found."""
        return EngineRecord.model_validate_json(self.record_path(key).read_bytes())

    def serves(self, wanted: EngineKey) -> bool:
        """Is there an engine for this, whatever its builder's settings were?"""
        return any(record.key.segment == wanted.segment and record.key.serves(wanted) for record in self.records())

    def read(self, wanted: EngineKey) -> tuple[bytes, EngineRecord]:
        """The plan that serves, and its record; where several do, one for this very platform, and the one built last.

        Raises InputError where there is none, saying what the nearest one is for, and where its bytes have changed.
        """
        serving = [record for record in self.records() if record.key.segment == wanted.segment]
        serving = [record for record in serving if record.key.serves(wanted)]
        if not serving:
            raise InputError(self._why_none(wanted))
        record = max(serving, key=lambda each: (each.key.platform == wanted.platform, each.built_at))
        path = self.plan_path(record.key)
        plan = path.read_bytes()
        if hashlib.sha256(plan).hexdigest() != record.sha256:
            raise InputError(
                f"{path} is damaged: it does not match the hash in {path.stem}.json, so it is not loaded; {AGAIN}"
            )
        processor = embedded_host_code(plan)
        if processor is not None:
            raise InputError(
                f"{path} carries {processor} code (a plugin or a runtime), which ditc never runs; remove it, then "
                f"{AGAIN}"
            )
        return plan, record

    def records(self) -> Iterator[EngineRecord]:
        """Every readable record that has its plan beside it."""
        for path in sorted(self.folder.glob("*.json")):
            record = self._record(path)
            if record is not None and path == self.record_path(record.key) and self.plan_path(record.key).is_file():
                yield record

    def _why_none(self, wanted: EngineKey) -> str:
        others = [record.key for record in self.records() if record.key.segment == wanted.segment]
        if not others:
            return f"no engine of segment {wanted.segment} in {self.folder}; {AGAIN}"
        nearest = max(others, key=lambda other: _likeness(wanted, other))
        return f"the engine of segment {wanted.segment} in {self.folder} is {nearest._mismatch(wanted)}; {AGAIN}"

    @staticmethod
    def _record(path: Path) -> EngineRecord | None:
        try:
            return EngineRecord.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return None


def _stored(key: EngineKey) -> EngineKey:
    return key.model_copy(update={"settings": key.settings.model_copy(update={"replay": False})})


def _likeness(a: EngineKey, b: EngineKey) -> int:
    """Count what two keys share."""
    same_platform = sum(getattr(a.platform, name) == getattr(b.platform, name) for name in PLATFORM_FIELDS)
    return int(same_platform + (a.graph == b.graph) + (a.sizes == b.sizes))
