"""The inputs and outputs of an ONNX file, read without onnx: a deployment hasn't got it, and a session takes seconds.

Of protobuf's wire format only what leads to them is looked at, and to the names of files that hold larger tensors. A
message is a run of fields, each a key (its number and kind) and a value: a number of 7 bits a byte, 8 or 4 bytes, or so
many bytes as a number in front says.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Ports", "Shape", "ports_of", "read_ports"]

Shape = tuple["int | str", ...]  # a dimension is a number, or a name where it is open

NUMBER, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
LONGEST_NUMBER = 10  # bytes
# numbers of fields in onnx.proto
GRAPH = 7  # ModelProto
INITIALIZER, INPUT, OUTPUT = 5, 11, 12  # GraphProto
EXTERNAL_DATA = 13  # TensorProto
KEY, VALUE = 1, 2  # StringStringEntryProto
NAME, TYPE = 1, 2  # ValueInfoProto
TENSOR_TYPE = 1  # TypeProto
SHAPE = 2  # TypeProto.Tensor
DIM = 1  # TensorShapeProto
DIM_VALUE, DIM_PARAM = 1, 2  # TensorShapeProto.Dimension


class Ports(NamedTuple):
    """Shapes by name, and what the graph calls the files with its larger tensors, from its own folder on."""

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    data: frozenset[str] = frozenset()


def read_ports(path: Path) -> Ports:
    """The ports of an ONNX file, of which only what is looked at comes into memory. Raises ValueError as `ports_of`."""
    with path.open("rb") as file:
        return ports_of(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def ports_of(model: bytes | memoryview) -> Ports:
    """The ports of an ONNX file's bytes. Raises ValueError where they are no ONNX model."""
    graphs = [value for field, value in _fields(memoryview(model)) if field == GRAPH]
    if len(graphs) != 1:
        raise ValueError(f"it holds {len(graphs)} graphs, expected 1")
    inputs: dict[str, Shape] = {}
    outputs: dict[str, Shape] = {}
    data: set[str] = set()
    for field, value in _fields(_message(graphs[0])):
        if field in (INPUT, OUTPUT):
            name, shape = _port(_message(value))
            (inputs if field == INPUT else outputs)[name] = shape
        elif field == INITIALIZER:
            data.update(_data(_message(value)))
    return Ports(inputs, outputs, frozenset(data))


def _data(tensor: memoryview) -> Iterator[str]:
    """The file of a tensor that lies in one."""
    for entry in _inside(tensor, EXTERNAL_DATA):
        texts = {field: _text(value) for field, value in _fields(entry)}
        if texts.get(KEY) == "location":
            yield texts.get(VALUE, "")


def _port(info: memoryview) -> tuple[str, Shape]:
    name, dims = "", []
    for field, value in _fields(info):
        if field == NAME:
            name = _text(value)
        elif field == TYPE:
            dims = [
                dim
                for tensor in _inside(_message(value), TENSOR_TYPE)
                for shape in _inside(tensor, SHAPE)
                for dim in _inside(shape, DIM)
            ]
    return name, tuple(map(_dimension, dims))


def _dimension(dim: memoryview) -> int | str:
    size: int | str = ""
    for field, value in _fields(dim):
        if field == DIM_VALUE and isinstance(value, int):
            size = value
        elif field == DIM_PARAM:
            size = _text(value)
    return size


def _inside(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The messages under one field."""
    return (_message(value) for field, value in _fields(message) if field == wanted)


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it holds a number where a message is expected")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode()


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field: a number or bytes; fields of other kinds are stepped over."""
    place = 0
    while place < len(message):
        key, place = _number(message, place)
        kind = key & 7
        if kind == NUMBER:
            value, place = _number(message, place)
            yield key >> 3, value
        elif kind == BYTES:
            length, place = _number(message, place)
            end = place + length
            if end > len(message):
                raise ValueError("it ends in the middle of a message")
            yield key >> 3, message[place:end]
            place = end
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            place += 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError(f"it holds a field of the unknown kind {kind}")


def _number(message: memoryview, place: int) -> tuple[int, int]:
    """(number, where it ends)."""
    number = 0
    for count in range(LONGEST_NUMBER):
        if place + count >= len(message):
            raise ValueError("it ends in the middle of a number")
        byte = message[place + count]
        number |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return number, place + count + 1
    raise ValueError("it holds a number that is too long")
