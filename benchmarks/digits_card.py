"""The quality of the reference model's samples: FP, 50 steps, against the real digits.

    python benchmarks/digits_card.py --images 1000 --seeds 0 1 2

Frechet distances over the 64 pixels and over the classifier's 64 features, and class agreement, as `ditc demo` measures
them, per seed; beside it the same distances between the real training and held-out digits, for scale.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from ditc.exporter.models import builtin_digits
from ditc.exporter.train_digits import digits_split
from ditc.machine import machine
from ditc.quality.distributions import frechet_distance
from ditc.quality.features import digit_quality, open_extractor
from ditc.requests import Request
from ditc.runtime.executor import seeded_noise
from ditc.runtime.samplers import sampler_table
from ditc.speed.eager import eager_images

HERE = Path(__file__).parent
BATCH = 100


def sample(sampler: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (images, labels, seconds) of the FP model."""
    model = builtin_digits()
    spec = model.sampler.model_copy(update={"name": sampler})
    table = sampler_table(model.diffusion, spec, 50)
    labels = np.array(model.spec.labels_in_turn(0, count))
    parts, start = [], time.perf_counter()
    for first in range(0, count, BATCH):
        noise, fresh = seeded_noise(seed, first, BATCH, model.spec.latent_shape)
        request = Request.of(model.spec, labels[first : first + BATCH].tolist())
        parts.append(eager_images(model, table, request, noise, fresh, 1.5))
    return np.concatenate(parts), labels, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    train, _, held_out, _ = (part.numpy() for part in digits_split())
    results = []
    for sampler in ("ddim", "ddpm"):
        for seed in options.seeds:
            images, labels, seconds = sample(sampler, seed, options.images)
            row = {
                "sampler": sampler,
                "seed": seed,
                "images": options.images,
                **digit_quality(images, labels).model_dump(),
            }
            results.append(row | {"seconds_per_10000_images": seconds * 10_000 / options.images})
            print(results[-1])
    extractors = [open_extractor(name, train.shape[1:]) for name in ("pixels", "digits")]
    floor = {each.name: frechet_distance(each.features(held_out), each.features(train)) for each in extractors}
    card = {
        "machine": machine().model_dump(),
        "steps": 50,
        "guidance": 1.5,
        "frechet_distance_real_train_to_held_out": floor,
        "results": results,
    }
    (HERE / "digits_card.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
