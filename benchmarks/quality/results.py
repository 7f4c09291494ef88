"""Tables of the experiment: every cell's Frechet distance less FP's on the same noise, with intervals over the trials.

    python benchmarks/quality/results.py [--groups main ...]

A trial is a compile and its images, all from one seed, so an interval over trials covers the choice of calibration
points and the noise of the images at once. Intervals are Student's t at 95 %, the differences are paired by seed. A
star marks a difference that stays significant at 5 % after Holm's correction for all differences of its group.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cells import BASE, CELLS, Cell
from scipy import stats
from trial import digest_of_trial

HERE = Path(__file__).parent
LEVEL = 0.95
Trials = Mapping[str, Mapping[str, Any]]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Effect:
    """A mean over trials, its interval, and the probability of one at least as far from 0 if there is none."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def effect_of(values: Sequence[float]) -> Effect:
    """Student's t over at least two trials."""
    numbers = np.asarray(values, np.float64)
    n, mean = len(numbers), float(numbers.mean())
    error = float(numbers.std(ddof=1) / np.sqrt(n))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Effect(mean, mean - half, mean + half, p, n)


def significant(effects: Sequence[Effect]) -> list[bool]:
    """Holm's step-down procedure over all of them."""
    order = np.argsort([effect.p for effect in effects])
    found = [False] * len(effects)
    for rank, place in enumerate(order):
        if effects[place].p > (1 - LEVEL) / (len(effects) - rank):
            break
        found[place] = True
    return found


def rows_of(cell: Cell, trials: Trials) -> dict[int, Mapping[str, Any]]:
    """The trials of a cell that have been run, by seed."""
    digests = {seed: digest_of_trial(cell, seed) for seed in range(cell.seeds)}
    return {seed: trials[digest] for seed, digest in digests.items() if digest in trials}


def distance(row: Mapping[str, Any]) -> float:
    """How much farther from the real digits than FP's images of the same noise."""
    return float(row["found"]["frechet_distance"] - row["fp"]["frechet_distance"])


def naive_of(cell: Cell) -> dict[str, Any]:
    """The settings of the naive combination at a cell's sampler, schedule and precision."""
    kept = ("sampler", "policy", "precision")
    return {**BASE, **{name: value for name, value in cell.every_setting.items() if name in kept}}


def table(group: str, trials: Trials) -> list[str]:
    """Markdown lines of a group."""
    cells = [(cell, rows) for cell in CELLS if cell.group == group and len(rows := rows_of(cell, trials)) > 1]
    by_settings = {(cell.model, str(sorted(cell.every_setting.items()))): rows for cell, rows in cells}
    against_fp = [effect_of([distance(row) for row in rows.values()]) for _, rows in cells]
    starred = significant(against_fp)
    lines = [
        "| model | sampler | policy | | trials x images | Frechet distance less FP's | less naive | PSNR | variance |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (cell, rows), found, star in zip(cells, against_fp, starred, strict=True):
        naive = by_settings.get((cell.model, str(sorted(naive_of(cell).items()))), {})
        shared = [seed for seed in rows if seed in naive]
        change = [distance(rows[seed]) - distance(naive[seed]) for seed in shared]
        settings = cell.every_setting
        columns = (
            cell.model,
            settings["sampler"],
            settings["policy"],
            cell.name,
            f"{len(rows)} x {cell.images:,}",
            shown(found) + (" *" if star else ""),
            shown(effect_of(change)) if len(change) > 1 and any(change) else "",
            f"{mean_of(rows.values(), lambda row: row['psnr_db']):.1f} dB",
            f"{mean_of(rows.values(), lambda row: row['variance_ratio']):.3f}",
        )
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def shown(effect: Effect) -> str:
    return f"{effect.mean:+.3f} ({effect.low:+.3f} to {effect.high:+.3f})"


def mean_of(rows: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> float:
    return float(np.mean([value(row) for row in rows]))


def main() -> None:
    groups = tuple(dict.fromkeys(cell.group for cell in CELLS))
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--results", type=Path, default=HERE / "experiment.json")
    options = parser.parse_args()
    trials = json.loads(options.results.read_text())["trials"]
    for group in options.groups:
        print(f"\n### {group}\n")
        print("\n".join(table(group, trials)))


if __name__ == "__main__":
    main()
