"""Settings, declared once: a field is an argument in Python, an option of the command line and a row of docs/cli.md.

    class TuneOptions(Settings):
        images: Annotated[int, Field(ge=1), Option("Images of each seed.")] = 500

They are checked at birth: what a value has to be stands in its type and its bounds, and what is wrong becomes one line
that names the option, in Python as on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic.functional_validators import ModelWrapValidatorHandler

from ditc.errors import InputError, unknown_name
from ditc.spec import Record

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from typing_extensions import Self

__all__ = ["Option", "Settings", "flag_of", "names_in", "options_of"]

# bounds as pydantic keeps them, and how a message says them
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
OUT_OF_BOUNDS = ("greater_than", "less_than")
# how the names of pydantic's errors begin, and what a value should have been
KINDS = (
    ("int", "a whole number"),
    ("float", "a number"),
    ("finite", "a finite number"),
    ("bool", "true or false"),
    ("tuple", "a row of values"),
    ("string", "a text"),
    ("path", "a path"),
)
LONGEST = 80  # characters of a value that a message quotes


@dataclass(frozen=True)
class Option:
    """The appearance of a field on a command line.

    `flag` and `metavar` are for those that the field's name and type don't give, `short` is a letter beside it. `group`
    is the heading that it stands under in `--help`, "" for the first one. `advice` ends the message about a value out
    of bounds. A field that may be given `several` times is a tuple.
    """

    help: str
    flag: str = ""
    metavar: str = ""
    group: str = ""
    advice: str = ""
    several: bool = False
    short: str = ""


class Settings(Record):
    """Base of the settings of a command: frozen, and checked at birth and whenever a copy changes some.

    Raises InputError, one line that names the option, for a value of the wrong kind, out of bounds, not in its list of
    names, or for a setting that there is not. Subclasses refuse what contradicts itself in an after-validator.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _refused_in_one_line(cls, values: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return check(values)
        except ValidationError as e:
            raise cls._refusal(e.errors()[0]) from e

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:  # noqa: ARG002
        """Return a copy with some settings changed, checked as the whole was."""
        return type(self).model_validate({**self.__dict__, **(update or {})})

    @classmethod
    def _refusal(cls, error: ErrorDetails) -> InputError:
        """Return what a user reads of the first thing that pydantic holds against the values."""
        given, kind = error["input"], error["type"]
        if not error["loc"]:
            return InputError(f"{cls.__name__} must be made of settings by name, found {_quoted(given)}")
        name = str(error["loc"][0])
        if name not in cls.model_fields:
            return unknown_name("setting", name, cls.model_fields)
        flag, field = flag_of(cls, name), cls.model_fields[name]
        if kind == "missing":
            return InputError(f"{flag} is missing; {cls.__name__} needs it")
        if kind == "literal_error" and isinstance(given, str):
            return unknown_name(flag, given, names_in(field.annotation))
        if kind == "literal_error":
            return InputError(f"{flag} must be one of: {', '.join(names_in(field.annotation))}; found {_quoted(given)}")
        if kind.startswith(OUT_OF_BOUNDS):
            expected, shown = _bounds(field), _number(given)
        else:
            expected = next((words for begin, words in KINDS if kind.startswith(begin)), error["msg"])
            shown = _quoted(given)
        option = _option(field)
        advice = f"; {option.advice}" if option is not None and option.advice else ""
        return InputError(f"{flag} must be {expected}, found {shown}{advice}")


def options_of(kind: type[Settings]) -> Iterator[tuple[str, FieldInfo, Option]]:
    """Yield (name, field, option) of every field that shows on the command line, in the order they are declared."""
    for name, field in kind.model_fields.items():
        option = _option(field)
        if option is not None:
            yield name, field, option


def flag_of(kind: type[Settings], name: str) -> str:
    """Return the option of a field, like --vc-images; of one that shows on no command line its name."""
    option = _option(kind.model_fields[name])
    return name if option is None else option.flag or f"--{name.replace('_', '-')}"


def _option(field: FieldInfo) -> Option | None:
    return next((item for item in field.metadata if isinstance(item, Option)), None)


def names_in(annotation: Any) -> tuple[str, ...]:
    """Return the names that a type allows, alone or beside None; none where it allows others."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next((names for part in get_args(annotation) if (names := names_in(part))), ())


def _bounds(field: FieldInfo) -> str:
    """Return the bounds of a field in words: "at least 1", "above 0 and below 1000"."""
    said = (
        f"{words} {_number(getattr(item, bound))}"
        for item in field.metadata
        for bound, words in BOUNDS.items()
        if getattr(item, bound, None) is not None
    )
    return " and ".join(said)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _shortened(value, str)


def _quoted(value: Any) -> str:
    return _shortened(value, repr)


def _shortened(value: Any, text_of: Callable[[Any], str]) -> str:
    """Return a value as text, of a long one the beginning."""
    try:
        text = text_of(value)
    except ValueError:  # Python refuses to write an integer of thousands of digits
        return "an integer too long to show"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
