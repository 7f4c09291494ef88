"""The stage that plans: sampler and cache policy to programs, and what "auto" stands for decided by docs/results.md.

A reuse extrapolates where sums are made ahead and, under a sampler that adds noise, few steps in a row reuse
(docs/approximators.md has what noise does to an extrapolation); else it holds, and is compensated unless the sampler
adds noise. Nothing has run by then but the stage `watch` of a policy that asks for it, so settings that make no sense
for a model are refused before anything is lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.choices import Caches, Reuse
from ditc.compiler.calibrating import check_selector_sees
from ditc.compiler.examples import examples_of
from ditc.compiler.options import AUTO, CompileOptions
from ditc.compiler.plan import Plan
from ditc.errors import AdviceWarning, InputError
from ditc.passes import NoSumsError, ends_in_float, program_from_schedule
from ditc.policies import Watching, check_policy, no_reuse, schedule_for, settled_policy, watching_of
from ditc.program import AHEAD, FULL, OF_STEP, Program
from ditc.progress import Progress, silent
from ditc.requests import Examples
from ditc.runtime.samplers import adds_noise, sampler_table
from ditc.schedule import CacheSchedule
from ditc.spec import DiffusionSpec, ModelSpec, SamplerSpec
from ditc.step_statistics import StepStatistics

__all__ = ["SmallPoolError", "make_plan", "plan_to_watch"]

MOST_WITH_NOISE = 3  # reuses in a row that "auto" extrapolates under fresh noise: FORA's with four are better held


class SmallPoolError(InputError):
    """A pool with fewer points than are to be selected from it."""


def make_plan(
    model: Any,
    options: CompileOptions,
    progress: Progress = silent,
    statistics: StepStatistics | None = None,
    examples: Examples | None = None,
) -> Plan:
    """Turn sampler and cache policy into programs: everything that is decided before anything is exported.

    `statistics` are those that the policy asks for, None where it asks for none; `examples` are `examples_of` the model
    where nobody gives others. The plan's options hold no AUTO for `reuse`, `smooth` and `vc`. Raises InputError where
    settings make no sense for the model.
    """
    from ditc.exporter.router_files import read_routers

    examples = examples_of(model)[0] if examples is None else examples
    spec = examples.spec
    columns = own_columns(spec, options)
    advise_on_clipping(spec.sampler, options.sampler_spec(spec.sampler))
    t = [float(value) for value in columns["t"]]
    decode = model.decoder is not None

    def program(schedule: CacheSchedule, caches: Caches) -> Program:
        return program_from_schedule(schedule, t, spec.branches, streams=spec.streams, decode=decode, caches=caches)

    schedule = schedule_for(options.policy, spec, options.steps, statistics, read_routers)
    caches = caches_for(model, options)
    holding = program(_with_reuse(schedule, "hold"), caches)
    if options.caches == "sums" and holding.slots and not makes_sums(holding):
        raise NoSumsError(
            f"--caches sums needs steps that compute everything or nothing, and fewer skips in a row than branches; "
            f"--policy {options.policy} has others: leave --caches out"
        )
    options = options.model_copy(update={"policy": settled_policy(options.policy)})
    quiet = not adds_noise(columns)
    extrapolates = makes_sums(holding) and (quiet or holding.segment(FULL).ahead <= MOST_WITH_NOISE)
    options = decided(options, schedule, extrapolates=extrapolates, compensates=quiet and holding.slots > 0)
    if statistics is not None:
        options = options.model_copy(update={"watch_images": statistics.images})
    cached = program(_with_reuse(schedule, options.reuse), caches)
    deployed = cached if options.float_ends is None else ends_in_float(cached, *options.float_ends)
    uncached = program(no_reuse(spec, options.steps), "branches")
    tables = tables_of_timesteps(model, columns)
    plan = Plan(spec, options, deployed, cached, uncached, columns, progress, examples, step_tables=tables)
    check_pool_suffices(plan)
    check_selector_sees(plan)
    return plan


def plan_to_watch(
    model: Any, options: CompileOptions, progress: Progress = silent, examples: Examples | None = None
) -> tuple[Plan, Watching] | None:
    """Return the uncached program as a plan, and the statistics that the policy needs of it; None where it needs none.

    Raises InputError where settings make no sense for the model, as far as that hangs on no schedule.
    """
    wanted = watching_of(options.policy)
    if wanted is None:
        return None
    from ditc.exporter.protocol import branches_add

    spec = (examples := examples or examples_of(model)[0]).spec
    check_policy(options.policy, spec, options.steps)
    columns = own_columns(spec, options)
    schedule = no_reuse(spec, options.steps).checked(spec)
    caches_for(model, options)  # what it refuses is refused before anything runs
    if wanted.sums and not branches_add(model):
        raise InputError(
            f"--policy {options.policy} looks at sums, and {spec.name} has a branch whose merge() does more than add; "
            "choose another --policy"
        )
    t = [float(value) for value in columns["t"]]
    uncached = program_from_schedule(schedule, t, spec.branches, streams=spec.streams)
    tables = tables_of_timesteps(model, columns)
    plan = Plan(spec, options, uncached, uncached, uncached, columns, progress, examples, step_tables=tables)
    return plan, wanted.within(options.steps)


def tables_of_timesteps(model: Any, columns: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float32]]:
    """Return what the model makes of the timesteps alone, by the inputs of segments: (steps, ...) each."""
    import torch

    from ditc.exporter.protocol import timestep_tables

    with torch.no_grad():
        tables = timestep_tables(model, torch.from_numpy(np.asarray(columns["t"], np.float32)))
    return {f"{OF_STEP}{name}": np.ascontiguousarray(table.numpy(), np.float32) for name, table in tables.items()}


def own_columns(spec: ModelSpec, options: CompileOptions) -> dict[str, NDArray[np.float64]]:
    """Return the columns of the sampler. Raises InputError for settings that the model does not allow."""
    if options.cfg != 1 and not spec.can_be_guided:
        what = "unconditional class" if spec.num_classes else "condition with a null"
        raise InputError(f"{spec.name} has no {what} for guidance; set --cfg 1")
    if not spec.branches and (options.bits is not None or options.policy != "none"):
        raise InputError(
            f"{spec.name} has no branches, so there is nothing to reuse and nothing to quantize; give --policy none "
            "and a --precision without integers"
        )
    return trajectory_table(spec.diffusion, options.sampler_spec(spec.sampler), options.steps)


def advise_on_clipping(own: SamplerSpec, chosen: SamplerSpec) -> None:
    """Warn where the model's own sampler clips the clean sample, and the chosen one can't."""
    if own.clip is not None and chosen.is_read_off:
        warnings.warn(
            f"the model's own sampler clips the clean sample to [-{own.clip:g}, {own.clip:g}], and {chosen.told} "
            "clips nothing; look at its images, or take --sampler ddim",
            AdviceWarning,
            stacklevel=3,
        )


def trajectory_table(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int) -> dict[str, NDArray[np.float64]]:
    """The sampler's columns: from its formula, or read off the scheduler that it names."""
    if sampler.is_read_off:
        from ditc.exporter.multistep import multistep_table

        return multistep_table(diffusion, sampler, steps)
    return sampler_table(diffusion, sampler, steps)


