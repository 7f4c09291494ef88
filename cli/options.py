"""From settings to a command line: the options of a command are the fields of its settings.

@click.command("report", cls=Command)
@takes(options=ReportOptions, place=Place)
def report_command(bundle: Path, options: ReportOptions, place: Place) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from ditc.errors import InputError
from ditc.settings import Option, Settings, flag_of, names_in, options_of

__all__ = [
    "A_PATH",
    "BUNDLE",
    "GENERAL",
    "Command",
    "SettingOption",
    "a_bundle",
    "as_json",
    "by_group",
    "exports_option",
    "force_option",
    "out_option",
    "part_of",
    "save_option",
    "takes",
]

Callback = TypeVar("Callback", bound=Callable[..., Any])

GENERAL = "General"  # the heading of --json and --help
BUNDLE = "Bundle"  # as in compiler/options.py


class _Path(click.Path):
    """A path that is not empty: the working directory, which an empty one stands for, nobody means by it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            name = "a path" if param is None else param.get_error_hint(ctx)
            raise InputError(f"{name} is empty; name a file or folder, . for the working directory")
        return super().convert(value, param, ctx)


class _WholeNumbers(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click only
    """Whole numbers with commas between."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, _: click.Context | None) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError as e:
            flag = "" if param is None else param.opts[0]
            raise InputError(f"{flag} must be whole numbers with commas between, like 0,1,2; found {value!r}") from e


A_PATH = _Path(path_type=Path)
# the type of a field -> that of its option; all others are texts, which the settings refuse themselves
TYPES: dict[Any, click.ParamType[Any]] = {
    int: click.INT,
    float: click.FLOAT,
    Path: A_PATH,
    tuple[int, ...]: _WholeNumbers(),
}


class SettingOption(click.Option):
    """An option with the heading that it stands under in `--help`; "" is the first one."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class Command(click.Command):
    """A command whose options stand under their headings: the ones that matter most, then the others by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        for group, members in by_group(options).items():
            with formatter.section(group or "Options"):
                formatter.write_dl([record for option in members if (record := option.get_help_record(ctx))])


def by_group(options: Iterable[click.Option]) -> dict[str, list[click.Option]]:
    """Return the options that are shown by heading, in the order they come in; "" is the first, GENERAL the last."""
    groups: dict[str, list[click.Option]] = {"": []}
    for option in options:
        if not option.hidden:
            groups.setdefault(getattr(option, "group", GENERAL), []).append(option)
    general = groups.pop(GENERAL, [])
    return {name: members for name, members in {**groups, GENERAL: general}.items() if members}


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
                *_declared(flag_of(part.kind, name), name, field),
                cls=SettingOption,
                group=option.group,
                help=option.help,
                hidden=name in part.refused,
                **_shape(field, option),
            )


def _declared(flag: str, name: str, field: FieldInfo) -> tuple[str, ...]:
    """Return an option's flags and the name of its argument; one that is on by default has a flag that turns it off."""
    return (f"{flag}/{flag.replace('--', '--no-', 1)}" if field.default is True else flag), name


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


a_bundle = click.argument("bundle", type=A_PATH)
as_json = click.option(
    "--json",
    "json_",
    is_flag=True,
    cls=SettingOption,
    group=GENERAL,
    help="Print one JSON document on stdout, and nothing else there.",
)
exports_option = click.option(
    "--exports",
    type=A_PATH,
    cls=SettingOption,
    group=BUNDLE,
    help="Folder that keeps FP segments for compiles with other settings.",
)
save_option = click.option(
    "--save",
    type=A_PATH,
    cls=SettingOption,
    help="Folder for report, features and FP images; FP images that lie there already are taken again.",
)


def out_option(text: str, **more: Any) -> Callable[[Callback], Callback]:
    """Return the option that says where a command writes."""
    return click.option("-o", "--out", type=A_PATH, cls=SettingOption, help=text, **more)


def force_option(group: str = "") -> Callable[[Callback], Callback]:
    """Return the option that allows to replace what lies there."""
    return click.option(
        "--force", is_flag=True, cls=SettingOption, group=group, help="Replace what an earlier run wrote."
    )
