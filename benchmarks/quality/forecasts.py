"""The worth of each forecast of a reuse, in floating point and in W8A8, at few computed steps.

    python benchmarks/quality/forecasts.py [--hours 2]
    python benchmarks/quality/results.py --write

Runs every trial of `forecast_cells.py` that forecasts.json doesn't hold yet, one after the other on one core, the first
seeds of all cells first, and writes the results after each; stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from cells import BASE
from forecast_cells import FORECAST_CELLS, SEEDS
from trial import digest_of_trial, trial

from ditc.files import atomic_write
from ditc.machine import machine

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hours", type=float, default=1000.0, help="no trial begins after that")
    parser.add_argument("--work", type=Path, default=Path("out/forecasts"), help="exports and FP's images, kept")
    parser.add_argument("--out", type=Path, default=HERE / "forecasts.json")
    options = parser.parse_args()
    work, until = options.work.resolve(), time.monotonic() + options.hours * 3600
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(options.out.read_text())["trials"] if options.out.exists() else {}
    wanted = [(digest_of_trial(cell, seed), cell, seed) for seed in range(SEEDS) for cell in FORECAST_CELLS]
    todo = [each for each in wanted if each[0] not in rows]
    for place, (digest, cell, seed) in enumerate(todo, 1):
        if time.monotonic() > until:
            return
        start = time.process_time()
        result = trial(cell, seed, work)
        seconds = round(time.process_time() - start, 1)
        rows[digest] = {"settings": dict(cell.settings), "seed": seed, **result, "seconds": seconds}
        write(options.out, rows)
        told = f"{cell.group}, {cell.settings['policy']}, {cell.name}, seed {seed}"
        print(f"{place} of {len(todo)}: {told}: {result['psnr_db']:.2f} dB, {seconds} s", flush=True)
    print("all trials are there", flush=True)


def write(out: Path, rows: dict[str, Any]) -> None:
    """Write the results, a line for each trial."""
    trials = ",\n".join(f"{json.dumps(digest)}: {json.dumps(row)}" for digest, row in sorted(rows.items()))
    about = f'"machine": {machine().model_dump_json()},\n"base": {json.dumps(dict(BASE))}'
    atomic_write(out, f'{{\n{about},\n"trials": {{\n{trials}\n}}\n}}\n'.encode())


if __name__ == "__main__":
    main()
