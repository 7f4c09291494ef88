"""What a bundle's segments gave where it was compiled, so that a machine where they give something else is noticed.

A compile lets one image walk the compiled program. It keeps the sample in front of the first and the last step that
each segment runs at, and of the steps whose caches those take, and what every segment returns there: in the portable
form that processors run, and in the typed one of GPUs. Random inputs would not do, since what saturates does so at
values that occur. Elsewhere the same steps run on the same samples, and each output is held to the one that was kept.

Rounding differs between machines, and beside a rounding point of INT8 it makes a difference of a whole step. How much
that changes an output is measured where the bundle is compiled, by moving the samples about as far as rounding moves
what is computed from them. An output that saturated is off by several times as much (ADR 0023).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import read_tables, write_tables
from ditc.errors import BundleError
from ditc.program import DECODE, Program
from ditc.runtime.executor import Observation, Samples

__all__ = [
    "FINGERPRINT",
    "PORTABLE",
    "TYPED",
    "Difference",
    "Expected",
    "Fingerprint",
    "expected",
    "observer",
    "steps_to_keep",
]

FINGERPRINT = "fingerprint.safetensors"  # in the folder of a bundle
LABEL, SAMPLE, OUTPUT, TOLERANCE = "label", "sample", "output", "tolerance"  # how names in it begin
VALUES = 1 << 11  # of one output that are kept, at most
PORTABLE, TYPED = "portable", "typed"  # the forms of segments


class Rounding(NamedTuple):
    """A type's rounding: how far samples are moved to see what it does, and the least that outputs may differ by."""

    moves: float
    least: float


# relative, an output's in the L2 norm
ROUNDING: Mapping[str, Rounding] = {
    "f32": Rounding(moves=1e-5, least=1e-4),
    "f16": Rounding(moves=1e-3, least=1e-2),
    "bf16": Rounding(moves=4e-3, least=3e-2),
}
MOVES = 3  # of all samples, by random numbers
MARGIN = 3.0  # over the largest difference that they made

Outputs = Mapping[tuple[str, str], NDArray[np.float32]]  # (call, port) -> values, (at most VALUES,)
Observer = Callable[[Mapping[int, Samples]], Outputs]


class Executes(Protocol):
    """An executor, on a processor or a device."""

    def outputs_at(self, label: int, samples: Mapping[int, Samples]) -> Iterable[Observation]: ...


class Difference(NamedTuple):
    """How far an output here is from the one that was kept, and how far it may be: relative, in the L2 norm."""

    call: str
    port: str
    error: float
    tolerance: float

    @property
    def is_rounding(self) -> bool:
        """Is it no more than rounding makes?"""
        return self.error <= self.tolerance

    @property
    def segment(self) -> str:
        return self.call.partition("@")[0]


class Expected(NamedTuple):
    """What one form gave: its outputs, and how far each call's may be from them by the type around the integers."""

    outputs: Outputs
    tolerances: Mapping[str, Mapping[str, float]]  # call -> type -> relative error

    def differences(self, found: Outputs, rest: str) -> list[Difference]:
        """One for each output that was found, in the order of the calls. Raises BundleError where others were kept."""
        kept = {key: values.shape for key, values in self.outputs.items()}
        for key, values in found.items():
            if kept.get(key) != values.shape or rest not in self.tolerances.get(key[0], {}):
                raise BundleError(f"the fingerprint does not fit its bundle: {' '.join(key)}; compile it again")
        return [
            Difference(*key, _relative(values, self.outputs[key]), self.tolerances[key[0]][rest])
            for key, values in found.items()
        ]


@dataclass(frozen=True)
class Fingerprint:
    """`samples` are those in front of the steps that are run, (1, channels, height, width) by step, and the finished
    one under the number of steps; `label` is the image's class; `forms` what each form gave there.
    """

    label: int
    samples: Mapping[int, Samples]
    forms: Mapping[str, Expected]

    @staticmethod
    def of(folder: Path) -> Fingerprint:
        """That of a bundle. Raises BundleError where it has none."""
        if not (folder / FINGERPRINT).is_file():
            raise BundleError(f"{folder} has no fingerprint: it was compiled before there were any; compile it again")
        try:
            return _read(read_tables(folder / FINGERPRINT))
        except (KeyError, ValueError, IndexError) as e:
            raise BundleError(f"{folder / FINGERPRINT} is no fingerprint ({e!r}); compile the bundle again") from e

    def save(self, folder: Path) -> None:
        write_tables(folder / FINGERPRINT, dict(_written(self)))


