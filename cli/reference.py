"""The tables of docs/cli.md, from the options themselves: `python -m ditc.cli.reference docs/cli.md` writes them anew.

In the document a line `<!-- options: COMMAND -->` begins what is written, `<!-- end -->` ends it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from ditc.cli.headings import GENERAL, by_group
from ditc.cli.main import cli
from ditc.runtime.options import PLACE

__all__ = ["rewritten", "tables_of"]

WRITTEN = re.compile(r"(<!-- options: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
ONCE = "where-it-runs"  # the table of the options that are told once, and the name of its place
MODEL_COMMAND = "compile"  # whose options others share


def rewritten(text: str) -> str:
    """Return a document with its tables written anew."""
    return WRITTEN.sub(lambda match: f"{match[1]}{tables_of(match[2])}{match[3]}", text)


def tables_of(name: str) -> str:
    """Return what a command takes as Markdown; ONCE is where a bundle runs.

    Options of ONCE stand in the other commands by name only, and so does a whole MODEL_COMMAND.
    """
    if name == ONCE:
        return _table({"": by_group(_options("run"))[PLACE]})
    options, compiling = _options(name), [] if name == MODEL_COMMAND else _options(MODEL_COMMAND)
    told = {option.help for option in compiling}
    shared = [option for option in options if option.help in told]
    if 2 * len(shared) < len(compiling):  # no compile, but a few options like its
        shared = []
    own = by_group(option for option in options if option not in shared)
    place = own.pop(PLACE, [])
    parts = [_table(own)] if own else []
    if place:
        parts.append(f"Further [where it runs](#{ONCE}): {_flags(place)}.\n")
    if shared:
        parts.append(f"Further all options of [`{MODEL_COMMAND}`](#ditc-{MODEL_COMMAND}){_without(options)}.\n")
    return "\n".join(parts)


def _without(options: Iterable[click.Option]) -> str:
    """Return which options of MODEL_COMMAND are not among these, as the end of a sentence."""
    names = {option.name for option in options}
    missing = [option for option in _options(MODEL_COMMAND) if option.name not in names]
    return f" but {_flags(missing)}" if missing else ""


def _options(name: str) -> list[click.Option]:
    """Return the options of a command that the reference tells: not those of all commands, and none that is hidden."""
    options = (option for option in cli.commands[name].params if isinstance(option, click.Option))
    return [option for option in options if not option.hidden and getattr(option, "group", GENERAL) != GENERAL]


def _flags(options: Iterable[click.Option]) -> str:
    return ", ".join(f"`{flag}`" for option in options for flag in (*option.opts, *option.secondary_opts))


def _table(groups: Mapping[str, Iterable[click.Option]]) -> str:
    lines = ["| option | meaning | default |", "|---|---|---|"]
    for heading, options in groups.items():
        lines += [f"| **{heading}** |  |  |"] if heading else []
        lines += map(_row, options)
    return "".join(f"{line}\n" for line in lines)


def _row(option: click.Option) -> str:
    value = f" `{option.metavar}`".replace("|", r"\|") if option.metavar else ""
    default = f"`{option.default}`" if option.show_default else "required" if option.required else ""
    return f"| {_flags([option])}{value} | {option.help} | {default} |"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(rewritten(document.read_text()))
