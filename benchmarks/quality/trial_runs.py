"""The trials of some cells, one after the other on one core: resumable, the first seeds of all cells first."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cells import Cell
from trial import digest_of_trial, trial

from ditc.files import atomic_write
from ditc.machine import machine

__all__ = ["run_trials"]


Beside = Callable[[Cell, int, Path], Mapping[str, Any]]


def run_trials(
    cells: Iterable[Cell], about: Mapping[str, Any], out: Path, work: Path, beside: Beside = lambda *_: {}
) -> None:
    """Run every trial that `out` doesn't hold yet, and write it after each; stopped and started again, it goes on.

    `about` stands in front of the trials, and each has what `beside` tells of (cell, seed, work). The command line may
    name other places, some of the cells, and hours after which none begins.
    """
    cells = list(cells)
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="+", metavar="NAME", choices=[*dict.fromkeys(cell.name for cell in cells)])
    parser.add_argument("--hours", type=float, default=1000.0, help="no trial begins after that")
    parser.add_argument("--work", type=Path, default=work, help="exports and FP's images, kept")
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    work, until = options.work.resolve(), time.monotonic() + options.hours * 3600
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(options.out.read_text())["trials"] if options.out.exists() else {}
    asked = [cell for cell in cells if options.cells is None or cell.name in options.cells]
    todo = [each for each in in_order(asked) if each[0] not in rows]
    for place, (digest, cell, seed) in enumerate(todo, 1):
        if time.monotonic() > until:
            return
        start = time.process_time()
        result = {**beside(cell, seed, work), **trial(cell, seed, work)}
        seconds = round(time.process_time() - start, 1)
        which = {"model": cell.model, "name": cell.name, "settings": dict(cell.settings), "seed": seed}
        rows[digest] = {**which, **result, "seconds": seconds}
        write(options.out, rows, about)
        told = f"{cell.group}, {cell.settings['policy']}, {cell.name}, seed {seed}"
        print(f"{place} of {len(todo)}: {told}: {result['psnr_db']:.2f} dB, {seconds} s", flush=True)
    print("all trials are there", flush=True)


def in_order(cells: Iterable[Cell]) -> list[tuple[str, Cell, int]]:
    """Return (digest, cell, seed) of every trial, the first seeds of all cells first."""
    trials = [(digest_of_trial(cell, seed), cell, seed) for cell in cells for seed in range(cell.seeds)]
    return sorted(trials, key=lambda each: each[2])


def write(out: Path, rows: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write the results, a line for each trial."""
    trials = ",\n".join(f"{json.dumps(digest)}: {json.dumps(row)}" for digest, row in sorted(rows.items()))
    front = f'"machine": {machine().model_dump_json()}' + "".join(
        f',\n"{k}": {json.dumps(v)}' for k, v in about.items()
    )
    atomic_write(out, f'{{\n{front},\n"trials": {{\n{trials}\n}}\n}}\n'.encode())
