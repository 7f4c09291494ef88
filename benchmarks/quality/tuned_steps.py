"""The search of `ditc tune` over samplers and steps on the reference model: the cache against fewer steps.

    python benchmarks/quality/tuned_steps.py

Two budgets of distance, the second with a bound on recall as well. Candidates are compiled and evaluated as `ditc tune`
does. Their seconds are counted, a computing step as one and a reuse as REUSE_SHARE of it, so that what is chosen does
not hang on what else the machine does. Few images and intervals, so that it takes hours and not days. Stopped and
started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditc.compiler.options import CompileOptions
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.progress import silent
from ditc.quality.cached_steps import REUSE_SHARE, computed_steps
from ditc.quality.candidates import Candidates, Subject
from ditc.quality.options import TuneOptions
from ditc.quality.search import Again, Search
from ditc.quality.solvers import solvers_of
from ditc.quality.trials import Changes, Trial, described

FOUND = Path(__file__).with_name("tuned_steps.json")
BASE = CompileOptions()
FEW = TuneOptions(worse_by=0.05, images=300, intervals=(2, 3, 5), features="digits", real="digits")
SEARCHES = {"distance": FEW, "distance and recall": FEW.model_copy(update={"less_recall": 0.05})}


def counted(trial: Trial) -> Trial:
    """Return a trial with its time counted in computing steps."""
    steps, policy = int(trial.changes.get("steps") or BASE.steps), str(trial.changes["policy"])
    computed = computed_steps(policy, steps)
    counted_trial = trial.model_copy(update={"seconds": computed + REUSE_SHARE * (steps - computed)})
    print(f"{trial.stage}: {described(counted_trial)}, recall {trial.recall_by:+.3f}, {trial.within}", flush=True)
    return counted_trial


def searched(options: TuneOptions, work: Path) -> dict[str, Any]:
    """Run one search, and return what it measured and chose."""
    subject = Subject("digits")
    candidates = Candidates(subject, BASE, options, work, silent)
    solvers, notes = solvers_of(subject.spec, BASE, options)

    def judge(stage: str, changes: Changes) -> Trial:
        return counted(candidates.trial(stage, changes))

    def confirm(trial: Trial) -> Trial:
        return counted(candidates.confirmed(trial))

    def in_turn(trials: Sequence[Trial]) -> list[float]:
        return [trial.seconds for trial in trials]

    search = Search(
        BASE,
        options,
        judge,
        candidates.vetoed,
        notes=[*notes],
        solvers=solvers,
        again=Again(confirm, in_turn),
    )
    search.explore()
    chosen = search.choose()
    anchor = candidates.figures()
    assert anchor is not None
    assert search.rival is not None
    return {
        "options": options.model_dump(),
        "anchor": anchor.model_dump(),
        "chosen": chosen.model_dump(),
        "rival": search.rival.model_dump(),
        "confirmed": [trial.model_dump() for trial in search.confirmed],
        "trials": [trial.model_dump() for trial in search.measured],
        "notes": search.notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/tuned-steps"))
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    searches = json.loads(FOUND.read_text())["searches"] if FOUND.exists() else {}
    for name, options in SEARCHES.items():
        if name not in searches:
            searches[name] = searched(options, work)
            document = {"machine": machine().model_dump(), "base": BASE.model_dump(), "searches": searches}
            atomic_write(FOUND, json.dumps(document, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
