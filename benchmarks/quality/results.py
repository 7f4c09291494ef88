"""Tables and plots of the experiment: what each cell costs against FP, with intervals over its trials.

    python benchmarks/quality/results.py [--groups ddim ...] [--write]

A trial is a compile and its images, all from one seed, so an interval over trials covers the choice of calibration
points and the noise of the images at once. Intervals are Student's t at 95 %, the differences are paired by seed. A
star marks a difference that stays significant at 5 % after Holm's correction for all of its kind in the group.

With --write the tables go into docs/results.md, each between its two marks, and the plots beside it; they need
matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cells import BASE, CELLS, Cell
from scipy import stats
from trial import digest_of_trial

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
LEVEL = 0.95
GROUPS = tuple(dict.fromkeys(cell.group for cell in CELLS))
Row = Mapping[str, Any]
Trials = Mapping[str, Row]
Measure = Callable[[Row], float]
PLOTS = {
    "ddim": "Frechet distance less FP's of every strategy, DDIM",
    "ddpm": "Frechet distance less FP's of every strategy, DDPM",
    "points": "PSNR against the number of calibration points, a line for each selector",
}
# what the cells of a group are held against beside FP: the naive combination, but for those named here
BESIDE = {"seven": "w8a8"}
NAIVE = "naive"


@dataclass(frozen=True)
class Effect:
    """A mean over trials, its interval, and the probability of one at least as far from 0 if there is none."""

    mean: float
    low: float
    high: float
    p: float
    n: int


@dataclass(frozen=True)
class Found:
    """A cell with the trials of it that have been run, by seed, and those of the cell that it is held against."""

    cell: Cell
    rows: Mapping[int, Row]
    beside: Mapping[int, Row]

    def effect(self, measure: Measure) -> Effect:
        """Of a measure, over all trials."""
        return effect_of([measure(row) for row in self.rows.values()])

    @property
    def change(self) -> Effect | None:
        """Of the Frechet distance, against the other cell with the same seeds; None where it is that itself."""
        shared = [seed for seed in self.rows if seed in self.beside]
        changes = [distance(self.rows[seed]) - distance(self.beside[seed]) for seed in shared]
        return effect_of(changes) if any(changes) else None


def distance(row: Row) -> float:
    """How much farther from the real digits than FP's images of the same noise."""
    return float(row["found"]["frechet_distance"] - row["fp"]["frechet_distance"])


def recall(row: Row) -> float:
    """How much less of the real digits lies among the images than among FP's of the same noise."""
    return float(row["found"]["recall"] - row["fp"]["recall"])


def psnr(row: Row) -> float:
    return float(row["psnr_db"])


def variance(row: Row) -> float:
    return float(row["variance_ratio"])


def effect_of(values: Sequence[float]) -> Effect:
    """Student's t; one trial alone has no interval, and shows nothing."""
    numbers = np.asarray(values, np.float64)
    n, mean = len(numbers), float(numbers.mean())
    if n == 1:
        return Effect(mean, -np.inf, np.inf, 1.0, n)
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


def rows_of(cell: Cell, trials: Trials) -> dict[int, Row]:
    """The trials of a cell that have been run, by seed."""
    digests = {seed: digest_of_trial(cell, seed) for seed in range(cell.seeds)}
    return {seed: trials[digest] for seed, digest in digests.items() if digest in trials}


def naive_of(cell: Cell) -> Cell:
    """The naive combination at a cell's sampler, schedule and precision."""
    kept = {name: value for name, value in cell.every_setting.items() if name in ("sampler", "policy", "precision")}
    return Cell(cell.group, "naive", cell.model, {**BASE, **kept}, cell.seeds, cell.images)


def eight_bits_of(cell: Cell) -> Cell:
    """The same settings with eight bits of weights."""
    settings = {name: value for name, value in cell.settings.items() if name != "precision"}
    return replace(cell, name=BESIDE["seven"], settings=settings)


def found_in(group: str, trials: Trials) -> list[Found]:
    """The cells of a group that have been tried."""
    found, other = {}, eight_bits_of if group in BESIDE else naive_of
    for cell in CELLS:
        rows = rows_of(cell, trials)
        if cell.group == group and rows:
            name = (cell.model, cell.name, *(cell.every_setting[key] for key in ("sampler", "policy")))
            found[name] = Found(cell, rows, rows_of(other(cell), trials))
    return list(found.values())


