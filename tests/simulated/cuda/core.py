"""cuda-core on host memory: a stream that runs nothing until it is waited for, and graphs that record it.

Work that reaches memory which has been let go since it was queued is a failed assertion. Only what ditc uses. That
every name, argument and keyword exists in the real cuda-core is checked by tests/conformance/test_cuda_core.py.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable

import numpy as np
import simulation

ALIGNMENT = 512  # of cudaMalloc
STREAMS: dict[int, Stream] = {}
ALLOCATED = {"bytes": 0}
LIVE: dict[int, int] = {}  # device memory that somebody holds: address -> bytes


class CUDAError(Exception):
    pass


def is_held(pointer: int) -> bool:
    """Does an address lie in device memory that somebody holds?"""
    return any(start <= pointer < start + size for start, size in list(LIVE.items()))


class Buffer:
    def __init__(self, pointer: int, size: int, owned: object = None) -> None:
        self.handle = pointer
        self.size = size
        self._owned = owned

    @staticmethod
    def from_handle(ptr: int, size: int) -> Buffer:
        return Buffer(ptr, size)

    def copy_from(self, src: Buffer, *, stream: Stream) -> None:
        target, source, size = self.handle, src.handle, min(self.size, src.size)
        keep = (self, src)
        on_device = [pointer for pointer in (target, source) if is_held(pointer)]
        assert on_device, "neither end of a copy lies in device memory that somebody holds"

        def copy(_: object = keep) -> None:
            assert all(map(is_held, on_device)), "a queued copy reaches device memory that has been let go"
            ctypes.memmove(target, source, size)

        stream.queue(copy)


class Stream:
    numbers = itertools.count(1)

    def __init__(self) -> None:
        self.handle = next(self.numbers)
        self.waiting: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        STREAMS[self.handle] = self

    def queue(self, work: Callable[[], None]) -> None:
        (self.waiting if self.recording is None else self.recording).append(work)

    def sync(self) -> None:
        assert self.recording is None, "a capturing stream can't be waited for"
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()

    def create_graph_builder(self) -> GraphBuilder:
        return GraphBuilder(self)


class GraphBuilder:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._recorded: list[Callable[[], None]] = []

    def begin_building(self) -> GraphBuilder:
        self._stream.recording = self._recorded
        return self

    def end_building(self) -> GraphBuilder:
        self._stream.recording = None
        return self

    def complete(self) -> Graph:
        return Graph(self._recorded)


class Graph:
    def __init__(self, recorded: list[Callable[[], None]]) -> None:
        self._recorded = recorded

    def launch(self, stream: Stream) -> None:
        if not simulation.plays("stale-graph"):
            for work in self._recorded:
                stream.queue(work)


class Device:
    def __init__(self, device_id: int = 0) -> None:
        if simulation.setting("gpu") is None:
            raise CUDAError("CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected")
        self.name = simulation.setting("gpu")
        self.compute_capability = tuple(simulation.setting("compute_capability"))

    def set_current(self) -> None:
        pass

    def create_stream(self) -> Stream:
        return Stream()

    def allocate(self, size: int, *, stream: Stream) -> Buffer:
        ALLOCATED["bytes"] += size
        if ALLOCATED["bytes"] > simulation.setting("memory_bytes"):
            raise CUDAError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
        # bytes of a value that stands out where something is read before it is written
        memory = np.full(size + ALIGNMENT, 0xCD, np.uint8)
        start = memory.ctypes.data + -memory.ctypes.data % ALIGNMENT
        LIVE[start] = size
        weakref.finalize(memory, LIVE.pop, start)
        return Buffer(start, size, memory)
