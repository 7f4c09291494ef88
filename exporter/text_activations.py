"""The largest numbers inside a text encoder: those of T5 lie beyond what FP16 holds, and become infinite there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["LargestActivation", "watched_activations"]


@dataclass
class LargestActivation:
    """The largest magnitude that was seen, and the path of the module that read or returned it.

    The first that is infinite or no number is largest.
    """

    value: float = 0.0
    path: str = ""

    def look_at(self, path: str, *passed: Any) -> None:
        """Take what a module read or returned into account."""
        for tensor in passed:
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel()):
                continue
            value = float(tensor.detach().abs().max())
            if math.isfinite(self.value) and not value <= self.value:
                self.value, self.path = value, path


@contextmanager
def watched_activations(module: nn.Module) -> Iterator[LargestActivation]:
    """Give a record of the largest activation of the runs inside the block: of what modules without parts return."""
    largest = LargestActivation()
    leaves = [(path, part) for path, part in module.named_modules() if not any(part.children())]
    hooks = [
        part.register_forward_hook(lambda _, __, returned, path=path: largest.look_at(path, returned))
        for path, part in leaves
    ]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()
