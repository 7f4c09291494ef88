"""The conditioning of a request: computed once for all steps, for each label once, handed to a step row by row.

With guidance the unconditional half is one label, and a batch may ask for a class several times. So the tables hold a
row for each distinct label, and a step's rows are taken from them when it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.engines.backend import Buffer, DeviceEngine, Engine, Port
from ditc.guidance import Labels
from ditc.program import AHEAD, LABELS, TIMESTEPS

__all__ = ["Conditioning", "condition_tables", "most_ahead", "steps_ahead"]


class Conditioning:
    """Tables of one request of up to `rows` network rows; `most_ahead` is how far past its own row a step may look.

    Memory is taken once. A table is (steps + most_ahead, distinct labels, ...), with zeros for steps past the last.
    """

    def __init__(self, engine: Engine, t: NDArray[np.float32], rows: int, most_ahead: int) -> None:
        self._t, self._most_ahead = t, most_ahead
        self._outputs, self._binding = engine.outputs, engine.binding()
        self._memory = {
            port.name: np.zeros(prod(self._shape(port, rows)), port.dtype) for port in engine.outputs.values()
        }
        self._tables: dict[str, Buffer] = {}
        self._index: Labels | None = None
        self._gathered: dict[str, Buffer] = {}

    def compute(self, labels: Labels) -> None:
        """Run the conditioning for the labels of all rows, (rows,)."""
        distinct, index = _distinct(labels)
        self._index = None if len(distinct) == len(labels) else index
        self._binding.bind(TIMESTEPS, self._t)
        self._binding.bind(LABELS, distinct)
        for port in self._outputs.values():
            shape = self._shape(port, len(distinct))
            table = self._tables[port.name] = self._memory[port.name][: prod(shape)].reshape(shape)
            table[len(self._t) :] = 0
            self._binding.bind(port.name, table[: len(self._t)])
        self._binding.run()

    def inputs(self, step: int, ports: Mapping[str, Port]) -> dict[str, Buffer]:
        """Return the rows of the tables that the inputs `ports` of a segment take at a step: its own, and later steps'.

        (rows, ...) each, or (n, rows, ...) for the rows of n later steps. Valid until the next call.
        """
        rows = {}
        for name, table in self._tables.items():
            if name in ports:
                rows[name] = self._rows(name, table[step], 0)
            if (later := ports.get(f"{AHEAD}.{name}")) is not None:
                rows[later.name] = self._rows(later.name, table[step + 1 : step + 1 + steps_ahead(later)], 1)
        return rows

    def tables_at(self, steps: Sequence[int]) -> dict[str, Buffer]:
        """The tables of some steps, (len(steps), distinct labels, ...)."""
        return {name: table[list(steps)] for name, table in self._tables.items()}

    def _rows(self, name: str, part: Buffer, axis: int) -> Buffer:
        """The rows of a part that has one for each distinct label."""
        if self._index is None:
            return part
        shape = (*part.shape[:axis], len(self._index), *part.shape[axis + 1 :])
        if name not in self._gathered or self._gathered[name].shape != shape:
            self._gathered[name] = np.empty(shape, part.dtype)
        return np.take(part, self._index, axis=axis, out=self._gathered[name], mode="clip")  # unchecked: it is in range

    def _shape(self, port: Port, rows: int) -> tuple[int, ...]:
        sizes = {"batch": rows, "steps": len(self._t) + self._most_ahead}
        return tuple(sizes[size] if isinstance(size, str) else size for size in port.shape)


def condition_tables(session: Any, t: NDArray[Any], labels: Labels) -> dict[str, Buffer]:
    """Return what `condition` makes of timesteps (steps,) and the labels of all rows, (rows,): each (steps, rows, ...).

    `session` is ONNX Runtime's of that segment.
    """
    names = [port.name for port in session.get_outputs()]
    feeds = {TIMESTEPS: np.asarray(t, np.float32), LABELS: np.asarray(labels, np.int64)}
    return dict(zip(names, session.run(names, feeds), strict=True))


def _distinct(labels: Labels) -> tuple[Labels, Labels]:
    """The labels without repetition, in the order of their first row, and the place of each row's label among them."""
    distinct, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return np.ascontiguousarray(distinct[order]), place[inverse]


def steps_ahead(port: Port) -> int:
    """Return the number of later steps whose rows an input AHEAD.TABLE takes."""
    count = port.shape[0]
    assert isinstance(count, int)  # the export fixes it
    return count


def most_ahead(engines: Mapping[str, Engine | DeviceEngine]) -> int:
    """Return the largest number of later steps whose rows one of the engines takes, 0 where none takes any."""
    ports = (port for engine in engines.values() for port in engine.inputs.values())
    return max((steps_ahead(port) for port in ports if port.name.startswith(f"{AHEAD}.")), default=0)
