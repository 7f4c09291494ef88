"""The interface of a backend, which opens a segment and runs it on named, pre-allocated buffers.

An engine is shared by all requests and threads; what one request binds and runs is a binding of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from ditc.bundle import Bundle
from ditc.engines.device import Device, DeviceTensor

__all__ = [
    "Backend",
    "Binding",
    "Buffer",
    "DeviceBackend",
    "DeviceEngine",
    "Engine",
    "Port",
    "lowered_path",
    "runnable_path",
]

Buffer = NDArray[Any]


@dataclass(frozen=True)
class Port:
    """One named input or output of an engine. A dimension is an int, or a name where it is open ("batch")."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def check_buffer(self, segment: str, buffer: Buffer) -> None:
        """Raise ValueError unless an array can be bound here without a copy; its shape may be any."""
        if not buffer.flags.c_contiguous:
            raise ValueError(f"{segment}: the buffer for {self.name!r} must be C-contiguous")
        if str(buffer.dtype) != self.dtype:
            raise ValueError(f"{segment}: {self.name!r} takes {self.dtype}, found {buffer.dtype}")

    def check_takes(self, segment: str, tensor: DeviceTensor) -> None:
        """Raise ValueError unless a tensor has this port's type and shape."""
        if (tensor.dtype, tensor.shape) != (self.dtype, self.shape):
            raise ValueError(
                f"{segment}: {self.name!r} is {self.dtype} {self.shape}, found {tensor.dtype} {tensor.shape}"
            )

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of a port with no open dimension; raises ValueError where one is open."""
        return tuple(int(size) for size in self.shape)


class Binding(Protocol):
    """The buffers of one request on an engine, for one thread at a time. Bind each once, run as often as needed."""

    def bind(self, name: str, buffer: Buffer) -> None:
        """Use `buffer` (C-contiguous) for an input or output from the next run on; it is kept alive until then."""
        ...

    def run(self) -> None:
        """Read the bound inputs, write the bound outputs."""
        ...


class Engine(Protocol):
    """A segment made ready to run, in any number of threads. Open it with `with`.

    What a binding refers to lives as long as the binding: a run that is under way while the engine is closed ends well.
    """

    @property
    def inputs(self) -> Mapping[str, Port]: ...

    @property
    def outputs(self) -> Mapping[str, Port]: ...

    def binding(self) -> Binding:
        """Buffers for one more request, none bound yet."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Protocol):
    """Runs segments: a row of the backend table."""

    @property
    def name(self) -> str: ...

    def open(self, segment: Path) -> Engine:
        """The engine of an ONNX segment. Raises DitcError where this machine can't run it."""
        ...


class DeviceEngine(Protocol):
    """A segment made ready to run on a device, at one fixed shape. Bind tensors in its memory, then queue runs."""

    @property
    def inputs(self) -> Mapping[str, Port]: ...

    @property
    def outputs(self) -> Mapping[str, Port]: ...

    def bind(self, name: str, tensor: DeviceTensor) -> None:
        """Use `tensor` for an input or output from the next run on. The caller keeps it alive."""
        ...

    def enqueue(self) -> None:
        """Queue one run on the device's stream, and return at once."""
        ...


@runtime_checkable
class DeviceBackend(Protocol):
    """Runs segments on a GPU, with all buffers in its memory."""

    @property
    def name(self) -> str: ...

    @property
    def captures(self) -> bool:
        """Can its engines be captured into a CUDA graph?"""
        ...

    def device(self) -> AbstractContextManager[Device]: ...

    def engines(
        self, bundle: Bundle, names: Sequence[str], device: Device
    ) -> AbstractContextManager[Mapping[str, DeviceEngine]]:
        """The engines of a bundle's segments, open inside the block. Raises InputError where one can't be had."""
        ...


def lowered_path(segment: Path, backend: str) -> Path:
    """Return the file of a backend's own form of a segment, which shares its weights file."""
    return segment.with_name(f"{segment.stem}.{backend}.onnx")


def runnable_path(segment: Path, backend: str) -> Path:
    """The file that a backend runs: its own form where there is one, else the portable segment."""
    lowered = lowered_path(segment, backend)
    return lowered if lowered.exists() else segment
