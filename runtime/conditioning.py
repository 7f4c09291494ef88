"""The conditioning of a request: computed once for all steps, equal conditions once, handed to a step row by row.

With guidance the unconditional half is one row of nulls, and a batch may ask for a class several times. So the tables
hold a row for each distinct row of conditions, and a step's rows are taken from them when it runs. What depends on no
timestep, as the keys and values of a text, is a table of the request (REQUEST): without a row for each step. What
depends on the timestep alone is a table of the bundle (OF_STEP): without a row for each of the conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.engines.backend import Buffer, DeviceEngine, Engine, Port
from ditc.program import AHEAD, OF_STEP, REQUEST, TIMESTEPS
from ditc.requests import Arrays
from ditc.spec import ModelSpec

__all__ = [
    "Conditioning",
    "at_step",
    "condition_tables",
    "is_of_request",
    "most_ahead",
    "of_step",
    "rows_at",
    "steps_ahead",
    "with_later_rows",
]

Index = NDArray[np.int64]  # (rows,), of each the place of its conditions among the distinct ones


class Conditioning:
    """Tables of one request of up to `rows` network rows; `most_ahead` is how far past its own row a step may look.

    Memory is taken once. A table is (steps + most_ahead, distinct rows, ...), with zeros for steps past the last; one
    of the request is (distinct rows, ...). `fresh` names the conditions that are noise, (steps, rows, ...).
    """

    def __init__(
        self,
        engine: Engine,
        t: NDArray[np.float32],
        rows: int,
        most_ahead: int,
        fresh: frozenset[str] = frozenset(),
    ) -> None:
        self._t, self._most_ahead, self._fresh = t, most_ahead, fresh
        self._inputs, self._outputs, self._binding = engine.inputs, engine.outputs, engine.binding()
        self._memory = {
            port.name: np.zeros(prod(self._shape(port, rows)), port.dtype) for port in engine.outputs.values()
        }
        self._tables: dict[str, Buffer] = {}
        self._index: Index | None = None
        self._gathered: dict[str, Buffer] = {}
        self._once: dict[str, Buffer] = {}  # those of the request that are gathered already

    def compute(self, conditions: Arrays) -> None:
        """Run the conditioning for the conditions of all rows, each (rows, ...), or (steps, rows, ...) of noise."""
        conditions, self._index = _distinct(conditions, self._fresh)
        self._once.clear()
        count = _row_count(conditions, self._fresh)
        if TIMESTEPS in self._inputs:
            self._binding.bind(TIMESTEPS, self._t)
        for name, rows in conditions.items():
            self._binding.bind(name, rows)
        for port in self._outputs.values():
            shape = self._shape(port, count)
            table = self._tables[port.name] = self._memory[port.name][: prod(shape)].reshape(shape)
            if is_of_request(port.name):
                self._binding.bind(port.name, table)
                continue
            table[len(self._t) :] = 0
            self._binding.bind(port.name, table[: len(self._t)])
        self._binding.run()

    def inputs(self, step: int, ports: Mapping[str, Port]) -> dict[str, Buffer]:
        """Return the rows of the tables that the inputs `ports` of a segment take at a step: its own, and later steps'.

        (rows, ...) each, or (n, rows, ...) for the rows of n later steps. Valid until the next call.
        """
        rows = {}
        for name, table in self._tables.items():
            if name in ports and is_of_request(name):
                if name not in self._once:
                    self._once[name] = self._rows(name, table, 0)
                rows[name] = self._once[name]
            elif name in ports:
                rows[name] = self._rows(name, table[step], 0)
            if (later := ports.get(f"{AHEAD}.{name}")) is not None:
                rows[later.name] = self._rows(later.name, table[step + 1 : step + 1 + steps_ahead(later)], 1)
        return rows

    def tables_at(self, steps: Sequence[int]) -> dict[str, Buffer]:
        """The tables of some steps, (len(steps), distinct rows, ...); those of the request as they are."""
        return {name: table if is_of_request(name) else table[list(steps)] for name, table in self._tables.items()}

    def _rows(self, name: str, part: Buffer, axis: int) -> Buffer:
        """The rows of a part that has one for each distinct row of conditions."""
        if self._index is None:
            return part
        shape = (*part.shape[:axis], len(self._index), *part.shape[axis + 1 :])
        if name not in self._gathered or self._gathered[name].shape != shape:
            self._gathered[name] = np.empty(shape, part.dtype)
        return np.take(part, self._index, axis=axis, out=self._gathered[name], mode="clip")  # unchecked: it is in range

    def _shape(self, port: Port, rows: int) -> tuple[int, ...]:
        sizes = {"batch": rows, "steps": len(self._t) + self._most_ahead}
        return tuple(sizes[size] if isinstance(size, str) else size for size in port.shape)


def is_of_request(table: str) -> bool:
    """Is this a table that a request has once, and not for each step?"""
    return table.startswith(REQUEST)


def of_step(tables: Mapping[str, Buffer], step: int) -> dict[str, Buffer]:
    """Return the rows of one step, (rows, ...), of tables (steps, rows, ...); those of the request as they are."""
    return {name: table if is_of_request(name) else table[step] for name, table in tables.items()}


def rows_at(tables: Mapping[str, Buffer], step: int, ports: Mapping[str, Port]) -> dict[str, Buffer]:
    """Return the rows of a bundle's tables (steps, ...) that inputs `ports` take at a step: its own, and later steps'.

    (...) each, or (n, ...) for the rows of n later steps: `with_later_rows` has enough of them.
    """
    rows = {name: table[step] for name, table in tables.items() if name in ports}
    for name, table in tables.items():
        if (later := ports.get(f"{AHEAD}.{name}")) is not None:
            rows[later.name] = table[step + 1 : step + 1 + steps_ahead(later)]
    return rows


def with_later_rows(tables: Mapping[str, Buffer], most: int) -> dict[str, Buffer]:
    """Return tables (steps, ...) with zeros for `most` steps past the last in those that later rows are taken of."""
    return {
        name: np.concatenate([table, np.zeros((most, *table.shape[1:]), table.dtype)])
        if most and name.startswith(OF_STEP)
        else table
        for name, table in tables.items()
    }


def at_step(spec: ModelSpec, conditions: Arrays, step: int) -> dict[str, NDArray[Any]]:
    """Return conditions of all rows as `condition` takes them at one step alone: fresh noise is that step's."""
    fresh = {condition.name for condition in spec.conditions if condition.fresh}
    return {name: array[step : step + 1] if name in fresh else array for name, array in conditions.items()}


