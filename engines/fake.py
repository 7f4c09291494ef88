"""A backend made of plain functions, so that the runtime is tested with no accelerator and no engine library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from ditc.engines.backend import Buffer, Engine, Port

__all__ = ["FakeBackend", "FakeBinding", "FakeEngine"]

SegmentFunction = Callable[[Mapping[str, Buffer]], Mapping[str, Buffer]]


@dataclass
class FakeBinding:
    """The buffers of one request on a fake engine."""

    engine: FakeEngine
    bound: dict[str, Buffer] = field(default_factory=dict)

    def bind(self, name: str, buffer: Buffer) -> None:
        if name not in self.engine.inputs and name not in self.engine.outputs:
            raise KeyError(name)
        self.bound[name] = buffer

    def run(self) -> None:
        self.engine.runs += 1
        results = self.engine.function({name: self.bound[name] for name in self.engine.inputs})
        for name in self.engine.outputs:
            np.copyto(self.bound[name], results[name])


@dataclass
class FakeEngine:
    """An engine that calls `function` with the bound inputs and copies what it returns into the bound outputs."""

    function: SegmentFunction
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    runs: int = 0

    def binding(self) -> FakeBinding:
        return FakeBinding(self)

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close nothing: it owns nothing."""


@dataclass(frozen=True)
class FakeBackend:
    """Engines by the stem of the segment's file name."""

    engines: Mapping[str, FakeEngine]
    name: str = "fake"

    def open(self, segment: Path) -> Engine:
        return self.engines[segment.stem]
