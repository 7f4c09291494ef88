"""Options under headings, in `--help` as in the reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

__all__ = ["BUNDLE", "GENERAL", "Command", "SettingOption", "by_group"]

GENERAL = "General"  # the heading of --json and --help
BUNDLE = "Bundle"  # as in compiler/options.py


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