def _written(fingerprint: Fingerprint) -> Iterator[tuple[str, NDArray[Any]]]:
    yield LABEL, np.array([fingerprint.label], np.int64)
    for step, sample in fingerprint.samples.items():
        yield f"{SAMPLE}/{step}", sample
    for form, kept in fingerprint.forms.items():
        for (call, port), values in kept.outputs.items():
            yield f"{OUTPUT}/{form}/{call}/{port}", values
        for call, by_rest in kept.tolerances.items():
            for rest, tolerance in by_rest.items():
                yield f"{TOLERANCE}/{form}/{call}/{rest}", np.array([tolerance])


def _read(tables: Mapping[str, NDArray[Any]]) -> Fingerprint:
    samples: dict[int, Samples] = {}
    outputs: dict[str, dict[tuple[str, str], NDArray[np.float32]]] = defaultdict(dict)
    tolerances: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for name, table in tables.items():
        match name.split("/"):
            case [kind, step] if kind == SAMPLE:
                samples[int(step)] = table
            case [kind, form, call, port] if kind == OUTPUT:
                outputs[form][call, port] = table
            case [kind, form, call, rest] if kind == TOLERANCE:
                tolerances[form][call][rest] = float(table[0])
    forms = {form: Expected(kept, tolerances[form]) for form, kept in outputs.items()}
    return Fingerprint(int(tables[LABEL][0]), samples, forms)


def steps_to_keep(program: Program) -> list[int]:
    """The first and the last step of each segment, and the steps that write what those read."""
    writers: dict[int, int] = {}
    read_from: dict[int, set[int]] = {}
    calls: dict[str, list[int]] = defaultdict(list)
    for step in program.steps:
        read_from[step.index] = {writers[slot] for slot in step.reads.values()}
        writers |= dict.fromkeys(step.writes.values(), step.index)
        calls[step.segment].append(step.index)
    kept: set[int] = set()
    wanted = {step for steps in calls.values() for step in (steps[0], steps[-1])}
    while wanted:
        kept |= wanted
        wanted = {writer for step in wanted for writer in read_from[step]} - kept
    return sorted(kept)


def observer(executor: Executes, label: int, decode: Callable[[Samples], Samples] | None) -> Observer:
    """From samples, as a Fingerprint has them, to what the segments of an executor return for them."""

    def outputs(samples: Mapping[int, Samples]) -> Outputs:
        *steps, finished = sorted(samples)
        found = {
            (segment if step is None else f"{segment}@{step}", port): _some(values)
            for step, segment, ports in executor.outputs_at(label, {step: samples[step] for step in steps})
            for port, values in ports.items()
        }
        if decode is not None:
            found[DECODE, "image"] = _some(decode(samples[finished]))
        return found

    return outputs


def expected(observe: Observer, samples: Mapping[int, Samples], rests: Iterable[str]) -> Expected:
    """What a form gives for samples, and how far rounding moves that in each of the types `rests`."""
    outputs = observe(samples)
    tolerances: dict[str, dict[str, float]] = defaultdict(dict)
    for rest in rests:
        moved = [observe(_moved(samples, ROUNDING[rest].moves, number)) for number in range(MOVES)]
        for call, port in outputs:
            errors = [_relative(found[call, port], outputs[call, port]) for found in moved]
            least = tolerances[call].get(rest, ROUNDING[rest].least)
            tolerances[call][rest] = max(least, MARGIN * max(errors))
    return Expected(outputs, tolerances)


def _moved(samples: Mapping[int, Samples], size: float, number: int) -> dict[int, Samples]:
    """The samples, each value by about `size` of itself."""
    rng = np.random.default_rng(number)
    return {
        step: (sample * (1 + size * rng.standard_normal(sample.shape))).astype(np.float32)
        for step, sample in samples.items()
    }


def _some(values: NDArray[Any]) -> NDArray[np.float32]:
    """At most VALUES of them, evenly spread; an odd stride takes them from every column of an image."""
    return values.reshape(-1)[:: -(-values.size // VALUES) | 1].astype(np.float32)


def _relative(found: NDArray[np.float32], kept: NDArray[np.float32]) -> float:
    """Norm of the difference over that of what was kept; infinite for what is no number, and for any against zeros."""
    gap, norm = (float(np.linalg.norm(np.float64(values))) for values in (np.float64(found) - kept, kept))
    if gap == 0:
        return 0.0
    return gap / norm if np.isfinite(gap) and norm else float("inf")
