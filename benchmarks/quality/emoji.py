"""The text-to-image model: what cache, integers, TAP and VC cost it, beside as many computed steps of a solver alone.

    python benchmarks/quality/emoji.py [--hours 2]

Runs every trial of `emoji_cells.py` that emoji.json doesn't hold yet, of the weights that the package has; stopped and
started again, it goes on. The prompts are captions of Noto's emoji in turn, and images are held against all of these.
"""

from __future__ import annotations

from pathlib import Path

from emoji_cells import EMOJI_CELLS, OWN
from trial_runs import run_trials

HERE = Path(__file__).parent

if __name__ == "__main__":
    run_trials(EMOJI_CELLS, {"model": dict(OWN)}, HERE / "emoji.json", Path("out/emoji-trials"))
