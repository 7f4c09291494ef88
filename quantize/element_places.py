"""Places where elements of a tensor arrive, through operators that move elements and compute nothing.

A factor can be carried from one tensor over to another only where it is known which element of the one is which of
the other. Instead of telling heads from channels by the looks of a reshape, an array of places is sent through the
operators themselves: however a model writes them, what comes out says where every element came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["MOVES", "Places", "Reading", "moved_from", "origin_of", "readings", "row_shape"]

Places = NDArray[np.int64]
Move = Callable[[ir.Node, Places], Sequence[Places]]


class _UnknownError(Exception):
    """A move whose constants are not known before it runs."""


def _constant(node: ir.Node, place: int) -> NDArray[Any]:
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None or value.const_value is None:
        raise _UnknownError
    return value.const_value.numpy()


def _given(node: ir.Node, place: int) -> bool:
    return place < len(node.inputs) and node.inputs[place] is not None


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _identity(node: ir.Node, places: Places) -> list[Places]:
    return [places]


def _split(node: ir.Node, places: Places) -> list[Places]:
    axis, parts = int(_attribute(node, "axis", 0)), len(node.outputs)
    size = places.shape[axis]
    each = _constant(node, 1) if _given(node, 1) else np.full(parts, -(-size // parts))
    return np.split(places, np.cumsum(each)[:-1], axis)


def _slice(node: ir.Node, places: Places) -> list[Places]:
    starts, ends = _constant(node, 1), _constant(node, 2)
    axes = _constant(node, 3) if _given(node, 3) else np.arange(len(starts))
    steps = _constant(node, 4) if _given(node, 4) else np.ones_like(starts)
    cut = [slice(None)] * places.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        cut[axis] = slice(int(start), None if step < 0 and end < -places.shape[axis] else int(end), int(step))
    return [places[tuple(cut)]]


def _gather(node: ir.Node, places: Places) -> list[Places]:
    return [np.take(places, _constant(node, 1), axis=int(_attribute(node, "axis", 0)))]


def _squeeze(node: ir.Node, places: Places) -> list[Places]:
    return [np.squeeze(places, tuple(int(axis) for axis in _constant(node, 1)))]


def _unsqueeze(node: ir.Node, places: Places) -> list[Places]:
    return [np.expand_dims(places, tuple(int(axis) for axis in _constant(node, 1)))]


def _reshape(node: ir.Node, places: Places) -> list[Places]:
    sizes = [int(size) for size in _constant(node, 1)]
    if not _attribute(node, "allowzero", 0):
        sizes = [places.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return [places.reshape(sizes)]


def _transpose(node: ir.Node, places: Places) -> list[Places]:
    return [np.transpose(places, _attribute(node, "perm", None))]


MOVES: dict[str, Move] = {
    "Gather": _gather,
    "Identity": _identity,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def row_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of a value for a batch of one: the open dimension counts 1. None where more than one is open."""
    sizes = list(value.shape or ())
    known = [size if isinstance(size, int) else 1 for size in sizes]
    several = sum(not isinstance(size, int) for size in sizes) > 1
    return None if several or not sizes else tuple(known)


def moved_from(origin: ir.Value, places: Places | None = None) -> dict[ir.Value, Places]:
    """Every value that holds elements of `origin` unchanged -> the place of each of its elements there.

    A place is the position in `origin`, flattened, for a batch of one; `places` may name the elements differently, in
    the shape of `origin`. Values behind an operator that does more than move are not followed, nor are those behind one
    whose constants are not known. Empty where the shape of `origin` is not known.
    """
    if places is None:
        shape = row_shape(origin)
        if shape is None:
            return {}
        places = np.arange(int(np.prod(shape))).reshape(shape)
    places_in, waiting = {origin: places}, [origin]
    while waiting:
        value = waiting.pop()
        for node, place in value.uses():
            move = MOVES.get(node.op_type)
            if move is None or place != 0:
                continue
            try:
                parts = move(node, places_in[value])
            except (_UnknownError, ValueError, IndexError):  # or shapes that fit no batch of one
                continue
            moved = dict(zip(node.outputs, parts, strict=True))
            places_in |= moved
            waiting += moved
    return places_in


class Reading(NamedTuple):
    """A use of moved elements that does more than move them. `node` is None where they leave as a graph output."""

    node: ir.Node | None
    place: int
    places: Places


def readings(moved: Mapping[ir.Value, Places]) -> Iterator[Reading]:
    """Yield the uses that compute with values of `moved_from`, and their elements."""
    for value, places in moved.items():
        for node, place in value.uses():
            if not (place == 0 and node.op_type in MOVES and node.outputs[0] in moved):
                yield Reading(node, place, places)
        if value.is_graph_output():
            yield Reading(None, 0, places)


def origin_of(value: ir.Value) -> ir.Value:
    """The value before all moves that lead to this one."""
    node = value.producer()
    while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value
