"""The types of options and arguments: what click makes of the words that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ditc.errors import InputError

__all__ = ["A_PATH", "TYPES"]


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
            flag, default = ("", None) if param is None else (param.opts[0], param.default)
            like = default if isinstance(default, str) and "," in default else "0,1,2"
            raise InputError(f"{flag} must be whole numbers with commas between, like {like}; found {value!r}") from e


A_PATH = _Path(path_type=Path)
# the type of a field -> that of its option; all others are texts, which the settings refuse themselves
TYPES: dict[Any, click.ParamType[Any]] = {
    int: click.INT,
    float: click.FLOAT,
    Path: A_PATH,
    tuple[int, ...]: _WholeNumbers(),
}
