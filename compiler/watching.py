"""The stage that watches: what changes from step to step on FP trajectories without a cache, for who plans by it.

It stands in front of the plan, so nothing is exported yet: torch runs the model, in the executor that will serve.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditc.checks import Watched
from ditc.compiler.plan import Plan
from ditc.compiler.trajectories import WATCH_NOISE, start_requests
from ditc.compiler.work import write_json
from ditc.policies import Watching
from ditc.runtime.host_executor import HostExecutor
from ditc.step_statistics import StepStatistics, SumStatistics, steps_exist
from ditc.streams import Wiring

if TYPE_CHECKING:
    from ditc.compiler.torch_engines import Tensors

__all__ = ["STATISTICS", "WATCH_IMAGES", "StepObserver", "watch"]

STATISTICS = "statistics.npz"
WATCH_IMAGES = 10  # as in SmoothCache, arXiv 2411.10510
LEAST_NORM = 1e-300  # an output that is zero throughout has changed by nothing, or beyond all bounds

Outputs = Mapping[str, NDArray[np.float32]]  # of all branches by the names of cached values, (rows, *shape)
AddUp = Callable[[Outputs], NDArray[np.float32]]  # outputs to their sum, with the gates of the step that was run last
Numbers = NDArray[np.float64]


def watch(plan: Plan, model: Any, wanted: Watching, folder: Path, purpose: int = WATCH_NOISE) -> None:
    """Run some images uncached, and write the statistics of their steps: statistics.npz, and watch.json for people.

    The program of `plan` is the uncached one, the images are those of a purpose's own noise.

    As many images at once as keep within bounds together: the outputs of all branches are held of the step that runs
    and of the last `wanted.window` ones, no others.
    """
    from ditc.compiler.torch_engines import sum_of, watching_engines

    count = plan.options.watch_images or WATCH_IMAGES
    at_most = max(1, plan.batch_size() // (wanted.window + 1))
    wiring = plan.spec.wiring
    observer = StepObserver(wiring, len(plan.program.steps), plan.spec.branch_shape[-1], wanted)
    shown: list[tuple[Tensors, Tensors]] = []
    engines = watching_engines(model, plan.program, lambda *run: shown.append(run))
    runner = HostExecutor(plan.spec, plan.program, plan.tables, engines, plan.options.cfg)
    for part, request in start_requests(plan, runner, count, purpose, at_most):
        for event in request:
            plan.progress("watch", part.start * event.steps + event.index * len(part), count * event.steps)
            inputs, outputs = shown.pop()
            values = {name: outputs[f"cache.{name}"].numpy() for name in wiring.values}
            observer.add(event.index, values, partial(sum_of, model, tables=inputs))
    statistics = observer.statistics(count)
    statistics.save(folder / STATISTICS)
    write_json(folder / "watch.json", summary(statistics).model_dump(mode="json"))


def summary(statistics: StepStatistics) -> Watched:
    """Return the manifest's record: the numbers that a policy decides by, for each kind of branch."""
    changes = {
        kind: tuple(tuple(row[:step].tolist()) for step, row in enumerate(change))
        for kind, change in statistics.relative_by_kind().items()
        if statistics.window
    }
    return Watched(images=statistics.images, changes=changes)


@dataclass
class StepObserver:
    """Adds up the statistics of steps as they are run, requests one after the other, each from step 0 on.

    It holds the outputs of the last `wanted.window` steps: with those of the step that is added `window` + 1 sets.
    """

    wiring: Wiring
    steps: int
    channels: int
    wanted: Watching
    rows: int = 0
    past: deque[Outputs] = field(default_factory=deque)  # the last step first

    def __post_init__(self) -> None:
        self.past = deque(maxlen=self.wanted.window)
        distances, sums = self.wanted.distances, self.wanted.sums + 1
        back, exact = (steps_exist(self.steps, least, n) for least, n in ((1, distances), (0, sums)))
        self._absolute = _zeros(back, len(self.wiring.branches))
        self._relative = _zeros(back, len(self.wiring.branches))
        self._mean = _zeros(exact, self.channels)
        self._gram = _zeros(exact[:, :, None] & exact[:, None], self.channels)
        self._distance = _zeros(exact)

    def add(self, step: int, outputs: Outputs, add_up: AddUp) -> None:
        """Add one step of a request; `add_up` is only called where sums are wanted."""
        if step == 0:
            self.past.clear()
            self.rows += len(next(iter(outputs.values())))
        for back, earlier in enumerate(islice(self.past, self.wanted.distances)):
            self._add_distances(step, back, outputs, earlier)
        if self.wanted.sums:
            self._add_sums(step, [add_up(each) for each in (outputs, *islice(self.past, self.wanted.sums))])
        self.past.appendleft(outputs)

    def _add_distances(self, step: int, back: int, outputs: Outputs, earlier: Outputs) -> None:
        for place, branch in enumerate(self.wiring.branches):  # over all outputs of a branch together
            values = self.wiring.outputs(branch)
            change = np.sum([_norms(outputs[name] - earlier[name]) for name in values], axis=0)
            size = sum(outputs[name][0].size for name in values)
            self._absolute[step, back, place] += change.sum() / size
            norms = np.sum([_norms(outputs[name]) for name in values], axis=0)
            self._relative[step, back, place] += (change / np.maximum(norms, LEAST_NORM)).sum()

    def _add_sums(self, step: int, sums: Sequence[NDArray[np.float32]]) -> None:
        """Add S_0, S_1, ... each (rows, ..., channels); a row counts once, whatever it has of tokens."""
        rows, flat = len(sums[0]), [np.asarray(each, np.float64).reshape(-1, self.channels) for each in sums]
        for back, own in enumerate(flat):
            self._mean[step, back] += rows * own.mean(axis=0)
            self._distance[step, back] += rows * np.abs(own - flat[0]).mean()
            for other, later in enumerate(flat):
                self._gram[step, back, other] += rows * (own * later).mean(axis=0)

    def statistics(self, images: int) -> StepStatistics:
        """Return the means over everything that was added. Raises InputError where a value is not finite."""
        sums = SumStatistics(self._mean / self.rows, self._gram / self.rows, self._distance / self.rows)
        return StepStatistics(
            branches=self.wiring.branches,
            images=images,
            absolute=self._absolute / self.rows,
            relative=self._relative / self.rows,
            sums=sums if self.wanted.sums else None,
        )


def _zeros(exists: NDArray[np.bool_], *sizes: int) -> Numbers:
    """Return an array (*shape of `exists`, *sizes) to add to; NaN where there will be nothing."""
    zeros = np.where(exists, 0.0, np.nan)
    return np.array(np.broadcast_to(zeros.reshape(*zeros.shape, *(1 for _ in sizes)), (*zeros.shape, *sizes)))


def _norms(values: NDArray[np.float32]) -> Numbers:
    """Return the L1 norm of each row, (rows,)."""
    return np.asarray(np.abs(values).reshape(len(values), -1).sum(axis=1, dtype=np.float64))
