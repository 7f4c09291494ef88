"""Files of routers, as Learning-to-Cache releases them: what torch.save wrote, or the same tensors as safetensors.

    {"routers": {"0.prob": (branches,), "1.prob": (branches,), ...}}

A router of each step under its number, that of the last step first, each one tensor of logits. What else lies beside
them, an optimizer and arguments, is passed over. Our own files also name the branches, `{"branches": [...]}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditc.errors import CheckpointError
from ditc.exporter.weight_files import FLOATING, read_mapping
from ditc.files import atomic_write
from ditc.routers import Routers

__all__ = ["read_routers", "write_routers"]

HOLDER, BRANCHES = "routers", "branches"
NUMBERED = re.compile(r"(?:module\.)?(\d{1,6})\.\w+", re.ASCII)
EXPECTED = 'expected {"routers": {"0.prob": logits, "1.prob": logits, ...}}, one for each step'


def read_routers(path: Path) -> Routers:
    """Return the routers of a file. Raises CheckpointError saying what it holds instead."""
    if not path.is_file():
        raise CheckpointError(f"no such file of routers: {path}; {EXPECTED}")
    content = read_mapping(path)
    held = content.get(HOLDER, content)
    named = {str(name): value for name, value in held.items()} if isinstance(held, Mapping) else {}
    numbers = {int(match[1]): value for name, value in named.items() if (match := NUMBERED.fullmatch(name))}
    if not numbers or len(numbers) < len(named):
        other = next((name for name in named if not NUMBERED.fullmatch(name)), f"{len(named)} tensors")
        raise CheckpointError(f"{path} holds no routers, but {other}; {EXPECTED}")
    if sorted(numbers) != list(range(len(numbers))):
        raise CheckpointError(f"{path} has {len(numbers)} routers and none of step {_absent(numbers)}; {EXPECTED}")
    logits = tuple(_logits(numbers[number], f"{path}: router {number}") for number in range(len(numbers)))
    widths = sorted({len(row) for row in logits})
    if len(widths) > 1:
        raise CheckpointError(f"{path} has routers of {widths[0]} and of {widths[-1]} branches; expected one number")
    return Routers(logits, _branches(content.get(BRANCHES), path))


def write_routers(path: Path, routers: Routers) -> None:
    """Write routers in the released form, and the names of their branches beside them."""
    holder: dict[str, Any] = {
        HOLDER: {f"{number}.prob": torch.tensor(row) for number, row in enumerate(routers.logits)}
    }
    if routers.branches is not None:
        holder[BRANCHES] = list(routers.branches)
    buffer = BytesIO()
    torch.save(holder, buffer)
    atomic_write(path, buffer.getvalue())


def _absent(numbers: Mapping[int, Any]) -> int:
    return next(number for number in range(len(numbers)) if number not in numbers)


def _logits(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, Tensor) or value.ndim != 1 or not len(value) or value.dtype not in FLOATING:
        shape = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"{name} is {shape}; expected one row of floating logits")
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{name} contains NaN or infinity; train it anew")
    return tuple(value.tolist())


def _branches(names: Any, path: Path) -> tuple[str, ...] | None:
    if names is None or isinstance(names, Tensor):
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: {BRANCHES} are {type(names).__name__}; expected a list of names")
    return tuple(names)
