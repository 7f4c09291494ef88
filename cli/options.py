"""From settings to a command line: the options of a command are the fields of its settings.

@click.command("report", cls=Command)
@takes(options=ReportOptions, place=Place)
def report_command(bundle: Path, options: ReportOptions, place: Place) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import wraps
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from ditc.cli.headings import SettingOption
from ditc.cli.option_types import TYPES
from ditc.errors import InputError
from ditc.settings import Option, Settings, flag_of, names_in, options_of

__all__ = ["part_of", "takes"]

Callback = TypeVar("Callback", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Part:
    """Settings of which a command takes some: `refused` ones are hidden, and refused with `reason`."""

    kind: type[Settings]
    only: Collection[str]
    refused: Collection[str] = ()
    reason: str = ""


def part_of(kind: type[Settings], *only: str, refused: Collection[str] = (), reason: str = "") -> _Part:
    """Return the settings of a kind that a command takes: `only` some, all where none is named.

    Options of those that are `refused` don't stand in `--help`; who gives one is told the reason.
    """
    return _Part(kind, only or tuple(kind.model_fields), refused, reason)


def takes(**kinds: type[Settings] | _Part) -> Callable[[Callback], Callback]:
    """Return a decorator that gives a command the options of these settings, and its function the settings.

    Each stands for the argument that it is named after. Settings are made in their order, so the first that makes no
    sense is the one that is told.
    """
    parts = {name: kind if isinstance(kind, _Part) else part_of(kind) for name, kind in kinds.items()}

    def decorate(function: Callback) -> Callback:
        @wraps(function)
        def with_settings(**given: Any) -> Any:
            values = {name: _values(part, given) for name, part in parts.items()}
            return function(**given, **{name: parts[name].kind(**value) for name, value in values.items()})

        decorated: Any = with_settings
        for part in reversed(parts.values()):
            for option in reversed(list(_click_options(part))):
                decorated = option(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


def _values(part: _Part, given: dict[str, Any]) -> dict[str, Any]:
    """Take what was given of a part out of all that a command has. Raises InputError for one that is refused."""
    context = click.get_current_context()
    values = {name: given.pop(name) for name, _, _ in options_of(part.kind) if name in part.only}
    stated = {
        name: value
        for name, value in values.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if refused := [name for name in stated if name in part.refused]:
        raise InputError(f"{flag_of(part.kind, refused[0])} {part.reason}")
    return stated


def _click_options(part: _Part) -> Iterator[Callable[[Any], Any]]:
    for name, field, option in options_of(part.kind):
        if name in part.only:
            yield click.option(
                *_declared(flag_of(part.kind, name), option.short, name, field),
                cls=SettingOption,
                group=option.group,
                help=option.help,
                hidden=name in part.refused,
                **_shape(field, option),
            )


def _declared(flag: str, short: str, name: str, field: FieldInfo) -> tuple[str, ...]:
    """Return an option's flags and the name of its argument; one that is on by default has a flag that turns it off."""
    flags = f"{flag}/{flag.replace('--', '--no-', 1)}" if field.default is True else flag
    return *([short] if short else []), flags, name


def _shape(field: FieldInfo, option: Option) -> dict[str, Any]:
    """Return the arguments of click.option that say what an option's value looks like."""
    kind = _inner(field.annotation)
    if kind is bool:
        return {"is_flag": True, "default": field.default, "show_default": field.default is True}
    default = None if field.is_required() else field.default
    if isinstance(default, tuple):
        default = None if option.several else ",".join(map(str, default))
    return {
        "type": TYPES.get(kind, click.STRING),
        "metavar": option.metavar or "|".join(names_in(field.annotation)) or None,
        "multiple": option.several,
        "required": field.is_required(),
        # to click an explicit None is a value, and so not missing
        **({} if default is None else {"default": default, "show_default": True}),
    }


def _inner(annotation: Any) -> Any:
    """Return the type without the None that it may be."""
    if get_origin(annotation) in (Union, UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation
