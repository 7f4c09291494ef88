"""Outputs of a bundle's segments where it was compiled, so that a machine where they give something else is noticed.

A compile lets one image walk the compiled program. It keeps the sample in front of the first and the last step that
each segment runs at, and of the steps whose caches those take, and what every segment returns there: in the portable
form, in a backend's own where that computes other numbers, and in the typed one of GPUs. Random inputs would not do,
since what saturates does so at values that occur. Elsewhere the same steps run on the same samples, and each output is
held to the one that was kept.

Rounding differs between machines, and beside a rounding point of INT8 it makes a difference of a whole step. How much
that changes an output is measured where the bundle is compiled, by moving the samples about as far as rounding moves
what is computed from them, or, where there are integers, so far that some of them do change: then one that changes
elsewhere is within what was seen. An output that saturated is off by several times as much (ADR 0023).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import read_tables, write_tables
from ditc.errors import BundleError, InputError
from ditc.program import DECODE, UPDATE, Program
from ditc.requests import Request
from ditc.runtime.executor import Executor, Samples
from ditc.spec import LABEL as LABEL_CONDITION
from ditc.spec import ModelSpec

__all__ = [
    "FINGERPRINT",
    "PORTABLE",
    "TYPED",
    "Difference",
    "Expected",
    "Fingerprint",
    "expected",
    "moved_samples",
    "observer",
    "relative_l2",
    "steps_to_keep",
    "types_of_calls",
]

FINGERPRINT = "fingerprint.safetensors"  # in the folder of a bundle
LABEL, CONDITION, SAMPLE, OUTPUT, TOLERANCE = "label", "condition", "sample", "output", "tolerance"  # how names begin
VALUES = 1 << 11  # of one output that are kept, at most
PORTABLE, TYPED = "portable", "typed"  # the forms of segments; a backend's own has its name


class Rounding(NamedTuple):
    """A type's rounding: how far samples are moved to see what it does, and the least that outputs may differ by.

    `flips` is how far they are moved where activations are rounded to integers: so far that some fall on the other side
    of a rounding point in every move, for few do of what rounding alone moves, and then seldom the same.
    """

    moves: float
    flips: float
    least: float


# relative, an output's in the L2 norm
ROUNDING: Mapping[str, Rounding] = {
    "f32": Rounding(moves=1e-5, flips=1e-4, least=1e-4),
    "f16": Rounding(moves=1e-3, flips=1e-3, least=1e-2),
    "bf16": Rounding(moves=4e-3, flips=4e-3, least=3e-2),
}
MOVES = 3  # of all samples, by random numbers
LOST = 1.0  # a tolerance that lets everything pass, as of what is nothing, or no number, without a move or with one
MARGIN = 2.0  # over the largest difference that they made

Outputs = Mapping[tuple[str, str], NDArray[np.float32]]  # (call, port) -> values, (at most VALUES,)
Observer = Callable[[Mapping[int, Samples]], Outputs]


class Difference(NamedTuple):
    """Distance of an output here from the one that was kept, and how far it may be: relative, in the L2 norm."""

    call: str
    port: str
    error: float
    tolerance: float

    @property
    def is_rounding(self) -> bool:
        """Is it no more than rounding makes? Never where rounding makes anything of it."""
        return self.error <= self.tolerance < LOST

    @property
    def excess(self) -> float:
        """The error in tolerances."""
        return self.error / self.tolerance if self.tolerance < LOST else float("inf")

    @property
    def told(self) -> str:
        """The same in words."""
        seen = f"{self.port} of {self.call} differs by {self.error:.1e} (relative L2)"
        if self.tolerance < LOST:
            return f"{seen}, expected at most {self.tolerance:.1e}"
        return f"{seen}, and rounding alone may take it {self.tolerance:.1e} away, so nothing can be held to it"

    @property
    def segment(self) -> str:
        return _segment(self.call)


class Expected(NamedTuple):
    """Outputs that one form gave, and how far each call's may be from them by the type around the integers."""

    outputs: Outputs
    tolerances: Mapping[str, Mapping[str, float]]  # call -> type -> relative error

    def holds(self, outputs: Outputs) -> bool:
        """Are outputs computed in float32 no further off than rounding takes them?"""
        return all(each.is_rounding for each in self.differences(outputs, dict.fromkeys(self.tolerances, "f32")))

    def differences(self, outputs: Outputs, types: Mapping[str, str]) -> list[Difference]:
        """Return one for each of the outputs, in the order of the calls; `types` is what each call is computed in.

        Raises BundleError where others were kept.
        """
        shapes = {key: values.shape for key, values in self.outputs.items()}
        for key, values in outputs.items():
            if shapes.get(key) != values.shape or types[key[0]] not in self.tolerances.get(key[0], {}):
                raise _misfit(" ".join(key))
        return [
            Difference(*key, relative_l2(values, self.outputs[key]), self.tolerances[key[0]][types[key[0]]])
            for key, values in outputs.items()
        ]


