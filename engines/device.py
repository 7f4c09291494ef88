"""Device memory, one stream and CUDA graphs: what running on a GPU needs beside the engines.

Everything goes through cuda-core (Apache-2.0). One `Device` is one GPU with one stream on which all work of a pipeline
is queued in order, so nothing needs an event between two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ditc.errors import DitcError, InputError

__all__ = ["ALIGNMENT", "CudaDevice", "Device", "DeviceGraph", "DeviceTensor", "device_in_use", "open_device"]

ALIGNMENT = 256  # bytes; TensorRT wants the address of every tensor to be a multiple of it


@dataclass(frozen=True)
class DeviceTensor:
    """A dense tensor in device memory. `memory` owns the bytes and is kept alive with it."""

    pointer: int
    dtype: str
    shape: tuple[int, ...]
    memory: Any = field(compare=False)

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def row(self, index: int) -> DeviceTensor:
        """The part at `index` of the first axis, sharing the memory."""
        stride = self.size_bytes // self.shape[0]
        return DeviceTensor(self.pointer + index * stride, self.dtype, self.shape[1:], self.memory)

    def rows(self, first: int, count: int) -> DeviceTensor:
        """`count` parts of the first axis from `first` on, sharing the memory."""
        return DeviceTensor(self.row(first).pointer, self.dtype, (count, *self.shape[1:]), self.memory)


class DeviceGraph(Protocol):
    """Work that was captured once and is queued again as one call."""

    def launch(self) -> None: ...


class Device(Protocol):
    """One GPU and one stream on it. Every method but `download` and `synchronize` only queues work."""

    @property
    def name(self) -> str: ...

    @property
    def compute_capability(self) -> str:
        """Like "8.7": what TensorRT calls the SM version."""
        ...

    @property
    def stream(self) -> int:
        """The handle of the stream, for libraries that queue on it."""
        ...

    def memory_bytes(self) -> tuple[int, int]:
        """(free, total) bytes of device memory."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor: ...

    def upload(self, array: NDArray[Any], tensor: DeviceTensor) -> None:
        """Copy to the device. The array is copied before the call returns or kept alive until it is."""
        ...

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None: ...

    def download(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Copy to the host, after everything queued before."""
        ...

    def synchronize(self) -> None:
        """Wait for everything queued so far."""
        ...

    def hold(self, *things: object) -> None:
        """Keep what queued work refers to, tensors or engines, until everything queued so far has run."""
        ...

    def activate(self) -> None:
        """Make this the calling thread's device; a thread that never did that can't queue on it."""
        ...

    def capture(self, queue_work: Callable[[], None]) -> DeviceGraph:
        """The work that `queue_work` queues on this device's stream, as a graph; nothing runs yet."""
        ...


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Raise CUDA's errors, and only those, as one line of ours."""
    try:
        yield
    except (DitcError, MemoryError):
        raise
    except Exception as e:
        if type(e).__module__.split(".")[0] != "cuda":
            raise
        text = str(e).strip().splitlines() or [type(e).__name__]
        if "OUT_OF_MEMORY" in text[0]:
            raise InputError(
                f"the GPU is out of memory {doing}; free some, or compile the bundle with a smaller --batch"
            ) from e
        raise DitcError(f"CUDA failed {doing}: {text[0]}; `ditc doctor` shows driver and devices") from e


def open_device(index: int = 0) -> CudaDevice:
    """A GPU made ready to queue work on. Raises InputError where cuda-core, the driver or the GPU is missing."""
    try:
        from cuda.core import Device as CoreDevice
    except ImportError as e:
        raise InputError(f"cuda-core can't be imported ({e}); install it with: pip install 'ditc[tensorrt]'") from e
    try:
        core = CoreDevice(index)
        core.set_current()
    except Exception as e:  # cuda-core raises several kinds: no driver library, no device, a wrong number
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise InputError(f"no GPU {index} to run on ({reason[0]}); `ditc doctor` shows what this machine has") from e
    return CudaDevice(core, core.create_stream())


@contextmanager
def device_in_use() -> Iterator[CudaDevice]:
    """A GPU that has done everything queued on it when the block ends."""
    device = open_device()
    yield device
    device.synchronize()


class CudaDevice:
    """A GPU through cuda-core."""

    def __init__(self, core: Any, stream: Any) -> None:
        self._core = core
        self._stream = stream
        self._pending: list[object] = []  # what work refers to that may still be under way

    @property
    def name(self) -> str:
        return str(self._core.name)

    @property
    def compute_capability(self) -> str:
        major, minor = self._core.compute_capability
        return f"{major}.{minor}"

    @property
    def stream(self) -> int:
        return int(self._stream.handle)

    def memory_bytes(self) -> tuple[int, int]:
        from cuda.bindings import driver

        status, free, total = driver.cuMemGetInfo()
        if int(status) != 0:
            raise DitcError(f"the driver does not tell the size of device memory: {status}")
        return int(free), int(total)

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        size = max(1, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
        with _translated(f"allocating {size / 1e6:,.1f} MB"):
            memory = self._core.allocate(size, stream=self._stream)
        return DeviceTensor(int(memory.handle), dtype, shape, memory)

    def upload(self, array: NDArray[Any], tensor: DeviceTensor) -> None:
        host = np.ascontiguousarray(array, dtype=tensor.dtype)
        if host.shape != tensor.shape:
            raise ValueError(f"expected {tensor.shape} to upload, found {host.shape}")
        self.hold(host, tensor)
        self._copy(host.ctypes.data, tensor.pointer, host.nbytes, "copying to the device")

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        self.hold(source, target)
        self._copy(source.pointer, target.pointer, source.size_bytes, "copying on the device")

    def download(self, tensor: DeviceTensor) -> NDArray[Any]:
        host = np.empty(tensor.shape, tensor.dtype)
        self._copy(tensor.pointer, host.ctypes.data, host.nbytes, "copying from the device")
        self.synchronize()
        return host

    def synchronize(self) -> None:
        with _translated("waiting for the device"):
            self._stream.sync()
        self._pending.clear()

    def hold(self, *things: object) -> None:
        self._pending += things

    def activate(self) -> None:
        with _translated("choosing the device"):
            self._core.set_current()

    def capture(self, queue_work: Callable[[], None]) -> DeviceGraph:
        with _translated("capturing a CUDA graph; run with --graphs none"):
            builder = self._stream.create_graph_builder()
            builder.begin_building()
            try:
                queue_work()
            except BaseException:
                with suppress(Exception):  # a capture that failed inside fails again here, and would hide why
                    builder.end_building()
                raise
            builder.end_building()
            return _CudaGraph(builder.complete(), self._stream, self)

    def _copy(self, source: int, target: int, size_bytes: int, doing: str) -> None:
        from cuda.core import Buffer

        with _translated(doing):
            # without an owner these are plain references to memory that others keep
            Buffer.from_handle(target, size_bytes).copy_from(
                Buffer.from_handle(source, size_bytes), stream=self._stream
            )


@dataclass(frozen=True)
class _CudaGraph:
    graph: Any
    stream: Any
    device: Device

    def launch(self) -> None:
        self.device.hold(self)
        with _translated("launching a CUDA graph"):
            self.graph.launch(self.stream)
