"""Configuration files of diffusers: every key is read, known to change nothing, or refused by its name.

A key that a file leaves out has the default of the class that the file names, which later releases may have added.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ditc.errors import CheckpointError

__all__ = ["DEFAULTED", "Config", "Keys", "class_named", "config_of", "read_json", "spelled"]

T = TypeVar("T")

DEFAULTED = "_use_default_values"  # keys that diffusers itself takes from the class though the file has them
LONGEST_VALUE = 60  # in messages
LARGEST = 1 << 16  # of any whole number here; what lies above it would only exhaust memory


@dataclass(frozen=True)
class Keys:
    """The keys that the configuration of one class may hold.

    `read` are the class's defaults of keys that are read. `fixed` maps keys that may have one value only to the class's
    default and that value. `harmless` maps those that change nothing here to the reason.
    """

    read: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    harmless: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> set[str]:
        return {*self.read, *self.fixed, *self.harmless}


@dataclass(frozen=True)
class Config:
    """The values of a configuration file, those of its class where it has none. Each getter raises CheckpointError."""

    path: Path
    kind: str
    values: Mapping[str, Any]
    absent: Collection[str] = ()

    def error(self, key: str, expected: str) -> CheckpointError:
        """The error about a value: what it is, and where it comes from."""
        value = spelled(self.values[key])
        said = f"is missing, which {self.kind} takes as {value}" if key in self.absent else f"is {value}"
        return CheckpointError(f"{self.path}: {key} {said}, expected {expected}")

    def whole(self, key: str, least: int = 1, most: int = LARGEST) -> int:
        """Return a whole number."""
        value = self.values[key]
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, above: float = -math.inf, below: float = math.inf) -> float:
        """Return a finite number between two bounds, neither included."""
        value = self.values[key]
        if type(value) not in (int, float) or abs(value) > sys.float_info.max or not above < value < below:
            bounds = [f"above {above:g}"] * (above > -math.inf) + [f"below {below:g}"] * (below < math.inf)
            raise self.error(key, " ".join(["a number", " and ".join(bounds)]).rstrip())
        return float(value)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self.values[key]
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def one_of(self, key: str, known: Mapping[str, T]) -> T:
        """Return a name's value."""
        value = self.values[key]
        if not isinstance(value, str) or value not in known:
            raise self.error(key, f"one of: {', '.join(sorted(known))}")
        return known[value]


def spelled(value: Any) -> str:
    """A value as a message has it: JSON's words, and of long ones the beginning."""
    try:
        text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    except (ValueError, RecursionError):  # Python prints no numbers of more than 4,300 digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """A JSON object; `expected` says of what it is a part. Raises CheckpointError."""
    try:
        content = json.loads(path.read_bytes())  # in UTF-8, whatever the locale
    except FileNotFoundError as e:
        raise CheckpointError(f"no such file: {path}; expected {expected}") from e
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not readable JSON ({e}); copy it again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def class_named(entries: Mapping[str, Any]) -> str:
    """The class that a configuration names; what can be the name of none as a message has it."""
    name = entries.get("_class_name", "no class")
    return name if isinstance(name, str) and len(name) <= LONGEST_VALUE else spelled(name)


def config_of(path: Path, entries: Mapping[str, Any], keys: Keys, elsewhere: Collection[str] = ()) -> Config:
    """A configuration held to what its class may hold.

    `elsewhere` are keys of related classes, which diffusers leaves out as well. Raises CheckpointError naming a key
    that nobody knows, or one whose value a model of ours can't have.
    """
    kind = class_named(entries)
    given = {key: value for key, value in entries.items() if not key.startswith("_")}
    unknown = sorted(given.keys() - keys.known - set(elsewhere))
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]} ({spelled(given[unknown[0]])}) is no key of a {kind} that ditc knows; remove it if "
            "it changes nothing"
        )
    defaulted = entries.get(DEFAULTED) or []
    if not isinstance(defaulted, list):
        raise CheckpointError(f"{path}: {DEFAULTED} is {spelled(defaulted)}, expected a list of keys")
    defaults = {**keys.read, **{key: default for key, (default, _) in keys.fixed.items()}}
    own = {key: value for key, value in given.items() if key in defaults and key not in defaulted}
    config = Config(path, kind, {**defaults, **own}, defaults.keys() - own.keys())
    for key, (_, wanted) in keys.fixed.items():
        value = config.values[key]
        if type(value) is not type(wanted) or value != wanted:
            raise config.error(key, f"{spelled(wanted)}; ditc knows no other form of it")
    return config
