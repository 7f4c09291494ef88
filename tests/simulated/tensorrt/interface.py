"""Shared by all played classes: the real interface they are held to, and arrays at addresses."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

import numpy as np
import onnx
import onnxruntime
import simulation
import tensorrt_bindings as real
from tensorrt_bindings import __version__

MAGIC = b"simulated plan\n"

ONNX_TYPES = {
    "tensor(float)": ("float32", real.DataType.FLOAT),
    "tensor(float16)": ("float16", real.DataType.HALF),
    "tensor(int64)": ("int64", real.DataType.INT64),
}


def signatures(method: Any) -> list[tuple[list[str], int]]:
    """(names of the parameters, how many have no default) of each overload that a pybind docstring lists."""
    overloads = []
    for arguments in re.findall(r"^\s*(?:\d+\. )?\w+\((.*)\) ->", method.__doc__ or "", flags=re.MULTILINE):
        parts = re.split(r",\s*(?=\w+:)", arguments)
        parts = [part for part in parts if part and not part.startswith("self")]
        overloads.append(([part.split(":")[0].strip() for part in parts], sum("=" not in part for part in parts)))
    return overloads


class Played:
    """A class of TensorRT played in Python: `REAL` is the class whose interface it must keep."""

    REAL: type

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or name == "REAL":
            return object.__getattribute__(self, name)
        known = getattr(self.REAL, name)  # AttributeError for a name that the real class lacks
        value = object.__getattribute__(self, name)
        if isinstance(known, property):
            return value

        @functools.wraps(value)
        def call(*given: Any, **named: Any) -> Any:
            every = [names for names, least in signatures(known) if least <= len(given) + len(named) <= len(names)]
            assert any(named.keys() <= set(names) for names in every), f"{self.REAL.__name__}.{name}{given}{named}"
            return value(*given, **named)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            known = getattr(self.REAL, name)
            assert isinstance(known, property), f"{self.REAL.__name__}.{name} is not a property"
            assert known.fset is not None, f"{self.REAL.__name__}.{name} can't be set"
        object.__setattr__(self, name, value)


class HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


def platform() -> dict[str, Any]:
    return {
        "tensorrt": __version__,
        "gpu": simulation.setting("gpu"),
        "compute_capability": simulation.setting("compute_capability"),
    }


def session_of(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # TensorRT saturates on no processor
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def at(pointer: int, shape: Any, dtype: str) -> np.ndarray:
    """The array that lies at an address."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(pointer)
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def numpy_type_of(kind: str) -> str:
    return ONNX_TYPES[kind][0]
