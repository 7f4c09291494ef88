"""The choices of `ditc tune` for the models and samplers of the experiment, between the intervals of its main cells.

    python benchmarks/quality/tuned.py
    python benchmarks/quality/experiment.py --groups tuned

A search judges on images of a seed that no trial has; the trials then hold what it found against FP and against the
naive combination. The fastest within the budget is looked for, so nothing else may run meanwhile. Searches go on where
they were stopped.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

from cells import BASE, MODELS, SAMPLERS, TUNED
from trial import SUBJECTS

from ditc.compiler.options import CompileOptions
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.quality.options import TuneOptions
from ditc.quality.search import Trial, described
from ditc.quality.tuning import Tuning, tune_model

SEED = 100  # no trial has it
# of the sampler and the steps that the trials have: others are `tuned_steps.py`'s
SEARCH = TuneOptions(
    worse_by=0.05,
    seeds=(SEED,),
    features="digits",
    real="digits",
    intervals=(3, 5),
    samplers=(),
    spacings=(),
    step_counts=(int(BASE["steps"]),),
)


def searched(model: str, base: CompileOptions, out: Path) -> Tuning:
    """Run one search, and return what it measured and chose."""

    def tell(trial: Trial) -> None:
        print(f"{model}, {base.sampler}: {described(trial)}", flush=True)

    return tune_model(SUBJECTS[model].open(), out, base, SEARCH, on_trial=tell)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/tuned"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    base = CompileOptions(steps=BASE["steps"], cfg=BASE["cfg"], vc_images=BASE["vc_images"], seed=SEED)
    searches = json.loads(TUNED.read_text())["searches"] if TUNED.exists() else {}
    for model, sampler in product(MODELS, SAMPLERS):
        name = f"{model}, {sampler}"
        if name not in searches:
            tuning = searched(model, base.model_copy(update={"sampler": sampler}), options.work / f"{model}-{sampler}")
            searches[name] = {"model": model, "sampler": sampler, **tuning.model_dump(mode="json")}
            document = {
                "machine": machine().model_dump(),
                "search": SEARCH.model_dump(),
                "base": base.model_dump(),
                "searches": searches,
            }
            atomic_write(TUNED, json.dumps(document, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
