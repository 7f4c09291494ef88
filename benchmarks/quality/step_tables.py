"""The figures of `steps.py` as Markdown: a small table and the conclusions for docs/results.md, and whole tables.

Conclusions are written from the figures, so that they say what the trials say, however many have been run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from effects import Effect, significant
from step_cells import FLOAT, GRID, INT8, INTERVALS, OWN_SPACING, REUSES, SEEDS, STEP_CELLS
from step_results import CALLS, Duel, StepResults, StepTrials, duels, less, measure, named, reuse_shares
from tables import shown

__all__ = ["HEADING", "MARK", "step_page", "step_tables", "verdicts"]

MARK = "fewer steps"  # of its place in docs/results.md
HEADING = "Fewer steps against the cache"
DISTANCE, RECALL = measure("frechet_distance"), measure("recall")
SHOWN = (7, 10, 17, 25, 50)  # network calls, in docs/results.md
SINGLE = "one seed so far: both sides of a difference are chosen on it, and nothing has an interval."
# models of reuse_cost.json in words
MODELS = {"digits": "the reference model", "blocks of DiT-XL/2": "four blocks of DiT-XL/2"}
NOTE = """In floating point first, then a few cells as ditc compiles by default (800 points, TAP, smoothed). Less the
best alone: the solver alone with the least mean distance at as many computed steps, or up to the next number that was
tried alone, so that in doubt it had more of them. Stars are Holm's over all differences of a table. `steps.json`."""
DUELS_NOTE = """In floating point, those that take at most so many computing steps. In the differences both are chosen
on the other seeds, for each seed anew. In time a reuse takes the largest share of a computing step that
`../reuse_cost.json` has (W8A8, one image); what a computing step spends on later ones is not counted."""


def step_page(results: Mapping[str, StepResults]) -> list[str]:
    """Return the lines of docs/results.md: the table by calls of the network, and what follows from all of them."""
    rows = [row for row in duels(results[FLOAT], CALLS) if row.most in SHOWN]
    return [*duel_table(rows, "network calls"), "", *conclusions(results)]


def duel_table(rows: Sequence[Duel], unit: str) -> list[str]:
    """Return a row for each duel."""
    sides = ("best solver alone", "distance", "recall", "best with a cache", "distance", "recall")
    lines = lines_of((f"{unit}, at most", *sides, "distance less alone's", "recall less alone's"))
    for row in rows:
        each = [
            part
            for side in (row.alone, row.cached)
            for part in (named(side), *(f"{side.effect(of).mean:.3f}" for of in (DISTANCE, RECALL)))
        ]
        lines.append(line((str(row.most), *each, shown(row.distance), shown(row.recall))))
    return lines


def lines_of(columns: Sequence[str]) -> list[str]:
    return [line(columns), "|---" * len(columns) + "|"]


