"""The part of a report that runs the bundle beside its FP program: pictures, closeness, drift of every step."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditc.errors import CheckError
from ditc.progress import Progress
from ditc.quality.generating import ImageSource
from ditc.report.facts import Drift, Fidelity, Measure, Picture, Pictures, Skipped
from ditc.runtime.closeness import measures_of, psnr_db, step_drift
from ditc.runtime.executor import Samples
from ditc.runtime.images import png_bytes
from ditc.runtime.options import Place
from ditc.runtime.pipeline import Pipeline

__all__ = ["SampleParts", "sample_parts"]

Origin = tuple["int | None", "str | None"]  # of an image: its class and its prompt

MOST_PICTURES = 12
PEAK = 1.0  # differences are drawn about grey, so they have half the range of an image


@dataclass(frozen=True)
class SampleParts:
    """The parts of a report that come of the samples."""

    pictures: Pictures | Skipped
    fidelity: Fidelity | Skipped
    drift: Drift | Skipped


@dataclass(frozen=True)
class _Run:
    """The samples after every step, and the finished images where the bundle makes any."""

    steps: list[Samples]
    images: Samples | None


def sample_parts(path: Path, images: int, seed: int, place: Place, progress: Progress) -> SampleParts:
    """Walk the bundle, its FP program, and the bundle with K = 1, all on the same noise.

    Raises CheckError where finished samples are NaN or infinite.
    """
    pipe = place.load(path)
    bundle = pipe.bundle
    spec = bundle.manifest.model
    prompts = bundle.examples().in_turn(0, images).prompts or (None,) * images
    classes = [None if spec.num_classes is None else label for label in spec.labels_in_turn(0, images)]
    origins = list(zip(classes, prompts, strict=True))
    ours = _run(pipe, "bundle", images, seed, progress)
    if not bundle.has_reference:
        missing = Skipped(
            skipped="the bundle has no FP program to hold it to; compile it with --reference, or copy reference/ too"
        )
        return SampleParts(_pictures(origins, ours, None), missing, missing)
    exact = _run(place.load(path, reference=True), "fp", images, seed, progress)
    bare = None
    if "compensation.k" in bundle.tables():
        bare = _run(place.load(path, compensation=False), "bundle-without-vc", images, seed, progress)
    drift = Drift(
        bundle=step_drift(ours.steps, exact.steps),
        uncompensated=None if bare is None else step_drift(bare.steps, exact.steps),
    )
    return SampleParts(_pictures(origins, ours, exact), _fidelity(ours, exact), drift)


def _run(pipe: Pipeline, stage: str, images: int, seed: int, progress: Progress) -> _Run:
    with pipe:
        source = ImageSource(pipe, progress)
        steps = source.trajectory(stage, seed, images)
        if not np.isfinite(steps[-1]).all():
            raise CheckError("finished samples are NaN or infinite; `ditc verify` shows the step where that begins")
        if not pipe.makes_images:
            return _Run(steps, None)
        parts = [pipe.decode(steps[-1][first : first + source.size]) for first in range(0, images, source.size)]
        return _Run(steps, np.concatenate(parts))


def _fidelity(own: _Run, exact: _Run) -> Fidelity:
    """Return every paired measure over the images, over the latents where there is no decoder."""
    ours, theirs = (run.steps[-1] if run.images is None else run.images for run in (own, exact))
    values = {name: measure(ours, theirs) for name, measure in measures_of(ours.shape[1:]).items()}
    return Fidelity(
        of="latents" if own.images is None else "images",
        images=len(ours),
        measures={name: Measure(mean=float(v.mean()), worst=float(v.min())) for name, v in values.items()},
    )


def _pictures(origins: Sequence[Origin], ours: _Run, exact: _Run | None) -> Pictures | Skipped:
    """Return the first images; `origins` are the class and the prompt of each."""
    if ours.images is None:
        return Skipped(skipped="the bundle makes latents and has no decoder; compile it with --vae FOLDER")
    images = ours.images[:MOST_PICTURES]
    height, width = images.shape[-2:]
    if exact is None or exact.images is None:
        alone = [
            Picture(label=label, prompt=prompt, found=png(image))
            for (label, prompt), image in zip(origins, images, strict=False)
        ]
        return Pictures(height=height, width=width, gain=1, pictures=tuple(alone))
    twins = exact.images[: len(images)]
    gap = images - twins
    gain = gain_for(gap)
    pairs = [
        Picture(
            label=label,
            prompt=prompt,
            found=png(image),
            exact=png(twin),
            difference=png(gain * part),
            psnr_db=float(psnr),
        )
        for (label, prompt), image, twin, part, psnr in zip(
            origins, images, twins, gap, psnr_db(images, twins), strict=False
        )
    ]
    return Pictures(height=height, width=width, gain=gain, pictures=tuple(pairs))


def gain_for(gap: Samples) -> float:
    """Return the power of two, 1 to 256, that shows the largest difference without clipping it."""
    largest = float(np.abs(gap).max())
    return 256.0 if largest < PEAK / 256 else float(max(1, 2 ** int(np.floor(np.log2(PEAK / largest)))))


def png(image: NDArray[np.float32]) -> str:
    """Return an image (channels, height, width) in [-1, 1] as PNG in base64."""
    return base64.b64encode(png_bytes(image)).decode()
