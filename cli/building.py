"""`ditc build` as functions: a bundle in, engines in its store out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ditc.bundle import Bundle, open_bundle
from ditc.engines.building import PlannedBuild, build_engines, plan_build
from ditc.engines.calibrator import CALIBRATORS
from ditc.engines.store import EXPLICIT, BuildSettings
from ditc.engines.targets import TARGETS
from ditc.errors import InputError, unknown_name
from ditc.files import digest_of
from ditc.progress import Progress

__all__ = ["build_bundle", "planned_build"]

BUILDABLE = ("tensorrt",)
OnPlan = Callable[[dict[str, Any]], None]


def planned_build(bundle: Path, **settings: Any) -> dict[str, Any]:
    """What a build would make: platform, memory plan, the engines' keys, and one key over all for a CI cache."""
    return described(_planned(open_bundle(bundle), settings))


def build_bundle(bundle: Path, *, progress: Progress, on_plan: OnPlan | None = None, **settings: Any) -> dict[str, Any]:
    """Build what is missing; returns the plan with every engine's size and time. `on_plan` sees it before."""
    planned = _planned(open_bundle(bundle), settings)
    plan = described(planned)
    if on_plan is not None:
        on_plan(plan)
    built = build_engines(planned, progress)
    engines = [
        {
            "segment": one.key.segment,
            "file": planned.store.plan_path(one.key).name,
            "built": one.built,
            **one.record.model_dump(
                mode="json", include={"sha256", "size_bytes", "device_memory_bytes", "build_seconds"}
            ),
        }
        for one in built
    ]
    return plan | {"engines": engines}


def described(planned: PlannedBuild) -> dict[str, Any]:
    """A plan as JSON."""
    machine = planned.machine
    return {
        "platform": str(machine.platform),
        "memory": dict(planned.memory.rows()),
        "free_bytes": machine.free_bytes,
        "total_bytes": machine.total_bytes,
        "cache_key": f"ditc-engines-{digest_of(sorted(key.digest for key in planned.keys))}",
        "engines": [
            {"segment": key.segment, "file": planned.store.plan_path(key).name, "present": planned.store.has(key)}
            for key in planned.keys
        ],
    }


def _planned(bundle: Bundle, options: dict[str, Any]) -> PlannedBuild:
    target, dla = options.pop("target"), options.pop("dla")
    if target not in TARGETS:
        raise unknown_name("target", target, BUILDABLE)
    if target not in BUILDABLE:
        raise InputError(f"--target {target} needs no build: it takes the bundle as it is; run it with: ditc run")
    if dla is not None:
        raise InputError(
            "a diffusion transformer does not run on a DLA: its LayerNorm, Softmax and matrix products of two "
            "activations have no DLA layer, and falling back to the GPU costs a copy each; leave --dla out"
        )
    store, timing_cache = options.pop("engines"), options.pop("timing_cache")
    return plan_build(bundle, build_settings(**options), store=store, timing_cache=timing_cache)


def build_settings(*, workspace: int, calibration: str, **options: Any) -> BuildSettings:
    """The settings, or InputError naming the one that makes no sense. `workspace` is in MiB."""
    if calibration not in (EXPLICIT, *CALIBRATORS):
        raise unknown_name("calibration", calibration, (EXPLICIT, *CALIBRATORS))
    if workspace < 1:
        raise InputError(f"--workspace must be at least 1 MiB, found {workspace}")
    try:
        return BuildSettings(workspace_bytes=workspace << 20, calibration=calibration, **options)
    except ValidationError as e:
        first = e.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise InputError(f"--{option}: {first['msg'].lower()}, found {first['input']}") from e
