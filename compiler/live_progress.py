"""How far a command is, on stderr: live bars on a terminal, a line for each finished stage elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ditc.progress import Progress

__all__ = ["progress_on_stderr", "steps_on_stderr"]


@contextmanager
def progress_on_stderr(*, lines: bool = True) -> Iterator[Progress]:
    """A progress callback: a live bar per stage on a terminal, elsewhere `lines` for finished stages, or silence."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage, done, total: click.echo(f"{stage}: done", err=True) if lines and done == total else None
        return
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console) as bars:

        def report(stage: str, done: int, total: int) -> None:
            name = stage.split(" ", maxsplit=1)[0]
            if name not in tasks:
                tasks[name] = bars.add_task(stage, total=total)
            bars.update(tasks[name], description=stage, completed=done, total=total)

        yield report


@contextmanager
def steps_on_stderr(name: str) -> Iterator[Callable[[Any], None]]:
    """A callback for step events: a live bar on a terminal, silence elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with progress_on_stderr() as progress:
        yield lambda event: progress(name, event.index + 1, event.steps)
