"""The stages of a reuse that learns its numbers: least squares over the sums that a step combines, for each channel.

    learn         in the open loop: from the Gram matrices of sums on FP trajectories without a cache, before the pool
    close_loop    in the closed loop: step after step, on trajectories of the compiled program under its own forecasts

Both are drawn towards the row's `weights` by a ridge (compiler/ridge.py), whose strength is chosen for each step on
noise that is held out from the fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.approximators import APPROXIMATORS
from ditc.bundle import read_tables
from ditc.compiler.fitting import ReuseWalk, reuse_walk, rows_summary, write_rows
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.ridge import chosen_weights
from ditc.compiler.trajectories import HELD_NOISE, REUSE_NOISE, executor, start_requests
from ditc.compiler.watching import STATISTICS, WATCH_IMAGES, watch
from ditc.policies import Watching
from ditc.program import REUSE_ROWS, Program, Step, distance_of
from ditc.runtime.approximation import Moments, Rows, first_rows
from ditc.runtime.closeness import relative_error
from ditc.runtime.executor import Samples
from ditc.step_statistics import StepStatistics, SumStatistics
from ditc.tables import Tables

__all__ = ["LEARNED_ON", "close_loop", "learn", "learned_plan", "learns", "sums_to_watch", "watch_sums"]

# the stages that watch what is learned from, and their noise: what is fitted, and what its strength is chosen on
LEARNED_ON = {"sums": REUSE_NOISE, "held": HELD_NOISE}

Numbers = NDArray[np.float64]


def learns(plan: Plan) -> bool:
    """Does the reuse of a plan learn its numbers, and does a step take any?"""
    return APPROXIMATORS[plan.options.reuse].learned is not None and bool(combining_steps(plan.program))


def combining_steps(program: Program) -> list[Step]:
    """Return the steps that combine several sums."""
    return [step for step in program.steps if program.segment(step.segment).rows]


def sums_to_watch(plan: Plan) -> Watching:
    """Return the statistics that its reuse learns from: as far back as the schedule reaches."""
    steps = combining_steps(plan.program)
    return Watching(sums=max(distance_of(value) for step in steps for value in step.reads))


def watch_sums(plan: Plan, model: Any, purpose: int, folder: Path) -> None:
    """Watch the sums of the uncached program on a purpose's noise: statistics.npz."""
    uncached = plan.reference_program.model_copy(update={"epilogue": ()})
    watch(replace(plan, program=uncached), model, sums_to_watch(plan), folder, purpose)


def learn(plan: Plan, watched: Sequence[Path], folder: Path) -> None:
    """Fit each step's numbers to the first of two `watch_sums` folders, their strength to the second: as `approximate`.

    Nothing but Gram matrices is read, and they are as large for any number of images.
    """
    fitted, held_out = (StepStatistics.load(path / STATISTICS).sums for path in watched)
    assert fitted is not None
    assert held_out is not None
    rows, strengths = numbers_before(plan), []
    for step in combining_steps(plan.program):
        pair = gram_of(fitted, step), gram_of(held_out, step)
        strengths.append(fill_in(rows, step, *pair))
    images = plan.options.watch_images or WATCH_IMAGES
    write_rows(folder, rows, rows_summary(plan, rows, images, ridge=counted(strengths)))


def learned_plan(plan: Plan, folder: Path) -> Plan:
    """Return the plan with the numbers that `learn` has left in its folder."""
    options = plan.options.model_copy(update={"watch_images": plan.options.watch_images or WATCH_IMAGES})
    rows = read_tables(folder / "approximate.safetensors")[REUSE_ROWS]
    return replace(plan, options=options, learned_rows=np.asarray(rows, np.float32))


def close_loop(plan: Plan, segments: Segments, compiled: Segments, tables: Tables, folder: Path) -> None:
    """Fit each step's numbers anew, on samples that those of the steps before have led to: files as `approximate`'s.

    The exact sum is FP's on its own trajectory of the same noise. What the open loop has learned stays where whole
    trajectories, of all images that are fitted or held out, end up nearer to FP's with it.
    """
    purposes = tuple(LEARNED_ON.values())
    with reuse_walk(plan, segments, compiled, tables, purposes) as walk:
        walk.rows[...] = numbers_before(plan)
        strengths = list(closed_strengths(plan, walk))
        choices = {"closed": np.array(walk.rows), "open": plan.reuse_tables[REUSE_ROWS]}
        exact = walk.exact
    errors = {
        name: rollout_error(plan, compiled, {**tables, REUSE_ROWS: rows}, exact) for name, rows in choices.items()
    }
    rows = choices[min(errors, key=lambda name: errors[name])]
    learned = {"ridge": counted(strengths), "rollout": errors}
    write_rows(folder, rows, rows_summary(plan, rows, plan.options.vc_images, **learned))


def closed_strengths(plan: Plan, walk: ReuseWalk) -> Iterator[float]:
    """Walk to the end, filling in the numbers of each step in front of it; yield the strengths of their ridges."""
    for step in plan.program.steps:
        if plan.program.segment(step.segment).rows:
            pair = (gram_from(walk.moments(step, purpose)) for purpose in LEARNED_ON.values())
            yield fill_in(walk.rows, step, *pair)
        walk.advance()


def rollout_error(plan: Plan, compiled: Segments, tables: Tables, exact: Mapping[int, Sequence[Samples]]) -> float:
    """Return the relative error of the compiled program's samples against FP's by purpose, mean over all steps."""
    errors = []
    with executor(plan, plan.program, compiled, tables) as runner:
        for purpose, samples in exact.items():
            for part, request in start_requests(plan, runner, len(samples[0]), purpose, plan.served_at_once):
                errors += [
                    len(part) * relative_error(event.x, samples[event.index][part.start : part.stop])
                    for event in request
                ]
    return float(np.sum(errors) / (len(plan.program.steps) * sum(len(samples[0]) for samples in exact.values())))


def numbers_before(plan: Plan) -> Rows:
    """Return the table that learning begins with, and is drawn towards."""
    rows = first_rows(plan.program, plan.spec.branch_shape[-1])
    assert rows is not None
    return rows


def fill_in(rows: Rows, step: Step, fitted: Numbers, held_out: Numbers) -> float:
    """Replace a step's numbers by those that it learns, and return the strength of their ridge."""
    count = len(step.reads)
    weights, strength = chosen_weights(fitted, held_out, np.float64(rows[step.index, :count, 0]))
    rows[step.index, :count] = weights
    return strength


def gram_of(sums: SumStatistics, step: Step) -> Numbers:
    """Return the Gram matrix of the exact sum and of those that a step combines, the latest first."""
    places = [0, *sorted(map(distance_of, step.reads))]
    return np.asarray(sums.gram[step.index][np.ix_(places, places)])


def gram_from(moments: Moments) -> Numbers:
    """Return the same of moments, in which the exact one comes last."""
    return np.roll(moments.products / moments.count, 1, axis=(0, 1))


def counted(strengths: Sequence[float]) -> dict[str, int]:
    """Return the number of steps by strength, the strongest first."""
    counts = Counter(strengths)
    return {f"{strength:g}": counts[strength] for strength in sorted(counts, reverse=True)}
