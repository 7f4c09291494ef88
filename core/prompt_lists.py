"""Prompts as people give them: one or several, or a file with one a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditc.errors import InputError
from ditc.spec import Record

__all__ = ["PromptList", "PromptOrigin", "checked_prompts", "lines_of", "read_prompts", "written_prompts"]


@dataclass(frozen=True)
class PromptList:
    """Prompts and where they are from, as people read it."""

    source: str
    prompts: tuple[str, ...]


class PromptOrigin(Record):
    """The number of the prompts that a bundle was compiled with, and where they are from; they lie in a file of it."""

    source: str
    count: int


def checked_prompts(name: str, given: Any) -> list[str]:
    """Return one prompt or several as a list. Raises InputError for what is none, as for an empty list."""
    if isinstance(given, (bytes, bytearray)) or not isinstance(given, (str, Sequence)):
        raise InputError(f"{name} must be a text or a list of texts, found {type(given).__name__}")
    prompts = [given] if isinstance(given, str) else list(given)
    for prompt in prompts:
        if not isinstance(prompt, str):
            shown = " ".join(repr(prompt).split())
            raise InputError(f"{name} must be a text or a list of texts, found {shown:.60} in it")
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            raise InputError(f"{name} must be text that UTF-8 can write, found {prompt[:40]!r}") from e
    if not prompts:
        raise InputError(f'{name} is an empty list; give a text for each image, "" is the empty one')
    return prompts


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file, as `lines_of` has them. Raises InputError where it holds none."""
    try:
        return lines_of(path.read_bytes())
    except OSError as e:
        raise InputError(f"can't read prompts from {path} ({e.strerror or e}); expected a file of one a line") from e
    except ValueError as e:
        raise InputError(f"{path} holds no prompts: {e}; expected text in UTF-8, a prompt on each line") from e


def lines_of(content: bytes) -> tuple[str, ...]:
    """Return the lines of text in UTF-8; an empty one is the empty prompt. Raises ValueError where it is none."""
    text = content.decode("utf-8-sig")
    if not text:
        raise ValueError("it is empty")
    return tuple(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n"))


def written_prompts(prompts: Sequence[str]) -> bytes:
    """Return prompts as a file that `lines_of` reads. Raises InputError for one of several lines."""
    for prompt in prompts:
        if "\n" in prompt or prompt.endswith("\r"):
            raise InputError(f"a prompt to compile with is one line, found {prompt[:60]!r}")
    return "".join(f"{prompt}\n" for prompt in prompts).encode()
