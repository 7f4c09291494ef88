"""The worth of quantization, cache, TAP and VC, alone and together, on the reference model, plain and under stress.

    python benchmarks/quality/experiment.py [--groups ddim ...] [--hours 2]

Runs every trial of every cell that the results don't hold yet, a process for each core, and writes the results after
each; stopped and started again, it goes on. The tables and plots of docs/results.md and tables.md
come from `results.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

from cells import BASE, CELLS, Cell
from trial import digest_of_trial, trial

from ditc.files import atomic_write
from ditc.machine import machine

HERE = Path(__file__).parent
GROUPS = tuple(dict.fromkeys(cell.group for cell in CELLS))


def pinned(cores: Any) -> None:
    """Give a worker a core of its own."""
    os.sched_setaffinity(0, {cores.get()})
    import torch

    torch.set_num_threads(1)


def timed(cell: Cell, seed: int, work: Path) -> dict[str, Any]:
    """Run a trial, and add the time that its core worked for it."""
    start = time.process_time()
    measures = trial(cell, seed, work)
    key = {"model": cell.model, "settings": dict(cell.settings), "seed": seed}
    return key | measures | {"seconds": round(time.process_time() - start, 1)}


def missing(groups: list[str], rows: dict[str, Any]) -> Iterator[tuple[str, Cell, int]]:
    """Yield trials that are not in the results, every cell's first seed first: a part of them says something of all."""
    seen = set(rows)
    chosen = [cell for cell in CELLS if cell.group in groups]
    for seed in range(max(cell.seeds for cell in chosen)):
        for cell in chosen:
            digest = digest_of_trial(cell, seed)
            if seed < cell.seeds and digest not in seen:
                seen.add(digest)
                yield digest, cell, seed


def write(out: Path, rows: dict[str, Any]) -> None:
    results = {"machine": machine().model_dump(), "base": dict(BASE), "trials": dict(sorted(rows.items()))}
    atomic_write(out, json.dumps(results, indent=0).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--hours", type=float, default=1000.0, help="no trial begins after that")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="exports and FP images, kept")
    parser.add_argument("--out", type=Path, default=HERE / "experiment.json")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(options.out.read_text())["trials"] if options.out.exists() else {}
    run(options, work, rows)


def run(options: argparse.Namespace, work: Path, rows: dict[str, Any]) -> None:
    todo, until = missing(options.groups, rows), time.monotonic() + options.hours * 3600
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in range(options.workers):
        cores.put(core)
    pool = ProcessPoolExecutor(options.workers, context, pinned, (cores,))
    running: dict[Future[dict[str, Any]], tuple[str, Cell]] = {}
    with pool:
        while True:
            if time.monotonic() < until:
                for digest, cell, seed in islice(todo, options.workers - len(running)):
                    running[pool.submit(timed, cell, seed, work)] = digest, cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                digest, cell = running.pop(future)
                rows[digest] = future.result()
                write(options.out, rows)
                report(cell, rows[digest])


def report(cell: Cell, row: dict[str, Any]) -> None:
    distance = row["found"]["frechet_distance"] - row["fp"]["frechet_distance"]
    print(
        f"{cell.group} | {cell.model} | {cell.name} | {row['settings']} | seed {row['seed']}: Frechet distance "
        f"{distance:+.3f}, PSNR {row['psnr_db']:.1f} dB, variance {row['variance_ratio']:.3f}, {row['seconds']} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