def line(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |"


def conclusions(results: Mapping[str, StepResults]) -> list[str]:
    """Return what follows, a line each."""
    own = results[FLOAT]
    told = [f"- **No verdict**: {SINGLE}"] if len(own.seeds) == 1 else against_alone(own)
    return [*told, *reach(own), *reuses(own), *integers(results.get(INT8)), *state(results)]


def against_alone(own: StepResults) -> list[str]:
    """Return the verdicts on solvers alone against those with a cache: by calls, by time, and of some solvers only."""
    on_ddim = duels(own, CALLS, ("DDIM",))
    own_spacing = duels(own.of(OWN_SPACING), CALLS)
    return [
        f"- **At equal network calls** {verdicts(duels(own, CALLS))}",
        *(
            f"- **In equal time**, where a reuse takes {share:.2f} of a step ({MODELS[model]}), "
            f"{verdicts(duels(own, share))}"
            for model, share in reuse_shares().items()
        ),
        f"- **A cache on DDIM** at equal network calls, against any solver alone: {verdicts(on_ddim)}",
        f"- **With the model's own spacing only**, on both sides, at equal network calls: {verdicts(own_spacing)}",
    ]


def verdicts(rows: Sequence[Duel]) -> str:
    """Say where the cache's distance and recall are less and more; undecided is where the interval holds 0."""
    if any(row.distance.n == 1 for row in rows):
        return SINGLE
    words = {
        "smaller at": [row.most for row in rows if row.distance.high < 0],
        "larger at": [row.most for row in rows if row.distance.low > 0],
        "undecided at": [row.most for row in rows if row.distance.low <= 0 <= row.distance.high],
    }
    recall = {
        "higher at": [row.most for row in rows if row.recall.low > 0],
        "lower at": [row.most for row in rows if row.recall.high < 0],
    }
    distance, of_recall = (said(parts) for parts in (words, recall))
    return f"the cache's distance is {distance}; its recall is {of_recall or 'undecided at all'}."


def said(words: Mapping[str, Sequence[int]]) -> str:
    """Return the parts that have any numbers."""
    return ", ".join(f"{text} {counted(at)}" for text, at in words.items() if at)


def counted(numbers: Sequence[int]) -> str:
    """Return numbers in words: "7, 10 and 17"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def reach(own: StepResults) -> Iterator[str]:
    """Yield how few calls come as close as DDIM's 50 steps, alone and with a cache, by mean distance."""
    fifty = own.at("DDIM", GRID[-1], 1, "alone")
    assert fifty is not None
    bound = fifty.mean(own.seeds)
    parts = []
    for side, text in ((own.alone, "alone"), (own.cached, "with a cache")):
        close = [trials for trials in side if trials.mean(own.seeds) <= bound]
        if close:
            fewest = min(close, key=lambda trials: (trials.computed, trials.mean(own.seeds)))
            parts.append(f"{text} {fewest.computed} ({named(fewest)}: {fewest.mean(own.seeds):.3f})")
    yield f"- **Calls that come as close as DDIM's 50 steps** ({bound:.3f}): {', '.join(parts)}."


def reuses(own: StepResults) -> Iterator[str]:
    """Yield how often each order is closer than holding, and the higher ones than the first, at the same schedules."""
    pairs = [("order 1", "hold"), ("order 2", "order 1"), ("order 3", "order 1")]
    for name, other in pairs:
        places = [(solver, steps, n) for solver in OWN_SPACING for steps in GRID for n in INTERVALS]
        both = [(own.at(*place, name), own.at(*place, other)) for place in places]
        changes = [change for a, b in both if a is not None and b is not None and (change := less(a, b)) is not None]
        if any(change.n > 1 for change in changes):
            yield f"- **{name.capitalize()} against {other}**, same solver, steps and N: {stood_out(changes)}."


def stood_out(changes: Sequence[Effect]) -> str:
    """Say in how many of the differences one side is significantly closer, after Holm's correction."""
    stars = significant(changes)
    closer = sum(star and change.mean < 0 for star, change in zip(stars, changes, strict=True))
    farther = sum(star and change.mean > 0 for star, change in zip(stars, changes, strict=True))
    below = sum(change.mean < 0 for change in changes)
    return (
        f"closer in {below} of {len(changes)} by the mean; significantly closer in {closer}, "
        f"significantly farther in {farther}"
    )


def integers(own: StepResults | None) -> Iterator[str]:
    """Yield the verdict on the quantized cells, where they have been run."""
    if own is not None and own.cached:
        yield f"- **W8A8**, a few cells at 10 and 17 network calls: {verdicts(duels(own, CALLS))}"


def state(results: Mapping[str, StepResults]) -> Iterator[str]:
    """Yield the part of the trials that have been run, and what has not been begun."""
    done, every = sum(own.run for own in results.values()), SEEDS * len(STEP_CELLS)
    names = {(trials.cell.group, trials.cell.name) for own in results.values() for trials in own.cells}
    later = [name for name, _ in REUSES.values() if (FLOAT, name) not in names]
    later += [] if INT8 in results else ["W8A8"]
    rest = f" Not run yet: {', '.join(later)}." if later else ""
    seeds = len(results[FLOAT].seeds)
    yield f"- Trials that have been run: {done:,} of {every:,}; seeds that are compared: {seeds}.{rest}"


def step_tables(results: Mapping[str, StepResults]) -> list[str]:
    """Return the parts of tables.md: every cell, and the duels by calls of the network and by time."""
    parts = [f"## {HEADING}", NOTE]
    for own in results.values():
        parts.append("\n".join(cell_table(own)))
    parts += ["## The best alone and the best with a cache", DUELS_NOTE]
    units = {"Network calls: a reuse takes nothing.": CALLS}
    units |= {f"Time: a reuse takes {s:.3f} of a step ({MODELS[model]}).": s for model, s in reuse_shares().items()}
    for text, share in units.items():
        parts += [text, "\n".join(duel_table(duels(results[FLOAT], share), "computing steps"))]
    return parts


def cell_table(own: StepResults) -> list[str]:
    """Return the Markdown lines of all cells that have been run."""
    changes = {id(trials): change for trials in own.cells if (change := against_rival(own, trials)) is not None}
    stars = dict(zip(changes, significant(list(changes.values())), strict=True))
    columns = (
        "solver",
        "steps",
        "N",
        "reuse",
        "computed",
        "trials x images",
        "Frechet distance",
        "less the best alone's",
    )
    lines = lines_of((*columns, "of pixels", "precision", "recall"))
    for trials in own.cells:
        change = changes.get(id(trials))
        starred = "" if change is None else shown(change) + (" *" if stars[id(trials)] else "")
        of_pixels, precision = (f"{trials.effect(measure(name)).mean:.3f}" for name in ("pixels", "precision"))
        values = (
            trials.solver,
            str(trials.steps),
            "" if trials.alone else str(trials.interval),
            trials.cell.name,
            str(trials.computed),
            f"{len(trials.rows)} x {trials.cell.images:,}",
            shown(trials.effect(DISTANCE), "{:.3f}"),
            starred,
            of_pixels,
            precision,
            shown(trials.effect(RECALL), "{:.3f}"),
        )
        lines.append(line(values))
    return lines


def against_rival(own: StepResults, trials: StepTrials) -> Effect | None:
    """Return the distance less the best solver's alone; None where it is that itself."""
    rival = own.rival(trials.computed)
    return None if rival is trials else less(trials, rival)
