"""Compile the models of a replay with whatever `ditc` the interpreter finds, and draw an image of each.

    python tests/replay/bundles.py OUT [NAME ...]

Leaves OUT/NAME (a bundle) and OUT/NAME.npy (images). It calls nothing but what other people's scripts call, so that it
runs on every commit.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ditc
from ditc.exporter.dit import DiT, DiTConfig

QUICK = {"points": 24, "pool_images": 24, "vc_images": 4, "verify_images": 2, "batch": 2}
PARTIAL = [[True] * 4, [False] * 4, [False, True, False, True], [False] * 4, [True] * 4, [False] * 4]
# unlike each other in what they take of a compile; "SCHEDULE" stands for a file with the rows of PARTIAL
MODELS: dict[str, dict[str, Any]] = {
    "digits": {"steps": 10, "policy": "fora:3"},
    "partial-rows": {"steps": 6, "policy": "SCHEDULE", "scales": "per-step", "midpoint": "bounded"},
    "learned-noise": {"steps": 6, "policy": "fora:2", "sampler": "ddpm", "variance": "learned", "clip": 1.0},
    "float-steps": {"steps": 6, "policy": "fora:2", "float_steps": "1:2", "reuse": "affine", "smooth": "smooth"},
}
LABELS, SEED = [3, 0, 1], 5


def small_model() -> DiT:
    """Return random weights, the same ones every time, and no zero gates."""
    torch.manual_seed(0)
    config = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=5)
    return DiT(config, name="small").eval()


def compiled(name: str, out: Path) -> None:
    schedule = out / "schedule.json"
    schedule.write_text(json.dumps({"compute": PARTIAL}))
    settings = {**QUICK, **MODELS[name]}
    if settings["policy"] == "SCHEDULE":
        settings["policy"] = str(schedule)
    model = "digits" if name == "digits" else small_model()
    ditc.compile_model(model, out / name, ditc.CompileOptions(**settings))
    with ditc.load(out / name) as pipe:
        np.save(out / f"{name}.npy", pipe.images(LABELS, seed=SEED))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for chosen in sys.argv[2:] or MODELS:
        compiled(chosen, folder)
