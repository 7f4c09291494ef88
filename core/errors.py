"""The exception tree.

DitcError                 anything ditc refuses or fails at; the command line prints it as one line
├── InputError            a file, option or argument from outside is not what it has to be   (exit code 2)
│   ├── CheckpointError   a model that can't be read as the diffusion transformer it claims to be
│   └── BundleError       a bundle that is damaged, incomplete, or written by a newer ditc
└── CheckError            the work was done, but a check of its result failed                (exit code 1)

Every message says what was expected, what was found and what to do. Two Python warnings are ours: AdviceWarning, of
what works but not as well as it could, and DoubtWarning, of a result that may be worthless.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AdviceWarning",
    "BundleError",
    "CheckError",
    "CheckpointError",
    "DitcError",
    "DoubtWarning",
    "InputError",
    "one_line",
    "unknown_name",
]


class DitcError(Exception):
    """Base of every error that ditc raises on purpose. Its message is one line, whatever it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(DitcError):
    """A file, option or argument from outside is not what it has to be."""


class CheckpointError(InputError):
    """A model that can't be read as the diffusion transformer it claims to be."""


class BundleError(InputError):
    """A bundle that is damaged, incomplete, or written by a newer ditc."""


class CheckError(DitcError):
    """The work was done, but a check of its result failed."""


class AdviceWarning(UserWarning):
    """Something works, but slower, in another type or with less of its input than it could; says what to do."""


class DoubtWarning(UserWarning):
    """A model was read, and what it returns does not look like what it is said to predict."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is in no table: it lists the known ones."""
    return InputError(f"unknown {kind} {name!r}; choose one of: {', '.join(sorted(known))}")


def one_line(text: str) -> str:
    """A text from outside as one printable line: what would break it, or steer a terminal, is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
