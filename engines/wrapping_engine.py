"""An engine around another one: it runs as that one does, and its bindings do something more on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType

from ditc.engines.backend import Binding, Buffer, Engine, Port

__all__ = ["WrappingBinding", "WrappingEngine"]


@dataclass
class WrappingBinding:
    """Runs `inside`; `buffers` are those that a subclass looks at."""

    inside: Binding
    buffers: dict[str, Buffer] = field(default_factory=dict, init=False)

    def bind(self, name: str, buffer: Buffer) -> None:
        self.inside.bind(name, buffer)

    def run(self) -> None:
        self.inside.run()


@dataclass
class WrappingEngine:
    """Opened and closed with `inside`, whose ports it has."""

    inside: Engine

    @property
    def inputs(self) -> Mapping[str, Port]:
        return self.inside.inputs

    @property
    def outputs(self) -> Mapping[str, Port]:
        return self.inside.outputs

    def binding(self) -> Binding:
        return WrappingBinding(self.inside.binding())

    def __enter__(self) -> WrappingEngine:
        self.inside.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside.__exit__(kind, error, trace)
