"""Rotation beside smoothing, alone and together, on the reference model, plain and stressed: DDIM-50, no cache.

A first look: one seed of few images. Every trial is written when it is done, and the script goes on where it was
stopped; `note` in the JSON says how many of them there are.

    PYTHONPATH=benchmarks/quality python benchmarks/quality/rotation.py [--minutes 30]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from cells import Cell, Settings
from trial import digest_of_trial, trial

from ditc.files import atomic_write
from ditc.machine import machine

HERE = Path(__file__).parent
SEEDS, IMAGES = 1, 64
SMOOTH: Settings = {"smooth": "smooth"}
ROWS: Mapping[str, Settings] = {
    "neither": {},
    "smooth": SMOOTH,
    "rotate 32": {"rotate": 32},
    "smooth + rotate 32": {**SMOOTH, "rotate": 32},
    "rotate 128": {"rotate": 128},
    "smooth + rotate 128": {**SMOOTH, "rotate": 128},
}


def cells() -> Iterator[Cell]:
    """Yield the cells that say most first."""
    for (name, row), model, precision in product(ROWS.items(), ("stressed", "plain"), ("w8a8", "w4a8")):
        settings = {"policy": "none", "precision": precision, "points": 256, **row}
        yield Cell("rotation", f"{model}, {precision}, {name}", model, settings, SEEDS, IMAGES)


CELLS = tuple(cells())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=600.0, help="no trial begins after that")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="exports and FP images, kept")
    parser.add_argument("--out", type=Path, default=HERE / "rotation.json")
    options = parser.parse_args()
    work, until = options.work.resolve(), time.monotonic() + 60 * options.minutes
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(options.out.read_text())["trials"] if options.out.exists() else {}
    for seed, cell in product(range(SEEDS), CELLS):
        digest = digest_of_trial(cell, seed)
        if digest in rows or time.monotonic() > until:
            continue
        row = {"name": cell.name, "model": cell.model, "settings": dict(cell.settings), "seed": seed}
        rows[digest] = row | trial(cell, seed, work)
        write(options.out, rows)
        print(f"{cell.name}, seed {seed}: PSNR {rows[digest]['psnr_db']:.2f} dB", flush=True)


def write(out: Path, rows: Mapping[str, Any]) -> None:
    note = f"a first look: {len(rows)} of {len(CELLS) * SEEDS} trials, at most {SEEDS} seed of {IMAGES} images each"
    results = {"note": note, "machine": machine().model_dump(), "trials": dict(sorted(rows.items()))}
    atomic_write(out, json.dumps(results, indent=0).encode() + b"\n")


if __name__ == "__main__":
    main()
