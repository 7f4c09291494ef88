"""Giving memory back in the middle of a process: a large model is gigabytes that later stages don't need."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

__all__ = ["release_weights", "return_free_memory"]


def release_weights(model: Any) -> None:
    """Empty every parameter and buffer of a torch model that nobody will use again.

    Dropping the model is not enough: torch's exporter keeps references to parameters in its caches.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
    return_free_memory()


def return_free_memory() -> None:
    """Hand freed memory back to the system. glibc keeps it for later, which counts as resident; others need no help."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
