"""The settings of `ditc bench`, checked at birth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ditc.errors import InputError

__all__ = ["BenchOptions", "ModelChoice"]


@dataclass(frozen=True)
class ModelChoice:
    """The torch model that a user names, as `compile` takes it; without a name, the one that the manifest tells."""

    name: str | None = None
    heads: int | None = None


@dataclass(frozen=True)
class BenchOptions:
    """What is measured: `requests` full batches after `warmup` others, as many turns of each peer in `against`.

    `trace` is a folder for layers_*.json and profile_*.json. A median request above `most_seconds`, or a peer whose
    whole run takes less than `least_ratio` times the bundle's, is a failure.
    """

    requests: int = 10
    warmup: int = 2
    trace: Path | None = None
    most_seconds: float | None = None
    against: tuple[str, ...] = ()
    model: ModelChoice = ModelChoice()
    least_ratio: float | None = None
    roofline: bool = False

    def __post_init__(self) -> None:
        if self.requests < 1 or self.warmup < 0:
            raise InputError(
                f"--requests must be at least 1 and --warmup at least 0, found {self.requests} and {self.warmup}"
            )
        if self.least_ratio is not None and not 0 < self.least_ratio < float("inf"):
            raise InputError(f"--fail-if-slower must be above 0, found {self.least_ratio:g}; 1 asks for no slower")
        for option, given in (
            ("--fail-if-slower", self.least_ratio is not None),
            ("--model", self.model.name is not None),
        ):
            if given and not self.against:
                raise InputError(f"{option} is about peers; name some with --against")
        if self.model.heads is not None and self.model.name is None:
            raise InputError("--heads is about the checkpoint of --model; name that too")
