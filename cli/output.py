"""Lines and tables that several commands print on a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ditc.bundle import Bundle
    from ditc.engines.integer_form import Arithmetic

__all__ = ["print_arithmetic", "print_facts", "print_record", "print_table"]


def print_record(result: BaseModel) -> None:
    """Print the result of a command as one JSON document, indented."""
    click.echo(json.dumps(result.model_dump(mode="json"), indent=1))


def print_facts(path: Path, bundle: Bundle) -> None:
    """Print the headline facts of a bundle."""
    from ditc.cli.listing import bundle_facts

    click.echo(f"{path}")
    for name, text in bundle_facts(bundle).items():
        click.echo(f"  {name:<16} {text}")


def print_arithmetic(arithmetic: Arithmetic | None) -> None:
    """Print the arithmetic of integer products on this machine, where there are any."""
    if arithmetic is not None:
        click.echo(f"INT8 on this CPU: {arithmetic.text}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, names left, numbers right; as wide as it is, whatever the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(80, sum(max(map(len, cells)) + 2 for cells in zip(columns, *rows, strict=True)))).print(table)