def condition_tables(session: Any, t: NDArray[Any], conditions: Arrays) -> dict[str, Buffer]:
    """Return what `condition` makes of timesteps (steps,) and the conditions of all rows: each (steps, rows, ...).

    Those of the request are (rows, ...). `session` is ONNX Runtime's of that segment.
    """
    names, inputs = ([port.name for port in ports] for ports in (session.get_outputs(), session.get_inputs()))
    timesteps = {TIMESTEPS: np.asarray(t, np.float32)} if TIMESTEPS in inputs else {}
    return dict(zip(names, session.run(names, {**timesteps, **conditions}), strict=True))


def _row_count(conditions: Arrays, fresh: frozenset[str]) -> int:
    return next(array.shape[1] if name in fresh else len(array) for name, array in conditions.items())


def _distinct(conditions: Arrays, fresh: frozenset[str]) -> tuple[Arrays, Index | None]:
    """The conditions without repeated rows, in the order of the first of each, and the place of each row among them.

    None for the places where no row repeats, as where each has noise of its own.
    """
    if fresh:
        return conditions, None
    count = _row_count(conditions, fresh)
    rows = [tuple(array[row].tobytes() for array in conditions.values()) for row in range(count)]
    place_of = {key: place for place, key in enumerate(dict.fromkeys(rows))}
    if len(place_of) == count:
        return conditions, None
    first = [rows.index(key) for key in place_of]
    distinct = {name: np.ascontiguousarray(array[first]) for name, array in conditions.items()}
    return distinct, np.array([place_of[key] for key in rows])


def steps_ahead(port: Port) -> int:
    """Return the number of later steps whose rows an input AHEAD.TABLE takes."""
    count = port.shape[0]
    assert isinstance(count, int)  # the export fixes it
    return count


def most_ahead(engines: Mapping[str, Engine | DeviceEngine]) -> int:
    """Return the largest number of later steps whose rows one of the engines takes, 0 where none takes any."""
    ports = (port for engine in engines.values() for port in engine.inputs.values())
    return max((steps_ahead(port) for port in ports if port.name.startswith(f"{AHEAD}.")), default=0)
