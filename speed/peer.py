"""A peer: another way to run the same network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ditc.runtime.reference_run import Forward

__all__ = ["Peer"]


@dataclass(frozen=True)
class Peer:
    """A peer made ready. `forward` is its network; `what` tells packages, versions and number types.

    `begin` starts a run afresh: only a peer with a cache of its own has one, and it is measured over whole runs.
    """

    forward: Forward
    what: str
    begin: Callable[[], None] | None = None
