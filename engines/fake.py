"""A backend made of plain functions, so that the runtime is tested with no accelerator and no engine library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from ditc.engines.backend import Buffer, Engine, Port

__all__ = ["FakeBackend", "FakeEngine"]

SegmentFunction = Callable[[Mapping[str, Buffer]], Mapping[str, Buffer]]


@dataclass
class FakeEngine:
    """An engine that calls `function` with the bound inputs and copies what it returns into the bound outputs."""

    function: SegmentFunction
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    bound: dict[str, Buffer] = field(default_factory=dict)
    runs: int = 0

    def bind(self, name: str, buffer: Buffer) -> None:
        if name not in self.inputs and name not in self.outputs:
            raise KeyError(name)
        self.bound[name] = buffer

    def run(self) -> None:
        self.runs += 1
        results = self.function({name: self.bound[name] for name in self.inputs})
        for name in self.outputs:
            np.copyto(self.bound[name], results[name])

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bound.clear()


@dataclass(frozen=True)
class FakeBackend:
    """Engines by the stem of the segment's file name."""

    engines: Mapping[str, FakeEngine]
    name: str = "fake"

    def open(self, segment: Path) -> Engine:
        return self.engines[segment.stem]
