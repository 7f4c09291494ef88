"""Fewer steps against the cache: samplers alone and with a cache, by the number of steps that compute.

    python benchmarks/quality/steps.py [--hours 2]
    python benchmarks/quality/results.py --write

Runs every trial of `step_cells.py` that steps.json doesn't hold yet, one after the other on one core, and writes the
results after each; stopped and started again, it goes on. First seeds of all cells come first, those of W8A8 last.
Cells with settings that ditc doesn't know yet are left for later. A trial is a seed's images; the noise is the same for
all cells of a seed. Segments and executor are those of `ditc compile`, so calls of the network are counted as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cells import BASE, Cell
from step_cells import GROUPS, SEEDS, STEP_CELLS, known
from trial import SUBJECTS, THREADS, compiled_segments, digest_of_trial, exported, seed_images

from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan
from ditc.compiler.planning import make_plan
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.program import Program
from ditc.quality.distributions import Generated, RealSet, distribution_values
from ditc.quality.features import DIGITS_SHAPE, Extractor, open_extractor, real_digits
from ditc.runtime.executor import Samples

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hours", type=float, default=1000.0, help="no trial begins after that")
    parser.add_argument("--work", type=Path, default=Path("out/steps"), help="exports, kept")
    parser.add_argument("--out", type=Path, default=HERE / "steps.json")
    options = parser.parse_args()
    work, until = options.work.resolve(), time.monotonic() + options.hours * 3600
    work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(options.out.read_text())["trials"] if options.out.exists() else {}
    todo = list(missing(rows))
    for place, (digest, cell, seed) in enumerate(todo, 1):
        if time.monotonic() > until:
            return
        rows[digest] = step_trial(cell, seed, work)
        write(options.out, rows)
        report(f"{place} of {len(todo)}", rows[digest])
    later = sorted({cell.name for cell in STEP_CELLS if not known(cell)})
    print(f"all trials are there; not known yet and left for later: {', '.join(later) or 'none'}", flush=True)


def missing(rows: dict[str, Any]) -> Iterator[tuple[str, Cell, int]]:
    """Yield trials that are not in the results, every cell's first seed first: a part of them says something of all."""
    ready = [cell for cell in STEP_CELLS if known(cell)]
    for group, seed in product(GROUPS, range(SEEDS)):
        for cell in (cell for cell in ready if cell.group == group):
            if (digest := digest_of_trial(cell, seed)) not in rows:
                yield digest, cell, seed


def step_trial(cell: Cell, seed: int, work: Path) -> dict[str, Any]:
    """Return the measures of one trial, and the seconds of one core that it took."""
    start = time.process_time()
    options = CompileOptions(**cell.every_setting, seed=seed)
    plan = replace(make_plan(SUBJECTS[cell.model].open(), options), threads=THREADS)
    with TemporaryDirectory(dir=work) as temporary:
        plan, segments, tables = compiled_segments(plan, exported(cell.model, plan, work), Path(temporary))
        images = seed_images(plan, plan.program, segments, tables, seed, cell.images).images
    return {
        "settings": dict(cell.settings),
        "seed": seed,
        "n": cell.images,
        "computed": computed_steps(plan.program),
        **measures(plan, images),
        "seconds": round(time.process_time() - start, 1),
    }


def computed_steps(program: Program) -> int:
    """Return the number of steps at which the network computes."""
    return sum(any(program.segment(step.segment).compute) for step in program.steps)


def measures(plan: Plan, images: Samples) -> dict[str, Any]:
    """Measure images against the real digits: over the classifier's features, and the distance over pixels."""
    (digits, real), (pixels, real_pixels) = real_set("digits"), real_set("pixels")
    features = digits.features(images)
    assert digits.classes is not None
    consistent = digits.classes(features) == np.array(plan.spec.labels_in_turn(0, len(images)))
    of_features = distribution_values(Generated(features, consistent), real).model_dump()
    return {**of_features, "pixels": real_pixels.frechet_distance(np.float64(pixels.features(images)))}


@cache
def real_set(features: str) -> tuple[Extractor, RealSet]:
    """Return an extractor and the real digits in its features."""
    extractor = open_extractor(features, DIGITS_SHAPE)
    return extractor, RealSet(extractor.features(real_digits()[0]))


def write(out: Path, rows: dict[str, Any]) -> None:
    """Write the results, a line for each trial."""
    trials = ",\n".join(f"{json.dumps(digest)}: {json.dumps(row)}" for digest, row in sorted(rows.items()))
    about = f'"machine": {machine().model_dump_json()},\n"base": {json.dumps(dict(BASE))}'
    atomic_write(out, f'{{\n{about},\n"trials": {{\n{trials}\n}}\n}}\n'.encode())


def report(progress: str, row: dict[str, Any]) -> None:
    settings = " ".join(str(value) for value in row["settings"].values())
    print(
        f"{progress}: {settings}, seed {row['seed']}: {row['computed']} computed, Frechet distance "
        f"{row['frechet_distance']:.3f}, of pixels {row['pixels']:.3f}, recall {row['recall']:.3f}, "
        f"{row['seconds']} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
