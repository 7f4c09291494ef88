"""Images of an open bundle by the hundred: in requests of a fitting size, and those of FP kept in a folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditc.bundle import Bundle, Manifest
from ditc.errors import CheckError, InputError
from ditc.files import digest_of, writing
from ditc.progress import Progress
from ditc.requests import Request
from ditc.runtime.executor import Samples
from ditc.runtime.pipeline import Pipeline
from ditc.tables import sampler_columns, sampler_tables

__all__ = ["ImageSource", "stored_images"]


@dataclass(frozen=True)
class ImageSource:
    """An open pipeline that makes images by their numbers; the classes take turns."""

    pipe: Pipeline
    progress: Progress

    @property
    def size(self) -> int:
        """Images of one request."""
        return self.pipe.at_once

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image: (channels, height, width)."""
        return self.pipe.decode(np.zeros((1, *self.pipe.bundle.manifest.model.latent_shape), np.float32)).shape[1:]

    def images(self, stage: str, seed: int, first: int, count: int) -> Iterator[tuple[slice, Samples]]:
        """Yield (places among the `count`, images of one request), latents where there is no decoder."""
        for places, request in self._requests(stage, first, count):
            images = self._finished(request, seed, first + places.start)
            if not np.isfinite(images).all():
                raise CheckError("finished images are NaN or infinite; `ditc verify` shows the step where that begins")
            yield places, images

    def trajectory(self, stage: str, seed: int, count: int) -> list[Samples]:
        """Return the samples after every step, each (count, channels, *space)."""
        steps = defaultdict(list)
        for places, request in self._requests(stage, 0, count):
            for event in self.pipe.generate(request, seed=seed, first=places.start):
                steps[event.index].append(event.x)
        return [np.concatenate(parts) for _, parts in sorted(steps.items())]

    def _requests(self, stage: str, first: int, count: int) -> Iterator[tuple[slice, Request]]:
        examples = self.pipe.bundle.examples()
        for start in range(0, count, self.size):
            self.progress(stage, start, count)
            places = slice(start, min(start + self.size, count))
            yield places, examples.in_turn(first + start, places.stop - start)
        self.progress(stage, count, count)

    def _finished(self, request: Request, seed: int, first: int) -> Samples:
        pipe = self.pipe
        if pipe.on_device:
            return (pipe.images if pipe.makes_images else pipe.latents)(request, seed=seed, first=first)
        *_, event = pipe.generate(request, seed=seed, first=first)
        return event.x if event.images is None else event.images


def stored_images(source: ImageSource, folder: Path, stage: str, seed: int, first: int, count: int) -> Samples:
    """Map FP's images `first` to `first + count` of a seed from a file of the folder; make it where it isn't there."""
    path = folder / f"fp-{fp_digest(source.pipe.bundle)}" / f"seed{seed}-{first}-to-{first + count - 1}.npy"
    if not path.exists():
        partial = path.with_name(f".{path.name}.partial")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_images(source.images(stage, seed, first, count), count, partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    try:
        images: Samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise InputError(f"{path} is damaged ({e}); remove it, and it is made again") from e
    if len(images) != count:
        raise InputError(f"{path} holds {len(images)} images, expected {count}; remove it, and it is made again")
    return images


def _write_images(parts: Iterator[tuple[slice, Samples]], count: int, path: Path) -> None:
    stored = None
    for places, images in parts:
        if stored is None:
            stored = np.lib.format.open_memmap(path, "w+", np.float32, (count, *images.shape[1:]))
        stored[places] = images


def fp_digest(bundle: Bundle) -> str:
    """Return a digest of all that decides FP's images: model, weights, sampler, steps, guidance, conditions.

    Of a segment that keeps its weights in a file of their own, that file counts: its graph has further outputs for the
    cache, which differ from policy to policy and change no image.
    """
    manifest = bundle.manifest
    program = manifest.reference_program
    if program is None:
        raise InputError(f"{bundle.path} has no FP program; compile it again")
    graphs = [bundle.reference_path(name).relative_to(bundle.path).as_posix() for name in program.calls]
    weights = [_weights_of(manifest, graph) for graph in graphs]
    sampler = {name: table.tolist() for name, table in sampler_tables(sampler_columns(bundle.tables())).items()}
    model = manifest.model.model_dump(mode="json")
    asked = bundle.examples().digests
    return digest_of([manifest.ditc_version, model, weights, sampler, manifest.guidance, *([asked] if asked else [])])


def _weights_of(manifest: Manifest, graph: str) -> str:
    data = manifest.files.get(f"{graph}.data")
    return (data if data is not None and data.size_bytes else manifest.files[graph]).sha256
