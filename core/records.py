"""The base of the values that go to disk as JSON."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

__all__ = ["PartialRecord", "Record", "Skipped"]


class Record(BaseModel):
    """Base of the values that go to disk as JSON: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PartialRecord(Record):
    """A record with parts that are there only where they were asked for: those in `LEFT_OUT` are no null as JSON."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_what_is_not_there(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        return {name: value for name, value in written.items() if value is not None or name not in self.LEFT_OUT}


class Skipped(Record):
    """The reason why a part of a result is not there."""

    skipped: str
