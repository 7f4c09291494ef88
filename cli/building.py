"""`ditc build` as functions: a bundle in, engines in its store out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ditc.bundle import open_bundle
from ditc.engines.building import PlannedBuild, build_engines, plan_build
from ditc.engines.options import BuildOptions
from ditc.files import digest_of
from ditc.progress import Progress

__all__ = ["build_bundle", "planned_build"]

OnPlan = Callable[[dict[str, Any]], None]


def planned_build(bundle: Path, options: BuildOptions) -> dict[str, Any]:
    """What a build would make: platform, memory plan, the engines' keys, and one key over all for a CI cache."""
    return described(_planned(bundle, options))


def build_bundle(
    bundle: Path, options: BuildOptions, *, progress: Progress, on_plan: OnPlan | None = None
) -> dict[str, Any]:
    """Build what is missing; returns the plan with every engine's size and time. `on_plan` sees it before."""
    planned = _planned(bundle, options)
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


def _planned(bundle: Path, options: BuildOptions) -> PlannedBuild:
    return plan_build(open_bundle(bundle), options.settings, store=options.engines, timing_cache=options.timing_cache)
