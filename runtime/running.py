"""`ditc run` and `ditc verify` as functions: a bundle in, images and numbers out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, ClassVar

import numpy as np

import ditc
from ditc.bundle import Bundle
from ditc.checks import Verification
from ditc.errors import CheckError, InputError
from ditc.files import sha256_of, writing
from ditc.program import DECODE
from ditc.prompt_lists import read_prompts
from ditc.requests import Request, example_names, read_conditions
from ditc.runtime.closeness import trajectory_comparison
from ditc.runtime.executor import Samples, StepEvent, check_stream
from ditc.runtime.given_samples import read_samples
from ditc.runtime.images import grid, save_png
from ditc.runtime.options import HERE, STRENGTH, Place, RunOptions
from ditc.runtime.pipeline import Pipeline
from ditc.spec import LABEL, PartialRecord, Record

__all__ = ["GeneratedImages", "SegmentSeconds", "StepSeconds", "run_bundle", "verify_bundle"]

Watch = Callable[[StepEvent], None]


UNWATCHED_TOLERANCE = 1e-3  # of a request queued whole against its steps one by one, of the largest value
GRID = "grid.png"
LEAST_WIDTH = 64  # pixels an image takes in the grid at least


class SegmentSeconds(Record):
    """The number of steps that called a segment, and their wall seconds."""

    calls: int
    median_seconds: float
    total_seconds: float


class StepSeconds(Record):
    """Wall seconds of one step of one batch; `t` is its timestep."""

    index: int
    t: float
    segment: str
    seconds: float


class GeneratedImages(PartialRecord):
    """Images that `ditc run` left in `folder`, and the time that it took.

    `images` and `grid` are names of files in it. The seconds are wall time, conditioning and decoding included;
    `segments` and `steps` are empty where the request was queued whole. `start` is the step that they began with, where
    they began with a file.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"start"})

    images: tuple[str, ...]
    grid: str
    folder: str
    seconds_per_image: float
    seconds_per_image_outside_steps: float
    segments: dict[str, SegmentSeconds]
    steps: tuple[StepSeconds, ...]
    start: int | None = None


@dataclass(frozen=True, eq=False)
class Beginning:
    """The step that a request begins with, the samples in front of it, and the SHA-256 of the file they were made of.

    `latents` is (n, channels, *space), None for a request that begins with its own noise.
    """

    latents: Samples | None = None
    start: int = 0
    digest: str = ""

    def of(self, part: slice) -> dict[str, Any]:
        """Return the arguments of `Pipeline.generate` about some of the images."""
        return {} if self.latents is None else {"latents": self.latents[part], "start": self.start}

    @property
    def text(self) -> dict[str, str]:
        """Return what a picture says of it, by keyword of a PNG's text chunks."""
        return {} if self.latents is None else {"ditc.from": self.digest, "ditc.start": str(self.start)}


