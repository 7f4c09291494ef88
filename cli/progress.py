"""The progress of a command, on stderr: live bars on a terminal, a line for each finished stage elsewhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ditc.errors import AdviceWarning

if TYPE_CHECKING:
    from ditc.progress import Progress

__all__ = ["advice_on_stderr", "progress_on_stderr", "steps_on_stderr"]


@contextmanager
def advice_on_stderr() -> Iterator[None]:
    """Print what our own warnings advise as one line each; other warnings are shown as ever."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, AdviceWarning):
                click.echo(f"ditc: {message}", err=True)
            else:
                usual(message, category, *place, **more)

        warnings.showwarning = show
        yield


@contextmanager
def progress_on_stderr(*, lines: bool = True) -> Iterator[Progress]:
    """Give a progress callback: live bars by stage on a terminal, elsewhere `lines` for finished stages, or silence."""
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
    """Give a callback for step events: a live bar on a terminal, silence elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with progress_on_stderr() as progress:
        yield lambda event: progress(name, event.index + 1, event.steps)
