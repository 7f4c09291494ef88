"""LoRAs (arXiv 2106.09685): as a user names their files, and as a bundle tells which ones its weights have in them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from ditc.errors import InputError
from ditc.records import Record

__all__ = ["Lora", "MergedLora", "lora_from_text", "loras_from"]


@dataclass(frozen=True)
class Lora:
    """A file of a LoRA, and the weight with which it is merged: W + weight * scale * B A in each layer.

    Raises InputError for a weight that is no number, or 0, with which it would change nothing.
    """

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise InputError(f"the weight of a LoRA must be a number, found {self.weight!r} for {self.path}")
        if not math.isfinite(self.weight) or self.weight == 0:
            reason = "would change nothing; leave it out" if self.weight == 0 else "is not finite"
            raise InputError(f"--lora {self.path}:{self.weight:g}: that weight {reason}")


class MergedLora(Record):
    """A LoRA that is in the weights of a model: its file, the weight it was merged with, the layers it changed."""

    file: str
    sha256: str
    weight: float
    layers: int

    @property
    def told(self) -> str:
        """The line about it for people."""
        places = f"{self.layers} layer{'s' * (self.layers != 1)}"
        return f"LoRA {self.file} (SHA-256 {self.sha256[:16]}), weight {self.weight:g}, into {places}"


def lora_from_text(text: str) -> Lora:
    """Return the LoRA of "FILE" or "FILE:WEIGHT"; a file whose own name has the colon is taken as it is.

    Raises InputError for a weight that is no number.
    """
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Lora(Path(text))
    try:
        return Lora(Path(file), float(weight))
    except ValueError as e:
        raise InputError(f"--lora must be FILE or FILE:WEIGHT, found {text!r}: {weight!r} is no number") from e


def loras_from(given: Iterable[str | PathLike[str] | Lora]) -> tuple[Lora, ...]:
    """Return the LoRAs that a user names: texts as the command line takes them, paths, or with their weights.

    Raises InputError for what is none of these.
    """
    named = (given,) if isinstance(given, (str, PathLike, Lora)) else tuple(given)
    return tuple(_lora_from(each) for each in named)


def _lora_from(given: str | PathLike[str] | Lora) -> Lora:
    if isinstance(given, Lora):
        return given
    if isinstance(given, str):
        return lora_from_text(given)
    if isinstance(given, PathLike):
        return Lora(Path(given))
    raise InputError(f"a LoRA is FILE, FILE:WEIGHT or ditc.Lora(path, weight), found {given!r}")