def decided(
    options: CompileOptions, schedule: CacheSchedule, *, extrapolates: bool, compensates: bool
) -> CompileOptions:
    """Return the settings with AUTO replaced.

    `extrapolates` says whether a reuse should, `compensates` whether one that holds is to be compensated. Raises
    InputError where a schedule's file names another `reuse` than the settings do.
    """
    reuse, smooth, vc = options.reuse, options.smooth, options.vc
    named = schedule.reuse if "reuse" in schedule.model_fields_set else None
    if reuse == AUTO:
        reuse = named or ("taylor" if extrapolates else "hold")
    elif named not in (None, reuse):
        raise InputError(
            f"{options.policy} was made for --reuse {named}, found {reuse}; give --reuse {named}, or take reuse out of "
            "that file"
        )
    if smooth == AUTO:
        smooth = "none" if options.bits is None else "smooth"
    if vc == AUTO:
        vc = "std" if compensates and reuse == "hold" else "none"
    return options.model_copy(update={"reuse": reuse, "smooth": smooth, "vc": vc})


def makes_sums(program: Program) -> bool:
    """Does a step that computes leave sums for those that reuse?"""
    return any(AHEAD in part.reads for part in program.segments)


def _with_reuse(schedule: CacheSchedule, reuse: Reuse | str) -> CacheSchedule:
    return CacheSchedule.model_validate(schedule.model_dump() | {"reuse": reuse})


def caches_for(model: Any, options: CompileOptions) -> Caches:
    """Return what a step leaves for later ones: sums where the model allows it, unless the options say otherwise."""
    from ditc.exporter.protocol import branches_add

    if options.caches == "branches":
        return "branches"
    if branches_add(model):
        return "sums"
    if options.caches == "sums":
        raise InputError(
            f"--caches sums needs branches that add to the residual stream; {model.spec.name} has one whose merge() "
            "does more than that: leave --caches out"
        )
    return "branches"


def check_pool_suffices(plan: Plan) -> None:
    """Raise SmallPoolError where the pool will be smaller than what is to be selected from it, before recording it."""
    recorded, options = len(plan.recorded_steps), plan.options
    recorded_points = options.pool_size(recorded) * recorded
    if options.bits is not None and recorded_points < options.points:
        raise SmallPoolError(
            f"the pool will have {recorded_points} points, fewer than the {options.points} asked for; "
            "record more images (--pool) or ask for fewer points (--points)"
        )
