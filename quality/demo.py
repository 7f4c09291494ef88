"""`ditc demo`: compile the reference model, and hold it against plain torch in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from pydantic import JsonValue

from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines.integer_form import Arithmetic, arithmetic_of
from ditc.progress import Progress, silent
from ditc.quality.features import DigitQuality, digit_quality
from ditc.requests import Request
from ditc.runtime.closeness import psnr_db
from ditc.runtime.executor import Samples, seeded_request
from ditc.runtime.images import grid, save_png
from ditc.runtime.pipeline import load
from ditc.spec import ModelSpec, Record
from ditc.speed.eager import eager_images
from ditc.speed.side_by_side import RUN, take_turns
from ditc.tables import sampler_columns

__all__ = ["BatchSeconds", "BundleSide", "Demo", "TorchSide", "run_demo", "side_by_side"]

QUALITY_IMAGES = 1000
QUALITY_BATCH = 50
TIMED_BATCHES = (1, 32)
ROUNDS = 5
SEED = 7
Draw = Callable[[], object]  # one side's turn
Images = Callable[[list[int], int], Samples]  # those of some labels, counted from the first


class BatchSeconds(Record):
    """Median seconds per image of both sides, and how many times as fast as torch the bundle is."""

    torch: float
    compiled: float
    ratio: float


class TorchSide(DigitQuality):
    """Quality of the images of plain torch, and the bytes that its parameters take."""

    size_bytes: int


class BundleSide(DigitQuality):
    """Quality of the bundle's images, its size, and its mean PSNR against torch in dB."""

    size_bytes: int
    psnr_db: float


class Demo(Record):
    """The reference model as a bundle beside plain torch, on the same noise; quality over `images` of each.

    `seconds_per_image` is by batch; `arithmetic` is how the bundle's integers ran, if it has any; `grid` and `bundle`
    are paths.
    """

    grid: str
    bundle: str
    seconds_per_image: dict[str, BatchSeconds]
    arithmetic: Arithmetic | None
    images: int
    torch: TorchSide
    compiled: BundleSide
    settings: dict[str, JsonValue]


def run_demo(out: Path, options: CompileOptions, progress: Progress) -> Demo:
    """Compile "digits" into `out`/bundle, draw `out`/grid.png (rows of FP, the compiled row below each), and measure.

    Speed: both sides in turn, median of `ROUNDS`. Quality: `QUALITY_IMAGES` images of each on the same noise, their
    Frechet distances to the real digits, and how many show the class that was asked for (`digit_quality`).
    """
    from ditc.exporter.models import builtin_digits

    bundle = compile_model("digits", out / "bundle", options, progress=progress, force=True)
    model = builtin_digits()
    with load(bundle.path) as pipe:
        columns, arithmetic = sampler_columns(bundle.tables()), arithmetic_of(pipe.backend, bundle.manifest.precision)

        def plain(labels: list[int], first: int) -> Samples:
            request = Request.of(model.spec, labels)
            drawn = seeded_request(model.spec, request, SEED, first, options.steps)
            return eager_images(model, columns, *drawn, options.cfg)

        def compiled(labels: list[int], first: int) -> Samples:
            return list(pipe.generate(labels, seed=SEED, first=first))[-1].x

        speed = _speed(plain, compiled, model.spec, progress)
        exact, ours = _images_of_both(plain, compiled, model.spec, progress)
    picture = out / "grid.png"
    save_png(grid([exact[:10], ours[:10], exact[10:20], ours[10:20]], scale=10, gap=4), picture)
    labels = np.array(model.spec.labels_in_turn(0, QUALITY_IMAGES))
    return Demo(
        grid=str(picture),
        bundle=str(out / "bundle"),
        seconds_per_image=speed,
        arithmetic=arithmetic,
        images=QUALITY_IMAGES,
        torch=TorchSide(
            **dict(digit_quality(exact, labels)), size_bytes=sum(p.numel() * 4 for p in model.parameters())
        ),
        compiled=BundleSide(
            **dict(digit_quality(ours, labels)),
            size_bytes=bundle.manifest.size_bytes(reference=False),
            psnr_db=float(psnr_db(ours, exact).mean()),
        ),
        settings=bundle.manifest.settings,
    )


def _speed(plain: Images, compiled: Images, spec: ModelSpec, progress: Progress) -> dict[str, BatchSeconds]:
    """Return what both sides take per image, by batch."""
    seconds = {}
    for place, batch in enumerate(TIMED_BATCHES):
        progress("time", place, len(TIMED_BATCHES))
        labels = spec.labels_in_turn(0, batch)
        seconds[str(batch)] = side_by_side(partial(plain, labels, 0), partial(compiled, labels, 0), batch, ROUNDS)
    progress("time", 1, 1)
    return seconds


def _images_of_both(plain: Images, compiled: Images, spec: ModelSpec, progress: Progress) -> tuple[Samples, Samples]:
    """Return QUALITY_IMAGES images of torch and of the bundle, on the same noise."""
    exact, ours = [], []
    for first in range(0, QUALITY_IMAGES, QUALITY_BATCH):
        progress("quality", first, QUALITY_IMAGES)
        labels = spec.labels_in_turn(first, QUALITY_BATCH)
        exact.append(plain(labels, first))
        ours.append(compiled(labels, first))
    progress("quality", 1, 1)
    return np.concatenate(exact), np.concatenate(ours)


def side_by_side(plain: Draw, compiled: Draw, images: int, rounds: int) -> BatchSeconds:
    """Return median seconds per image of both sides, which draw so many, run in turn after one turn that warms up."""

    def turn(draw: Draw) -> Iterator[tuple[str, float]]:
        start = perf_counter()
        draw()
        yield RUN, (perf_counter() - start) / images

    times = take_turns([partial(turn, draw) for draw in (plain, compiled)], rounds, 1, silent)
    torch, bundle = (float(np.median(side[RUN])) for side in times)
    return BatchSeconds(torch=torch, compiled=bundle, ratio=torch / bundle)
