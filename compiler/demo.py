"""`ditc demo`: compile the reference model, and hold it against plain torch in the same run."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.compiler.driver import compile_model
from ditc.compiler.eager import eager_images
from ditc.compiler.options import CompileOptions
from ditc.compiler.stages import Progress
from ditc.runtime.executor import Samples, seeded_noise
from ditc.runtime.images import grid, save_png
from ditc.runtime.pipeline import Pipeline, load
from ditc.runtime.quality import frechet_distance, psnr_db

__all__ = ["run_demo"]

QUALITY_IMAGES = 1000
QUALITY_BATCH = 50
TIMED_BATCHES = (1, 32)
ROUNDS = 5
SEED = 7


def run_demo(out: Path, options: CompileOptions, progress: Progress) -> dict[str, Any]:
    """Compile "digits" into `out`/bundle, draw `out`/grid.png (rows of FP, the compiled row below each), and measure.

    Speed: both sides in turn, median of `ROUNDS`. Quality: `QUALITY_IMAGES` images of each on the same noise, their
    Frechet distance to the real digits over the 64 pixels, and how many a classifier trained on the real digits
    assigns to the class that was asked for.
    """
    from ditc.exporter.models import builtin_digits

    bundle = compile_model("digits", out / "bundle", options, progress=progress, force=True)
    model = builtin_digits()
    with load(bundle.path) as pipe:
        columns = _columns(pipe)

        def plain(labels: list[int], first: int) -> Samples:
            noise, fresh = seeded_noise(SEED, first, len(labels), model.spec.latent_shape)
            return eager_images(model, columns, labels, noise, fresh, options.cfg)

        def compiled(labels: list[int], first: int) -> Samples:
            return list(pipe.generate(labels, seed=SEED, first=first))[-1].x

        speed = {}
        for batch in TIMED_BATCHES:
            progress("time", TIMED_BATCHES.index(batch), len(TIMED_BATCHES))
            speed[str(batch)] = _side_by_side(plain, compiled, batch)
        progress("time", 1, 1)
        fp, int8 = [], []
        for first in range(0, QUALITY_IMAGES, QUALITY_BATCH):
            progress("quality", first, QUALITY_IMAGES)
            labels = [number % 10 for number in range(first, first + QUALITY_BATCH)]
            fp.append(plain(labels, first))
            int8.append(compiled(labels, first))
    exact, found = np.concatenate(fp), np.concatenate(int8)
    picture = out / "grid.png"
    save_png(grid([exact[:10], found[:10], exact[10:20], found[10:20]], scale=10, gap=4), picture)
    judge = DigitJudge()
    labels_all = np.arange(QUALITY_IMAGES) % 10
    progress("quality", 1, 1)
    return {
        "grid": str(picture),
        "bundle": str(bundle.path),
        "seconds_per_image": speed,
        "images": QUALITY_IMAGES,
        "torch": judge.measure(exact, labels_all) | {"size_bytes": sum(p.numel() * 4 for p in model.parameters())},
        "compiled": judge.measure(found, labels_all)
        | {"size_bytes": bundle.manifest.size_bytes(reference=False), "psnr_db": float(psnr_db(found, exact).mean())},
        "settings": bundle.manifest.settings,
    }


def _columns(pipe: Pipeline) -> dict[str, NDArray[np.float64]]:
    tables = pipe.bundle.tables()
    return {name.removeprefix("sampler."): table for name, table in tables.items() if name.startswith("sampler.")}


def _side_by_side(plain: Any, compiled: Any, batch: int) -> dict[str, float]:
    """Median seconds per image of both sides, run in turn."""
    labels = [number % 10 for number in range(batch)]
    times: dict[str, list[float]] = {"torch": [], "compiled": []}
    for number in range(ROUNDS + 1):
        for name, run in (("torch", plain), ("compiled", compiled)):
            start = perf_counter()
            run(labels, 0)
            if number > 0:  # the first round warms both up
                times[name].append((perf_counter() - start) / batch)
    found = {name: float(np.median(seconds)) for name, seconds in times.items()}
    return found | {"ratio": found["torch"] / found["compiled"]}


class DigitJudge:
    """Quality of generated digits against the real ones: Frechet distance over pixels, and class agreement.

    The classifier is a support vector machine trained on four fifths of scikit-learn's digits; `held_out_accuracy` is
    its share of right answers on the rest.
    """

    def __init__(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC

        data = load_digits()
        pixels = data.images.reshape(len(data.images), -1) / 8.0 - 1.0
        train_x, test_x, train_y, test_y = train_test_split(
            pixels, data.target, test_size=0.2, random_state=0, stratify=data.target
        )
        self._real = pixels
        self._classifier = SVC(C=10.0).fit(train_x, train_y)
        self.held_out_accuracy = float(self._classifier.score(test_x, test_y))

    def measure(self, images: Samples, labels: NDArray[Any]) -> dict[str, float]:
        pixels = np.clip(images, -1, 1).reshape(len(images), -1)
        return {
            "frechet_distance": frechet_distance(pixels, self._real),
            "class_agreement": float((self._classifier.predict(pixels) == labels).mean()),
        }
