"""The veto: where quantization noise exceeds the step-to-step change that a reuse would exploit.

For branch l at step i, whose output y_l(i) would be replaced by that of an earlier step j,

    noise  E = |q_l(i) - y_l(i)| / |y_l(i)|        q: the INT8 segment, y: the FP one, both on the FP trajectory's x_i
    change D = |y_l(j) - y_l(i)| / |y_l(i)|        both FP, each on its own step's x
    ratio    = E / D

with Euclidean norms over images, guidance halves, tokens and channels. E holds what the branches in front of l in the
same step pass on to it; at steps that the bundle leaves in floating point it is 0. Below 1 a reuse errs more than
computing does, and what it errs by can be seen, corrected, extrapolated. Above 1 the difference of two outputs that
INT8 computes is mostly rounding: settings of a cache that are chosen by looking at it rest on noise, an extrapolation
amplifies noise, and computing more often brings little.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import InputError
from ditc.precision import quantized
from ditc.program import CONDITION, FULL, Program
from ditc.progress import Progress, silent
from ditc.quality.branch_probe import BranchProbe, open_branch_probe
from ditc.quality.evaluation import Cells, Veto
from ditc.quality.options import VetoOptions
from ditc.runtime.conditioning import condition_tables
from ditc.runtime.executor import Samples, seeded_request
from ditc.runtime.pipeline import Pipeline, load
from ditc.runtime.reference_run import GuidedRun
from ditc.tables import tables_of_steps

__all__ = ["Veto", "check_has_noise", "reuse_sources", "veto_of"]

Squares = NDArray[np.float64]  # (3, steps, branches): of E's numerator, of D's, of their denominator


def veto_of(
    path: str | PathLike[str],
    options: VetoOptions | None = None,
    *,
    progress: Progress = silent,
) -> Veto:
    """Walk the FP trajectory of a w8a8 bundle and run both forms of its network at every step, on the CPU.

    Raises InputError for a bundle that is not quantized or no longer than the lag, BundleError for one without its FP
    reference.
    """
    options = options or VetoOptions()
    with load(path, reference=True) as pipe, ExitStack() as stack:
        sides = _Sides.of(pipe, stack)
        sources = reuse_sources(pipe.bundle.manifest.program, options.lag)
        squares: Squares = np.zeros((3, *sources.shape))
        for image in range(options.images):
            progress("veto", image, options.images)
            _add_image(squares, sides, sources, options.seed, image)
    progress("veto", options.images, options.images)
    return _report(pipe.bundle, options, sources, squares)


def check_has_noise(bundle: Bundle) -> None:
    """Raise InputError unless the bundle is quantized."""
    if not quantized(bundle.manifest.precision):
        raise InputError(
            f"{bundle.path} is {bundle.manifest.precision}, the veto needs w8a8: nothing in it is quantized, so there "
            "is no noise; compile it with --precision w8a8"
        )


def reuse_sources(program: Program, lag: int | None) -> NDArray[np.int64]:
    """Return the step whose output each branch would reuse at each step, (steps, branches); -1 where there is none.

    `lag` is that of VetoOptions. Raises InputError where no step has another that long before it.
    """
    steps = np.arange(len(program.steps))[:, None]
    compute = np.array([program.segment(step.segment).compute for step in program.steps])  # (steps, branches)
    if lag is None and not compute.all():
        last = np.maximum.accumulate(np.where(compute, steps, 0), axis=0)
        return np.where(compute, -1, last)
    lag = lag or 1
    if lag >= len(steps):
        raise InputError(f"a reuse {lag} steps behind needs more than {lag} steps, found {len(steps)}")
    return np.broadcast_to(np.where(steps >= lag, steps - lag, -1), compute.shape)


@dataclass(frozen=True)
class _Sides:
    """FP trajectory, and the network at its steps in both forms; a probe comes with its side's `condition`."""

    pipe: Pipeline
    run: GuidedRun
    exact: BranchProbe
    int8: BranchProbe
    conditions: tuple[Path, Path]
    unquantized: Collection[int]

    @staticmethod
    def of(pipe: Pipeline, stack: ExitStack) -> _Sides:
        """Open the sides of a bundle whose reference is open. Raises InputError where it is not quantized."""
        bundle = pipe.bundle
        check_has_noise(bundle)
        spec = bundle.manifest.model
        exact, int8 = (
            stack.enter_context(open_branch_probe(path, spec.branches, tables, spec.streams))
            for path, tables in (
                (bundle.reference_path(FULL), tables_of_steps(bundle.tables())),
                (bundle.segment_path(FULL), bundle.tables()),
            )
        )
        conditions = bundle.reference_path(CONDITION), bundle.segment_path(CONDITION)
        return _Sides(pipe, GuidedRun.of(bundle), exact, int8, conditions, bundle.manifest.program.unquantized)


def _add_image(squares: Squares, sides: _Sides, sources: NDArray[np.int64], seed: int, image: int) -> None:
    """Add what one image contributes to every cell; outputs are kept until nothing refers to them any more."""
    request, session = sides.pipe.bundle.examples().in_turn(image, 1), OnnxRuntimeBackend().session
    drawn, _, _ = seeded_request(sides.run.spec, request, seed, image, sides.run.steps)
    rows = sides.run.guidance.row_conditions(drawn)
    exact_tables, int8_tables = (
        condition_tables(session(path), sides.run.columns["t"], rows) for path in sides.conditions
    )
    outputs_of: dict[int, list[Samples]] = {}  # step -> those of FP's branches
    for event in sides.pipe.generate(request, seed=seed, first=image):
        step, x = event.index, sides.run.guidance.rows(event.before)
        outputs_of[step] = exact = sides.exact.run(step, x, exact_tables)
        int8 = exact if step in sides.unquantized else sides.int8.run(step, x, int8_tables)
        for place, (y, q) in enumerate(zip(exact, int8, strict=True)):
            source = int(sources[step, place])
            changed = _square(outputs_of[source][place] - y) if source >= 0 else 0.0
            squares[:, step, place] += _square(q - y), changed, _square(y)
        wanted = set(sources[step + 1 :].ravel().tolist())
        outputs_of = {source: outputs for source, outputs in outputs_of.items() if source in wanted}


def _square(values: Samples) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _report(bundle: Bundle, options: VetoOptions, sources: NDArray[np.int64], squares: Squares) -> Veto:
    manifest, compared = bundle.manifest, sources >= 0
    with np.errstate(divide="ignore", invalid="ignore"):  # a branch that is zero, or doesn't change
        noise, change = (np.sqrt(part / squares[2]) for part in squares[:2])
        ratio = np.sqrt(squares[0] / squares[1])
    known = ratio[compared & np.isfinite(ratio)]
    return Veto(
        model=manifest.model.name,
        images=options.images,
        seed=options.seed,
        lag=options.lag,
        branches=manifest.model.branches,
        t=tuple(step.t for step in manifest.program.steps),
        since=tuple(tuple(None if source < 0 else int(source) for source in row) for row in sources),
        noise=_cells(noise, np.full(compared.shape, True)),
        change=_cells(change, compared),
        ratio=_cells(ratio, compared),
        vetoed=float((known > 1).mean()) if len(known) else 0.0,
    )


def _cells(values: NDArray[np.float64], known: NDArray[np.bool_]) -> Cells:
    """Return numbers as JSON has them, None where there is none."""
    known = known & np.isfinite(values)
    return tuple(
        tuple(float(value) if there else None for value, there in zip(row, mask, strict=True))
        for row, mask in zip(values, known, strict=True)
    )
