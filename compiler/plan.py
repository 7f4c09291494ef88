"""The plan of a compile: all that is decided before anything of it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.calibset import CalibSet
from ditc.compiler.options import CompileOptions
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.guidance import Guidance
from ditc.program import REUSE_ROWS, Program
from ditc.progress import Progress
from ditc.quantize.scale_binding import BINDINGS, Groups, steps_in_time_groups
from ditc.requests import Examples, Request
from ditc.runtime.approximation import first_rows
from ditc.spec import ModelSpec
from ditc.tables import DYNAMIC, sampler_tables

__all__ = ["LARGEST_BATCH", "Plan", "Segments"]

Segments = Mapping[str, Path]

BUFFER_BYTES = 1 << 28  # cache slots, or probed activations, that one batch of compile-time work may take
LARGEST_BATCH = 64


@dataclass(frozen=True)
class Plan:
    """The decisions before anything runs. `threads` are those of what runs on the way; 0 lets ONNX Runtime choose.

    `cached_program` is `program` with nothing quantized: what is exported, and what records the pool. `columns` are the
    sampler's, each (steps,). `examples` are the conditions of all images on the way. `step_tables` are those that the
    model makes of the timesteps alone, by the inputs that take a row of each, (steps, ...). `learned_rows` are the
    numbers of a reuse that has learned them, (steps, n, channels).
    """

    spec: ModelSpec
    options: CompileOptions
    program: Program
    cached_program: Program
    reference_program: Program
    columns: Mapping[str, NDArray[np.float64]]
    progress: Progress
    examples: Examples
    threads: int = 0
    step_tables: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    learned_rows: NDArray[np.float32] | None = None

    @property
    def guidance(self) -> Guidance:
        return Guidance.of(self.spec, self.options.cfg)

    @property
    def halves(self) -> int:
        """Network rows of an image."""
        return self.guidance.halves

    @property
    def backend(self) -> OnnxRuntimeBackend:
        return OnnxRuntimeBackend(threads=self.threads)

    @property
    def served_at_once(self) -> int:
        """Images of a request of the compiled program on the way: one where a scale is that of all images together."""
        return 1 if self.options.scales == DYNAMIC else LARGEST_BATCH

    @property
    def tables(self) -> dict[str, NDArray[Any]]:
        """The tables of a bundle that nothing has to run for: the sampler's, and what hangs on the timestep alone."""
        return {**sampler_tables(self.columns), **self.step_tables}

    @property
    def reuse_tables(self) -> dict[str, NDArray[np.float32]]:
        """The numbers with which steps combine what they reuse, as far as they are known before anything runs."""
        rows = self.learned_rows
        if rows is None and self.program.slots:
            rows = first_rows(self.program, self.spec.branch_shape[-1])
        return {} if rows is None else {REUSE_ROWS: rows}

    @property
    def recorded_program(self) -> Program:
        """The program whose points enter the pool: the one that will serve, in FP, or the one without a cache."""
        return self.reference_program if self.options.pool_steps == "uncached" else self.cached_program

    @property
    def recorded_steps(self) -> set[int]:
        """The steps whose points enter the pool: none of those that compute in floating point."""
        every, segment_of = self.options.pool_steps != "computed", self.program.segment
        called = {step.index: segment_of(step.segment) for step in self.program.steps}
        return {index for index, part in called.items() if part.quantizes or (every and not part.in_float)}

    def scale_groups(self, calib: CalibSet) -> Groups | None:
        """Group the steps, (steps,): a group shares activation scales. None where nothing is calibrated."""
        time_groups, steps = BINDINGS[self.options.scales].time_groups, self.program.steps
        if time_groups is None:
            return None
        quantizes = np.array([self.program.segment(step.segment).quantizes for step in steps])
        points = np.bincount(calib.step, minlength=len(steps))
        return steps_in_time_groups(points, quantizes, time_groups(len(steps), self.options.group_count))

    def labels(self, count: int) -> list[int]:
        """Return `count` classes, every class equally often, in a seeded order."""
        rng = np.random.default_rng(self.options.seed)
        classes = self.spec.num_classes or 1
        rounds = -(-count // classes)
        return [int(label) for _ in range(rounds) for label in rng.permutation(classes)][:count]

    def request(self, part: range | int) -> Request:
        """Return the request of some images, or of the first so many: their `labels`, other conditions in turn."""
        part = range(part) if isinstance(part, int) else part
        return self.examples.of(part, self.labels(part.stop)[part.start :])

    def batch_size(self, at_most: int = LARGEST_BATCH) -> int:
        """Return how many images' cache slots stay within bounds."""
        slots = self.spec.cached_numbers * 4 * self.halves
        return int(np.clip(BUFFER_BYTES // max(slots, 1), 1, at_most))

    def batches(self, count: int, at_most: int = LARGEST_BATCH) -> list[range]:
        """Return image numbers in batches whose cache slots stay within bounds."""
        size = self.batch_size(at_most)
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    @property
    def probed_at_once(self) -> int:
        """Points whose activations in front of all linear layers stay within bounds, together."""
        # every block has 3 of them of the model's width and one of the MLP's: 7 widths in a standard block
        point_bytes = 4 * self.halves * 7 * self.spec.cached_numbers // 2
        return int(np.clip(BUFFER_BYTES // max(point_bytes, 1), 1, LARGEST_BATCH))
