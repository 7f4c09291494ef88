"""Reports of long work on how far it is."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]  # stage, done, of


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""
