"""Words for numbers and names that the page and the command line share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

__all__ = ["joined_names", "megabytes"]


def megabytes(size_bytes: int) -> str:
    """Return millions of bytes, as text."""
    return f"{size_bytes / 1e6:,.2f} MB"


def joined_names(names: Sequence[str]) -> str:
    """Return dotted names with what they share written once: a.{q,k}."""
    parts = [name.split(".") for name in names]
    levels = zip(*(part[:-1] for part in parts), strict=False)  # up to the shortest name
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    tails = [".".join(part[shared:]) for part in parts]
    inner = tails[0] if len(tails) == 1 else f"{{{','.join(tails)}}}"
    return ".".join([*parts[0][:shared], inner])
