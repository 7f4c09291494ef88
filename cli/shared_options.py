"""Arguments and options that several commands have, and that no settings hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ditc.cli.headings import BUNDLE, GENERAL, SettingOption
from ditc.cli.option_types import A_PATH

__all__ = ["a_bundle", "as_json", "exports_option", "force_option", "out_option", "save_option"]

Callback = TypeVar("Callback", bound=Callable[..., Any])

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
