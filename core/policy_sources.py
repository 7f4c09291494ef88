"""Where a policy may look beside the model and its own argument: what a compile that can look there hands it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditc.routers import Routers

if TYPE_CHECKING:
    from ditc.step_statistics import StepStatistics

__all__ = ["NO_SOURCES", "ReadRouters", "Sources"]

ReadRouters = Callable[[Path], Routers]


@dataclass(frozen=True)
class Sources:
    """`statistics` of FP images, which a policy asks for by its `watches`, and what reads files that torch wrote."""

    statistics: StepStatistics | None = None
    read_routers: ReadRouters | None = None


NO_SOURCES = Sources()
