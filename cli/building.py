"""`ditc build` as functions: a bundle in, engines in its store out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ditc.bundle import open_bundle
from ditc.engines.building import PlannedBuild, build_engines, plan_build
from ditc.engines.options import BuildOptions
from ditc.files import digest_of
from ditc.progress import Progress
from ditc.spec import Record

__all__ = ["BuildPreview", "BuiltEngines", "EngineOnDisk", "EnginePreview", "build_bundle", "preview_build"]


class EnginePreview(Record):
    """An engine to be: the name of its file in the store, and whether it is there already."""

    segment: str
    file: str
    present: bool


class EngineOnDisk(Record):
    """An engine in the store; `built` says whether that was now."""

    segment: str
    file: str
    built: bool
    sha256: str
    size_bytes: int
    device_memory_bytes: int
    build_seconds: float


class BuildPreview(Record):
    """The engines that a build would make, and the memory that they need.

    `memory` is what the trajectory needs of the device, in bytes by what for; of the device's own bytes some are free.
    `cache_key` is one key over all engines, for a CI cache.
    """

    platform: str
    memory: dict[str, int]
    free_bytes: int
    total_bytes: int
    cache_key: str
    engines: tuple[EnginePreview, ...]


class BuiltEngines(Record):
    """The engines of a build, beside what `BuildPreview` says of it."""

    platform: str
    memory: dict[str, int]
    free_bytes: int
    total_bytes: int
    cache_key: str
    engines: tuple[EngineOnDisk, ...]


OnPreview = Callable[[BuildPreview], None]


def preview_build(bundle: Path, options: BuildOptions) -> BuildPreview:
    """Preview a build: platform, memory needs, the engines' keys, and one key over all for a CI cache."""
    return described(_planned(bundle, options))


def build_bundle(
    bundle: Path, options: BuildOptions, *, progress: Progress, on_preview: OnPreview | None = None
) -> BuiltEngines:
    """Build what is missing; returns the preview with every engine's size and time. `on_preview` sees it before."""
    planned = _planned(bundle, options)
    preview = described(planned)
    if on_preview is not None:
        on_preview(preview)
    engines = tuple(
        EngineOnDisk(
            segment=engine.key.segment,
            file=planned.store.plan_path(engine.key).name,
            built=engine.built,
            sha256=engine.record.sha256,
            size_bytes=engine.record.size_bytes,
            device_memory_bytes=engine.record.device_memory_bytes,
            build_seconds=engine.record.build_seconds,
        )
        for engine in build_engines(planned, progress)
    )
    return BuiltEngines(**{**dict(preview), "engines": engines})


def described(planned: PlannedBuild) -> BuildPreview:
    """Return the preview of a planned build."""
    machine = planned.machine
    return BuildPreview(
        platform=str(machine.platform),
        memory=dict(planned.memory.rows()),
        free_bytes=machine.free_bytes,
        total_bytes=machine.total_bytes,
        cache_key=f"ditc-engines-{digest_of(sorted(key.digest for key in planned.keys))}",
        engines=tuple(
            EnginePreview(segment=key.segment, file=planned.store.plan_path(key).name, present=planned.store.has(key))
            for key in planned.keys
        ),
    )


def _planned(bundle: Path, options: BuildOptions) -> PlannedBuild:
    return plan_build(open_bundle(bundle), options.settings, store=options.engines, timing_cache=options.timing_cache)
