"""Statistics of an FP trajectory without a cache, for policies and reuses that decide by what changes between steps.

All are means over `images`, both guidance halves of each alike. Where step t has no step t - k they are NaN.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import BundleError, InputError
from ditc.files import atomic_write
from ditc.spec import ModelSpec

__all__ = ["StepStatistics", "SumStatistics", "kind_of", "steps_exist"]

Numbers = NDArray[np.float64]
DISTANCES, SUMS = ("absolute", "relative"), ("mean", "gram", "distance")  # arrays in a file


def kind_of(branch: str) -> str:
    """Return the last part of a branch's name, which branches that do the same in each block have in common."""
    return branch.rpartition(".")[2]


def steps_exist(steps: int, least: int, count: int) -> NDArray[np.bool_]:
    """Return where step t has a step t - k, (steps, count), for `count` numbers k from `least` on."""
    t, k = np.ogrid[:steps, least : least + count]
    return np.asarray(t >= k)


@dataclass(frozen=True, eq=False)
class SumStatistics:
    """Moments, per channel, of the sums that all branches together add to the residual stream at a step.

    S_k at step t adds up the outputs of step t - k with the gates of step t: what a reuse of them would add, and S_0 is
    exact. `mean` (steps, window + 1, channels) is of S_k, `gram` (steps, window + 1, window + 1, channels) of S_j S_k,
    and `distance` (steps, window + 1) of |S_k - S_0|, over all channels.
    """

    mean: Numbers
    gram: Numbers
    distance: Numbers

    def places(self) -> list[tuple[Numbers, NDArray[np.bool_]]]:
        """Return each array, and where it has an entry."""
        exists = steps_exist(len(self.distance), 0, self.distance.shape[1])
        return [(self.mean, exists), (self.gram, exists[:, :, None] & exists[:, None]), (self.distance, exists)]


@dataclass(frozen=True, eq=False)
class StepStatistics:
    """Change from step to step of the outputs of `branches`, before the gate, and `sums` where they were asked for.

    `absolute` and `relative` are (steps, window, branches), and [t, k - 1] is of the outputs at steps t and t - k: the
    L1 distance per element, and as a share of the L1 norm at step t. A window of 0 was not asked for.
    """

    branches: tuple[str, ...]
    images: int
    absolute: Numbers
    relative: Numbers
    sums: SumStatistics | None = None

    def __post_init__(self) -> None:
        back = steps_exist(self.steps, 1, self.window)
        places = [(self.absolute, back), (self.relative, back), *([] if self.sums is None else self.sums.places())]
        if not all(np.isfinite(array[exists]).all() for array, exists in places):
            raise InputError("the trajectories that were watched have NaN or infinite values; the model diverges")

    @property
    def steps(self) -> int:
        return len(self.absolute)

    @property
    def window(self) -> int:
        """The number of steps that the distances look back at."""
        return int(self.absolute.shape[1])

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every branch."""
        return tuple(map(kind_of, self.branches))

    def check_fits(self, spec: ModelSpec, steps: int) -> None:
        """Raise InputError unless these are of the branches of a model, over so many steps."""
        if (self.branches, self.steps) != (spec.branches, steps):
            raise InputError(
                f"these statistics are of {self.steps} steps and {len(self.branches)} branches, and {spec.name} takes "
                f"{steps} steps and has {len(spec.branches)}; watch it anew"
            )

    def relative_by_kind(self) -> dict[str, Numbers]:
        """Return the mean relative change of the branches of each kind, (steps, window)."""
        places = {kind: [own == kind for own in self.kinds] for kind in dict.fromkeys(self.kinds)}
        return {kind: self.relative[:, :, own].mean(axis=-1) for kind, own in places.items()}

    def absolute_over_branches(self) -> Numbers:
        """Return the mean absolute change of all branches, (steps, window)."""
        return np.asarray(self.absolute.mean(axis=-1))

    def sizes(self) -> Numbers:
        """Return how large the outputs of branches are, mean |y| per element: (steps, branches), by both distances.

        Step 0 changes from nothing and is taken to be as large as step 1; an output that stands still counts as 0.
        """
        absolute, relative = (np.nansum(each[1:], axis=1) for each in (self.absolute, self.relative))
        sizes = np.divide(absolute, relative, out=np.zeros_like(absolute), where=relative > 0)
        return np.concatenate([sizes[:1], sizes])

    def save(self, path: Path) -> None:
        """Write everything as one npz file."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in DISTANCES}
        if self.sums is not None:
            arrays |= {name: getattr(self.sums, name) for name in SUMS}
        buffer = BytesIO()
        np.savez(buffer, branches=np.array(self.branches), images=np.array(self.images), **arrays)
        atomic_write(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> StepStatistics:
        """Read what `save` wrote. Raises BundleError for another file."""
        try:
            with path.open("rb") as file:
                arrays = dict(np.load(file, allow_pickle=False))
            sums = SumStatistics(**{name: arrays[name] for name in SUMS}) if SUMS[0] in arrays else None
            branches = tuple(str(name) for name in arrays["branches"])
            distances = {name: arrays[name] for name in DISTANCES}
            return StepStatistics(branches, int(arrays["images"]), sums=sums, **distances)
        except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as e:
            raise BundleError(f"{path} has no statistics of steps ({e}); compile again") from e
