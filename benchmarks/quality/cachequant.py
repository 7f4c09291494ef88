"""CacheQuant's rows beside those that they are held against, on the reference model: W8A8, DDIM-50, N = 3.

Trials are those of `trial.py`, fewer and smaller than the experiment's: two seeds of 500 images say where to look, not
what a default should be. Every trial is written when it is done, and the script goes on where it was stopped; `note` in
the JSON says how many of them there are.

    PYTHONPATH=benchmarks/quality python benchmarks/quality/cachequant.py [--cells dps ...] [--minutes 30]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cells import Cell, Settings
from trial import MODELS, digest_of_trial, trial, watched

from ditc.compiler.options import CompileOptions
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.policies import schedule_for

HERE = Path(__file__).parent
SEEDS, IMAGES = 2, 500
DEFAULT: Settings = {"smooth": "smooth", "select": "tap"}
ROWS: Mapping[str, Settings] = {
    "fora:3, hold": {"policy": "fora:3"},
    "dps:3, hold": {"policy": "dps:3"},
    "fora:3, taylor": {"policy": "fora:3", "reuse": "taylor"},
    "dps:3, taylor": {"policy": "dps:3", "reuse": "taylor"},
    "smoothcache at fora:3's share": {"policy": "smoothcache:0.18"},
    "fora:3, affine": {"policy": "fora:3", "reuse": "affine"},
    "fora:3, affine:open": {"policy": "fora:3", "reuse": "affine:open"},
    "dps:3, affine": {"policy": "dps:3", "reuse": "affine"},
    "fora:3, dec-quant": {"policy": "fora:3", "correct": "dec-quant"},
    "fora:3, w4a8": {"policy": "fora:3", "precision": "w4a8"},
    "fora:3, w4a8, dec-quant": {"policy": "fora:3", "precision": "w4a8", "correct": "dec-quant"},
}
CELLS = tuple(Cell("cachequant", name, "plain", {**DEFAULT, **row}, SEEDS, IMAGES) for name, row in ROWS.items())


def computed_share(cell: Cell, seed: int, work: Path) -> float:
    """Return the share of the branches' evaluations that compute."""
    options, model = CompileOptions(**cell.every_setting, seed=seed), MODELS[cell.model]()
    schedule = schedule_for(options.policy, model.spec, options.steps, watched(model, options, work))
    return schedule.computed_fraction


def missing(rows: Mapping[str, Any], names: list[str]) -> Iterator[tuple[str, Cell, int]]:
    """Yield trials that the results don't have, every cell's first seed first."""
    for seed in range(SEEDS):
        for cell in CELLS:
            digest = digest_of_trial(cell, seed)
            if cell.name in names and digest not in rows:
                yield digest, cell, seed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--minutes", type=float, default=600.0, help="no trial begins after that")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="exports and FP images, kept")
    parser.add_argument("--out", type=Path, default=HERE / "cachequant.json")
    options = parser.parse_args()
    work, until = options.work.resolve(), time.monotonic() + 60 * options.minutes
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(options.out.read_text())["trials"] if options.out.exists() else {}
    for digest, cell, seed in missing(rows, options.cells):
        if time.monotonic() > until:
            return
        share = computed_share(cell, seed, work)
        row = {"name": cell.name, "settings": dict(cell.settings), "seed": seed, "computed": share}
        rows[digest] = row | trial(cell, seed, work)
        write(options.out, rows)
        print(f"{cell.name}, seed {seed}: {share:.3f} computed, PSNR {rows[digest]['psnr_db']:.2f} dB", flush=True)


def write(out: Path, rows: Mapping[str, Any]) -> None:
    note = f"a first look: {len(rows)} of {len(CELLS) * SEEDS} trials, at most {SEEDS} seeds of {IMAGES} images each"
    results = {"note": note, "machine": machine().model_dump(), "trials": dict(sorted(rows.items()))}
    atomic_write(out, json.dumps(results, indent=0).encode() + b"\n")


if __name__ == "__main__":
    main()
