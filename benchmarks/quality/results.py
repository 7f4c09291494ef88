"""The pages of the experiment: docs/results.md with its small tables and plots, tables.md with every complete table.

    python benchmarks/quality/results.py [--groups ddim ...] [--write] [--plots]

Without options it prints the tables of the groups. --write renews docs/results.md between its marks, tables.md whole,
and the picture of fewer steps (`steps.py`); --plots draws the other plots beside docs/results.md, which needs
matplotlib. `effects.py` says what an interval and a star are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import CELLS
from effects import GROUPS, Trials, TriedCell, tried_cells
from forecast_tables import FORECASTS_MARK, forecast_page
from other_tables import OTHERS
from step_cells import FLOAT
from step_picture import step_picture
from step_results import StepResults, step_results
from step_tables import MARK, step_page, step_tables
from tables import SUMMARIES, in_short, summary, table
from trial import digest_of_trial

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
TABLES = HERE / "tables.md"
PICTURE = DOCS / "results-steps.svg"
# the heading of a group's table, and what is said above it
HEADINGS: Mapping[str, tuple[str, str]] = {
    "ddim": ("Strategies, DDIM", "`cache alone` is in floating point."),
    "ddpm": ("Strategies, DDPM", "`cache alone` is in floating point."),
    "tuned": (
        "What tuning finds",
        "`ditc tune --worse-by 0.05` chose on images that no trial has (`tuned.py`, `tuned.json`).",
    ),
    "intervals": ("Other intervals", "Shorter, longer, and windows in which an extrapolation reaches farther."),
    "reuse": ("What a reuse returns", "Where its numbers are fitted; `hold` and `taylor` are among the strategies."),
    "noise": (
        "Under noise",
        "DDPM at other schedules: shorter and longer intervals, and windows with both ends computed.",
    ),
    "controls": ("What TAP is held against", "Ranges are `max` here, where the choice of points matters most."),
    "points": ("How many points", "Ranges are `max`."),
    "ranges": ("Ranges", ""),
    "scales": ("Scales", ""),
    "smoothing": ("Smoothing", ""),
    "bits": ("Fewer bits", "Simulated: weights or activations on a coarser grid inside INT8."),
    "seven": (
        "Seven bits of weights",
        "Weights on a grid of 127 values instead of 255, beside W8A8 of the same settings: 800 points\n"
        "chosen by TAP, smoothed, extrapolated where ditc does so by default.",
    ),
    "float": ("Steps in floating point", "Of the first and of the last 8 steps 3 each compute, of all 50 steps 17."),
}
FRONT = """# Every table of the experiment

Written by `results.py --write` from `experiment.json` and its like. [Results](../../docs/results.md) says how it
was measured, what the columns mean, and what follows. Unless a row says otherwise: DDIM, W8A8, `fora:3`, 800 random
points, `mse` ranges, static scales, no smoothing, `--reuse hold`, `--vc none`."""


def state(trials: Trials, processor: str) -> str:
    """Return the share of the experiment that has been run, by group, and the hours that it took."""
    wanted = {
        group: {digest_of_trial(c, seed) for c in CELLS if c.group == group for seed in range(c.seeds)}
        for group in GROUPS
    }
    done = ", ".join(f"{group} {len(each & trials.keys())} of {len(each)}" for group, each in wanted.items())
    every = set().union(*wanted.values()) & trials.keys()
    hours = sum(trials[digest]["seconds"] for digest in every) / 3600
    return f"Trials that have been run: {done}. They took at most {hours:.1f} hours of one core of an {processor}."


def written(text: str, name: str, lines: Sequence[str]) -> str:
    """Return a document with a table between its marks."""
    mark, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if text.count(mark) != 1 or text.count(end) != 1:
        raise SystemExit(f"docs/results.md has no place for the table of {name}: {mark} ... {end}")
    return re.sub(f"{mark}.*?{end}", lambda _: "\n".join((mark, "", *lines, "", end)), text, flags=re.DOTALL)


def renewed(
    page: str, cells: Mapping[str, Sequence[TriedCell]], steps: Mapping[str, StepResults], forecasts: Trials
) -> str:
    """Return docs/results.md with the small tables of what has been found, and what follows for fewer steps."""
    figures = {key: values for group in cells.values() for key, values in in_short(group).items()}
    for name, rows in SUMMARIES.items():
        page = written(page, name, summary(rows, figures))
    return written(written(page, FORECASTS_MARK, forecast_page(forecasts)), MARK, step_page(steps))


def tables_page(
    experiment: Mapping[str, Any], cells: Mapping[str, Sequence[TriedCell]], steps: Mapping[str, StepResults]
) -> str:
    """Return tables.md: every group's table, that of fewer steps, and those of the smaller experiments."""
    parts = [FRONT, state(experiment["trials"], experiment["machine"]["processor"])]
    for group, (heading, note) in HEADINGS.items():
        parts += [f"## {heading}", note, "\n".join(table(cells[group])) if cells[group] else "Not run yet."]
    parts += step_tables(steps)
    for other in OTHERS:
        rows = json.loads((HERE / other.figures).read_text())[other.rows]
        parts += [f"## {other.heading}", f"{other.note} `{Path(other.figures).name}`.", "\n".join(other.table(rows))]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="what is printed")
    parser.add_argument("--results", type=Path, default=HERE / "experiment.json")
    parser.add_argument("--steps", type=Path, default=HERE / "steps.json")
    parser.add_argument("--forecasts", type=Path, default=HERE / "forecasts.json")
    parser.add_argument("--write", action="store_true", help="renew docs/results.md and tables.md, all groups")
    parser.add_argument("--plots", action="store_true", help="draw the plots of docs/results.md again")
    options = parser.parse_args()
    experiment = json.loads(options.results.read_text())
    cells = {group: tried_cells(group, experiment["trials"]) for group in GROUPS}
    for group in options.groups:
        if cells[group]:
            print(f"\n### {group}\n")
            print("\n".join(table(cells[group])))
    if options.write:
        page, steps = DOCS / "results.md", step_results(json.loads(options.steps.read_text())["trials"])
        forecasts = json.loads(options.forecasts.read_text())["trials"]
        page.write_text(renewed(page.read_text(), cells, steps, forecasts))
        TABLES.write_text(tables_page(experiment, cells, steps))
        PICTURE.write_text(step_picture(steps[FLOAT]))
    if options.plots:
        from plots import draw

        draw({group: own for group, own in cells.items() if own}, DOCS)


if __name__ == "__main__":
    main()