@dataclass(frozen=True)
class Fingerprint:
    """`samples` are those in front of the steps that are run, (1, channels, *space) by step, and the finished
    one under the number of steps; `request` has the image's conditions; `forms` what each form gave there.
    """

    request: Request
    samples: Mapping[int, Samples]
    forms: Mapping[str, Expected]

    @staticmethod
    def of(folder: Path) -> Fingerprint:
        """That of a bundle. Raises BundleError where it has none."""
        if not (folder / FINGERPRINT).is_file():
            raise BundleError(f"{folder} has no fingerprint: it was compiled before there were any; compile it again")
        try:
            return _read(read_tables(folder / FINGERPRINT))
        except (KeyError, ValueError, IndexError, TypeError) as e:
            raise BundleError(f"{folder / FINGERPRINT} is no fingerprint ({e!r}); compile the bundle again") from e

    def check_fits(self, program: Program, spec: ModelSpec) -> None:
        """Raise BundleError unless the samples are of this model, and every step that is run finds its caches."""
        steps = {step for step in self.samples if 0 <= step < len(program.steps)}
        if PORTABLE not in self.forms:
            raise _misfit("it has no portable form")
        self._check_conditions(spec, len(program.steps))
        if not steps or self.samples.keys() - steps != {len(program.steps)}:
            raise _misfit(f"steps {sorted(self.samples)}")
        for step, sample in self.samples.items():
            if sample.shape != (1, *spec.latent_shape) or sample.dtype != np.float32:
                raise _misfit(f"sample {step} of {sample.dtype} {sample.shape}")
        if missing := {writer for step in steps for writer in _writers(program)[step]} - steps:
            raise _misfit(f"no sample of step {min(missing)}")

    def _check_conditions(self, spec: ModelSpec, steps: int) -> None:
        """Raise BundleError unless the image has the conditions of this model."""
        fresh = {each.name: (steps, 1, *each.shape) for each in spec.conditions if each.fresh}
        given = {name: array for name, array in self.request.arrays.items() if name not in fresh}
        if spec.num_classes is not None and not 0 <= self.request.labels[0] < spec.num_classes:
            raise _misfit(f"label {self.request.labels[0]}")
        try:
            Request.of(spec, None, given, 1)
        except InputError as e:
            raise _misfit(str(e)) from e
        if any(self.request.arrays.get(name, np.empty(0)).shape != shape for name, shape in fresh.items()):
            raise _misfit(f"noise of the conditions {sorted(fresh)}")

    def save(self, folder: Path) -> None:
        write_tables(folder / FINGERPRINT, dict(_written(self)))


def _written(fingerprint: Fingerprint) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, array in fingerprint.request.arrays.items():
        yield (LABEL if name == LABEL_CONDITION else f"{CONDITION}/{name}"), array
    for step, sample in fingerprint.samples.items():
        yield f"{SAMPLE}/{step}", sample
    for form, expectation in fingerprint.forms.items():
        for (call, port), values in expectation.outputs.items():
            yield f"{OUTPUT}/{form}/{call}/{port}", values
        for call, by_rest in expectation.tolerances.items():
            for rest, tolerance in by_rest.items():
                yield f"{TOLERANCE}/{form}/{call}/{rest}", np.array([tolerance])


def _read(tables: Mapping[str, NDArray[Any]]) -> Fingerprint:
    samples: dict[int, Samples] = {}
    conditions = {LABEL_CONDITION: np.array([int(tables[LABEL][0])])} if LABEL in tables else {}
    outputs: dict[str, dict[tuple[str, str], NDArray[np.float32]]] = defaultdict(dict)
    tolerances: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for name, table in tables.items():
        match name.split("/"):
            case [kind, step] if kind == SAMPLE:
                samples[int(step)] = table
            case [kind, condition] if kind == CONDITION:
                conditions[condition] = table
            case [kind, form, call, port] if kind == OUTPUT:
                outputs[form][call, port] = table
            case [kind, form, call, rest] if kind == TOLERANCE:
                tolerances[form][call][rest] = float(table[0])
    forms = {form: Expected(values, tolerances[form]) for form, values in outputs.items()}
    return Fingerprint(Request(1, conditions), samples, forms)


