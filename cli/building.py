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

__all__ = ["BuildPreview", "BuiltEngines", "EngineOnDisk", "EnginePreview", "build_bundle", "planned_build"]


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
    """What a build would make.

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
    """What a build made, beside what `BuildPreview` says of it."""

    platform: str
    memory: dict[str, int]
    free_bytes: int
    total_bytes: int
    cache_key: str
    engines: tuple[EngineOnDisk, ...]


OnPlan = Callable[[BuildPreview], None]


def planned_build(bundle: Path, options: BuildOptions) -> BuildPreview:
    """What a build would make: platform, memory plan, the engines' keys, and one key over all for a CI cache."""
    return described(_planned(bundle, options))


def build_bundle(
    bundle: Path, options: BuildOptions, *, progress: Progress, on_plan: OnPlan | None = None
) -> BuiltEngines:
    """Build what is missing; returns the plan with every engine's size and time. `on_plan` sees it before."""
    planned = _planned(bundle, options)
    plan = described(planned)
    if on_plan is not None:
        on_plan(plan)
    engines = tuple(
        EngineOnDisk(
            segment=one.key.segment,
            file=planned.store.plan_path(one.key).name,
            built=one.built,
            sha256=one.record.sha256,
            size_bytes=one.record.size_bytes,
            device_memory_bytes=one.record.device_memory_bytes,
            build_seconds=one.record.build_seconds,
        )
        for one in build_engines(planned, progress)
    )
    return BuiltEngines(**{**dict(plan), "engines": engines})


def described(planned: PlannedBuild) -> BuildPreview:
    """Return a plan with what a person asks of it."""
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
