"""`ditc tune` over samplers and steps on the reference model: the cache against fewer steps, as a search finds it.

    python benchmarks/quality/tuned_steps.py

Two budgets of distance, the second with a bound on recall as well. Few images and intervals, so that a search takes an
hour and not a day; times are those of the machine as it was, so nothing else should run meanwhile. Searches go on where
they were stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ditc.compiler.options import CompileOptions
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.quality.options import TuneOptions
from ditc.quality.trials import Trial, described
from ditc.quality.tuning import tune_model

FOUND = Path(__file__).with_name("tuned_steps.json")
BASE = CompileOptions()
FEW = TuneOptions(worse_by=0.05, images=300, intervals=(2, 3, 5), features="digits", real="digits")
SEARCHES = {"distance": FEW, "distance and recall": FEW.model_copy(update={"less_recall": 0.05})}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/tuned-steps"))
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    searches = json.loads(FOUND.read_text())["searches"] if FOUND.exists() else {}

    def tell(trial: Trial) -> None:
        print(f"{trial.stage}: {described(trial)}, recall {trial.recall_by:+.3f}, within {trial.within}", flush=True)

    for name, options in SEARCHES.items():
        if name in searches:
            continue
        print(f"--- {name}", flush=True)
        tuning = tune_model("digits", work / name.replace(" ", "-"), BASE, options, on_trial=tell)
        searches[name] = tuning.model_dump(mode="json")
        document = {"machine": machine().model_dump(), "base": BASE.model_dump(), "searches": searches}
        atomic_write(FOUND, json.dumps(document, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