def run_bundle(bundle: Path, options: RunOptions, out: Path, *, watch: Watch, place: Place = HERE) -> GeneratedImages:
    """Generate the images that are asked for into `out`, with a grid of all; returns file names and times.

    Each file says in its text chunks what it was made from (`origin_text`). On a GPU the request is queued whole, so
    there are no times of single steps; `ditc bench` measures those.
    """
    events: list[StepEvent] = []
    with place.load(bundle) as pipe:
        request, seed = asked_request(pipe, options), options.seed
        pipe.check_makes_images()
        check_stream(seed, 0)  # before anything is written
        beginning = asked_beginning(pipe, options, len(request))
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        start = perf_counter()
        if pipe.on_device:
            pictures = pipe.images(request, seed=seed, **beginning.of(slice(None)))
        else:
            pictures = _watched_images(pipe, request, seed, beginning, watch, events)
        seconds = perf_counter() - start
    names = [f"{number:04d}{suffix}.png" for number, suffix in enumerate(_suffixes(request))]
    for number, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        own = request.take(pipe.bundle.manifest.model, [number])
        save_png(picture, out / name, origin_text(pipe.bundle, seed, own, number) | beginning.text)
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    picture = grid(rows, scale=max(1, LEAST_WIDTH // pictures.shape[-1]))
    save_png(picture, out / GRID, origin_text(pipe.bundle, seed, request, 0) | beginning.text)
    return GeneratedImages(
        images=tuple(names),
        grid=GRID,
        folder=str(out),
        seconds_per_image=seconds / len(request),
        seconds_per_image_outside_steps=(seconds - sum(event.seconds for event in events)) / len(request),
        segments=seconds_by_segment(events),
        steps=tuple(StepSeconds(index=e.index, t=e.t, segment=e.segment, seconds=e.seconds) for e in events),
        start=None if beginning.latents is None else beginning.start,
    )


def _suffixes(request: Request) -> list[str]:
    """Return what the name of each image's file has after its number: its class, where it has one."""
    return [f"-class{label}" for label in request.labels] if LABEL in request.arrays else [""] * len(request)


def asked_request(pipe: Pipeline, options: RunOptions) -> Request:
    """Return the request of a command line. Raises InputError for one that the model can't have."""
    bundle, given = pipe.bundle, options.conditions
    spec, needed = bundle.manifest.model, example_names(bundle.manifest.model)
    conditions = None if given is None else read_conditions(given)
    if options.prompt or options.prompts is not None or options.negative is not None:
        prompts = options.prompt if options.prompts is None else read_prompts(options.prompts)
        each = options.images or 1
        texts = [text for text in prompts for _ in range(each)] or None
        count = None if texts else options.images
        return pipe.request(options.labels, conditions, count, prompt=texts, negative_prompt=options.negative)
    if conditions is not None:
        return Request.of(spec, options.labels, conditions, options.images)
    if spec.num_classes is not None:
        if options.labels is None:
            raise InputError(f"{spec.name} has classes; name one for each image, for example --labels 0,1")
        if options.images not in (None, len(options.labels)):
            raise InputError(f"--images {options.images} with {len(options.labels)} labels; leave --images out")
        spec.check_labels(options.labels)
        return bundle.examples().of(range(len(options.labels)), options.labels)
    if options.labels is not None:
        spec.check_labels(options.labels)  # refuses any
    if options.images is None:
        texts_or = "--prompt TEXT, " if bundle.has_text else ""
        files = f"--conditions FILE with {' and '.join(needed)}, or " if needed else ""
        raise InputError(f"{spec.name} has no classes; say what to make: {texts_or}{files}--images N")
    return bundle.examples().in_turn(0, options.images)


def asked_beginning(pipe: Pipeline, options: RunOptions, count: int) -> Beginning:
    """Return the beginning of a command line's `count` images: their own noise, or a file with so much of it.

    Raises InputError for a file that is no sample of the model, and a strength that the bundle can't begin with.
    """
    path = options.begin_with
    if path is None:
        return Beginning()
    finished = read_samples(path, pipe.bundle.manifest.model, count, decodes=DECODE in pipe.program.epilogue)
    start = pipe.start_for(STRENGTH if options.strength is None else options.strength)
    return Beginning(pipe.noised(finished, start=start, seed=options.seed), start, sha256_of(path))


def origin_text(bundle: Bundle, seed: int, request: Request, first: int) -> dict[str, str]:
    """Return the origin of a picture of the images `first` and on of a seed, by keyword of a PNG's text chunks.

    Of several prompts there is a list, as JSON.
    """
    classes = {"ditc.classes": ",".join(map(str, request.labels))} if LABEL in request.arrays else {}
    return {
        "Software": f"ditc {ditc.__version__}",
        "ditc.bundle": bundle.digest,
        "ditc.model": bundle.manifest.model.name,
        "ditc.seed": str(seed),
        "ditc.first": str(first),
        **classes,
        **_texts("ditc.prompt", request.prompts),
        **_texts("ditc.negative", request.negatives if any(request.negatives) else ()),
    }


def _texts(keyword: str, texts: Sequence[str]) -> dict[str, str]:
    distinct = list(dict.fromkeys(texts))
    if len(distinct) > 1:
        return {f"{keyword}s": json.dumps(texts, ensure_ascii=False)}
    return {keyword: distinct[0]} if distinct else {}


def _watched_images(
    pipe: Pipeline, request: Request, seed: int, beginning: Beginning, watch: Watch, events: list[StepEvent]
) -> Samples:
    """The images, every step watched and kept in `events`."""
    for part, first in _parts(pipe, request):
        own = beginning.of(slice(first, first + len(part)))
        for event in pipe.generate(part, seed=seed, first=first, **own):
            watch(event)
            events.append(event)
    return np.concatenate([event.images for event in events if event.images is not None])


def seconds_by_segment(events: Sequence[StepEvent]) -> dict[str, SegmentSeconds]:
    """Count the calls of each segment that steps call, and sum up their seconds."""
    by_segment: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_segment[event.segment].append(event.seconds)
    return {
        name: SegmentSeconds(calls=len(seconds), median_seconds=median(seconds), total_seconds=sum(seconds))
        for name, seconds in by_segment.items()
    }


def verify_bundle(
    bundle: Path, *, images: int, seed: int, least_psnr_db: float | None, watch: Watch, place: Place = HERE
) -> Verification:
    """Run FP and compiled program on the same noise and compare after every step.

    Raises CheckError where the mean PSNR of the finished latents is below `least_psnr_db`.
    """

    def trajectory(reference: bool) -> list[Samples]:
        steps: dict[int, list[Samples]] = defaultdict(list)
        with place.load(bundle, reference=reference) as pipe:
            request = pipe.bundle.examples().in_turn(0, images)
            for part, first in _parts(pipe, request):
                for event in pipe.generate(part, seed=seed, first=first):
                    watch(event)
                    steps[event.index].append(event.x)
            samples = [np.concatenate(parts) for _, parts in sorted(steps.items())]
            if pipe.on_device:
                check_unwatched(pipe, request, samples[-1], seed)
        return samples

    exact, compiled = trajectory(True), trajectory(False)
    verification = trajectory_comparison(compiled, exact)
    mean = verification.psnr_db_mean
    if not np.isfinite(mean):
        raise CheckError("the finished latents are NaN or infinite; the model diverges on this sampler")
    if least_psnr_db is not None and not mean >= least_psnr_db:
        raise CheckError(
            f"mean PSNR against FP is {mean:.2f} dB over {images} images, expected at least "
            f"{least_psnr_db:g}; compile with a shorter cache interval or another precision"
        )
    return verification


def check_unwatched(pipe: Pipeline, request: Request, watched: Samples, seed: int) -> None:
    """Serving on a GPU queues a request whole; raise CheckError unless that gives what the watched steps gave."""
    pipe.latents(request, seed=seed)  # graphs are captured by the second request
    queued = pipe.latents(request, seed=seed)
    if not np.allclose(queued, watched, rtol=0, atol=UNWATCHED_TOLERANCE * float(np.abs(watched).max())):
        raise CheckError(
            "requests queued whole differ from the same steps watched one by one; "
            "run with --graphs none, and report this with what `ditc doctor` prints"
        )


def _parts(pipe: Pipeline, request: Request) -> list[tuple[Request, int]]:
    size, spec = pipe.at_once, pipe.bundle.manifest.model
    return [(request.take(spec, slice(first, first + size)), first) for first in range(0, len(request), size)]