def steps_to_keep(program: Program) -> list[int]:
    """The first and the last step of each segment, and the steps that write what those read."""
    read_from, calls = _writers(program), defaultdict[str, list[int]](list)
    for step in program.steps:
        calls[step.segment].append(step.index)
    steps: set[int] = set()
    wanted = {step for numbers in calls.values() for step in (numbers[0], numbers[-1])}
    while wanted:
        steps |= wanted
        wanted = {writer for step in wanted for writer in read_from[step]} - steps
    return sorted(steps)


def _writers(program: Program) -> list[set[int]]:
    """Of each step, the steps that wrote what it reads."""
    writers: dict[int, int] = {}
    read_from = []
    for step in program.steps:
        read_from.append({writers[slot] for slot in step.reads.values()})
        writers |= dict.fromkeys(step.writes.values(), step.index)
    return read_from


def types_of_calls(program: Program, types: Mapping[str, str]) -> dict[str, str]:
    """Return the type that each call is computed in, where each segment is in its own of `types`.

    A step is as coarse as the coarsest that its caches come from, and so is the sample after it.
    """
    type_of = {name: types[name] for name in (*program.prologue, *program.epilogue)}
    steps: list[str] = []
    for step, read_from in zip(program.steps, _writers(program), strict=True):
        steps.append(max((types[step.segment], *(steps[writer] for writer in read_from)), key=_coarseness))
        type_of |= dict.fromkeys((f"{step.segment}@{step.index}", f"{UPDATE}@{step.index}"), steps[-1])
    return type_of


def _coarseness(rest: str) -> float:
    return ROUNDING[rest].moves


def observer(executor: Executor, request: Request, decode: Callable[[Samples], Samples] | None) -> Observer:
    """From samples, as a Fingerprint has them, to what the segments of an executor return for them."""

    def outputs(samples: Mapping[int, Samples]) -> Outputs:
        *steps, finished = sorted(samples)
        observed = {
            (segment if step is None else f"{segment}@{step}", port): _some(values)
            for step, segment, ports in executor.outputs_at(request, {step: samples[step] for step in steps})
            for port, values in ports.items()
        }
        if decode is not None:
            observed[DECODE, "image"] = _some(decode(samples[finished]))
        return observed

    return outputs


def expected(observe: Observer, samples: Mapping[int, Samples], rests: Iterable[str], *, integers: bool) -> Expected:
    """Return what a form gives for samples, and how far rounding moves that in each of the types `rests`.

    With `integers` in it, what one call of a segment shows holds for all of them: rounding changes other activations
    at another place.
    """
    outputs = observe(samples)
    tolerances: dict[str, dict[str, float]] = defaultdict(dict)
    for rest in rests:
        rounding = ROUNDING[rest]
        size = rounding.flips if integers else rounding.moves
        moved = [observe(moved_samples(samples, size, number)) for number in range(MOVES)]
        largest: dict[str, float] = defaultdict(float)
        for call, port in outputs:
            place = _segment(call) if integers else call
            errors = (relative_l2(other[call, port], outputs[call, port]) for other in moved)
            largest[place] = max(largest[place], *errors)
        for call, _ in outputs:
            error = largest[_segment(call) if integers else call]
            tolerances[call][rest] = max(rounding.least, MARGIN * error)
    return Expected(outputs, tolerances)


def moved_samples(samples: Mapping[int, Samples], size: float, number: int) -> dict[int, Samples]:
    """Return the samples with each value moved by about `size` of itself; `number` seeds the random numbers."""
    rng = np.random.default_rng(number)
    return {
        step: (sample * (1 + size * rng.standard_normal(sample.shape))).astype(np.float32)
        for step, sample in samples.items()
    }


def _segment(call: str) -> str:
    return call.partition("@")[0]


def _misfit(problem: str) -> BundleError:
    return BundleError(f"the fingerprint does not fit its bundle: {problem}; compile it again")


def _some(values: NDArray[Any]) -> NDArray[np.float32]:
    """At most VALUES of them, evenly spread; an odd stride takes them from every column of an image."""
    return values.reshape(-1)[:: -(-values.size // VALUES) | 1].astype(np.float32)


def relative_l2(seen: NDArray[np.float32], recorded: NDArray[np.float32]) -> float:
    """Return the norm of the difference over that of `recorded`; infinite for no number, and for any against zeros."""
    gap, norm = (float(np.linalg.norm(np.float64(values))) for values in (np.float64(seen) - recorded, recorded))
    if gap == 0:
        return 0.0
    return gap / norm if np.isfinite(gap) and norm else float("inf")