def header(beside: str) -> list[str]:
    """The head of a table whose cells are held against FP and one other."""
    names = ("model", "sampler", "policy", "", "trials x images", "Frechet distance less FP's", f"less {beside}'s")
    columns = [*names, "recall less FP's", "PSNR", "variance"]
    return [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]


def table(cells: Sequence[Found]) -> list[str]:
    """Markdown lines of a group."""
    against_fp = [found.effect(distance) for found in cells]
    changes = [found.change for found in cells]
    known = [change for change in changes if change is not None]
    stars = dict(zip(map(id, [*against_fp, *known]), [*significant(against_fp), *significant(known)], strict=True))
    lines = header(BESIDE.get(cells[0].cell.group, NAIVE))
    for found, own, change in zip(cells, against_fp, changes, strict=True):
        settings = found.cell.every_setting
        columns = (
            found.cell.model,
            settings["sampler"],
            settings["policy"],
            found.cell.name,
            f"{len(found.rows)} x {found.cell.images:,}",
            shown(own) + (" *" if stars[id(own)] else ""),
            "" if change is None else shown(change) + (" *" if stars[id(change)] else ""),
            shown(found.effect(recall)),
            shown(found.effect(psnr), "{:.1f}"),
            f"{found.effect(variance).mean:.3f}",
        )
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def state(trials: Trials, processor: str) -> list[str]:
    """How much of the experiment has been run, by group, and how long that took."""
    wanted = {
        group: {digest_of_trial(c, seed) for c in CELLS if c.group == group for seed in range(c.seeds)}
        for group in GROUPS
    }
    done = ", ".join(f"{group} {len(each & trials.keys())} of {len(each)}" for group, each in wanted.items())
    every = set().union(*wanted.values()) & trials.keys()
    hours = sum(trials[digest]["seconds"] for digest in every) / 3600
    return [f"Trials that have been run: {done}. They took at most {hours:.1f} hours of one core of an {processor}."]


def section(group: str, cells: Sequence[Found]) -> list[str]:
    """What the page has of a group: its plot and its table."""
    if not cells:
        return ["Not run yet."]
    plot = [f"![{PLOTS[group]}](results-{group}.svg)", ""] if group in PLOTS else []
    return [*plot, *table(cells)]


def shown(effect: Effect, form: str = "{:+.3f}") -> str:
    mean, low, high = (form.format(value) for value in (effect.mean, effect.low, effect.high))
    return f"{mean} ({low} to {high})" if effect.n > 1 else mean


def written(text: str, group: str, lines: Sequence[str]) -> str:
    """A document with a group's table between its marks."""
    mark, end = f"<!-- {group} -->", f"<!-- end of {group} -->"
    if text.count(mark) != 1 or text.count(end) != 1:
        raise SystemExit(f"docs/results.md has no place for the table of {group}: {mark} ... {end}")
    return re.sub(f"{mark}.*?{end}", lambda _: "\n".join((mark, "", *lines, "", end)), text, flags=re.DOTALL)


def renewed(page: str, found: Mapping[str, Any]) -> str:
    """A page with the tables of what has been found."""
    page = written(page, "state", state(found["trials"], found["machine"]["processor"]))
    for group in GROUPS:
        page = written(page, group, section(group, found_in(group, found["trials"])))
    return page


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--results", type=Path, default=HERE / "experiment.json")
    parser.add_argument("--write", action="store_true", help="renew docs/results.md and its plots, all groups")
    options = parser.parse_args()
    found = json.loads(options.results.read_text())
    trials = found["trials"]
    tables = {group: cells for group in options.groups if (cells := found_in(group, trials))}
    for group, cells in tables.items():
        print(f"\n### {group}\n")
        print("\n".join(table(cells)))
    if options.write:
        from plots import draw

        page = DOCS / "results.md"
        page.write_text(renewed(page.read_text(), found))
        draw({group: cells for group in GROUPS if (cells := found_in(group, trials))}, DOCS)


if __name__ == "__main__":
    main()
