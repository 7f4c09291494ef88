"""The quality of the text-to-image model's samples: FP32 through diffusers' own scheduler, against Noto's emoji.

    python benchmarks/emoji_card.py --work FOLDER --weights exporter/emoji.safetensors
    python benchmarks/emoji_card.py --work FOLDER --checkpoint FOLDER/checkpoint.pt --seeds 0 --out FOLDER/card.json

One picture for each held-out caption, and as many for captions of the training, per seed and guidance. Of each set:

- the Frechet distance of the classifier's features to those of the pictures with these captions, beside what two sets
  of real pictures have between them: a tenth of the activities, split off with other seeds, and as many of the others;
- the share whose kind, as the classifier sees it, is its caption's, beside the share for the real pictures;
- the distance of each sample from the nearest training picture, beside those of the held-out pictures: what a model
  that remembers draws lies nearer. A picture shows samples over the training pictures that are nearest to them.

FOLDER is where the archive of the pictures and `tokenizer.json` are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ditc.bundle import read_tables
from ditc.exporter.emoji_data import Emoji, Split, emoji_archive, pixels_of, read_emoji, split_of
from ditc.exporter.emoji_kinds import KINDS, kind_of
from ditc.exporter.emoji_model import EmojiModel, build_emoji_model, load_float16, text_ids
from ditc.machine import machine
from ditc.quality.bootstrap import share
from ditc.quality.classifier import Classifier
from ditc.quality.distributions import Generated, RealSet, frechet_distance, measure_set

HERE = Path(__file__).parent
EXPORTER = HERE.parent / "exporter"
BATCH, ROUNDS, SPLITS = 64, 1000, 50
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COLUMNS, ENLARGED = 16, 3
Pixels = NDArray[np.float32]  # (n, 3, 32, 32) in [-1, 1]


@dataclass(frozen=True)
class Side:
    """Real pictures of one side of the split whose captions are drawn, with their pixels and kinds."""

    emoji: Sequence[Emoji]
    pixels: Pixels
    kinds: NDArray[np.int64]

    @staticmethod
    def of(emoji: Sequence[Emoji]) -> Side:
        kinds = [KINDS.index(kind_of(one.category, one.subcategory)) for one in emoji]
        return Side(emoji, pixels_of(emoji).numpy(), np.array(kinds))

    @property
    def captions(self) -> list[str]:
        return [one.captions[0] for one in self.emoji]


@torch.no_grad()
def sample(
    model: EmojiModel, tokenizer: Any, captions: Sequence[str], guidance: float, steps: int, seed: int
) -> Pixels:
    """Return a picture for each caption."""
    noise = torch.randn(len(captions), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    parts = []
    for first in range(0, len(captions), BATCH):
        x, texts = noise[first : first + BATCH], captions[first : first + BATCH]
        text = text_ids(tokenizer, [*texts, *[""] * len(texts)])
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))  # equal strides, none of them of no length
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            flow, null = model(torch.cat([x, x]), sigma.expand(2 * len(x)), text).chunk(2)
            x = scheduler.step(null + guidance * (flow - null), t, x, return_dict=False)[0]
        parts.append(x.clamp(-1, 1).numpy())
    return np.concatenate(parts)


def opened(options: argparse.Namespace) -> tuple[EmojiModel, int | None]:
    """Return the model, and the step of the checkpoint where it comes from one."""
    model = build_emoji_model().eval()
    if options.weights is not None:
        load_float16(model, load_file(options.weights))
        return model, None
    state = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
    names = (name for name, _ in model.named_parameters())
    load_float16(model, {name: p.half() for name, p in zip(names, state["average"], strict=True)})
    return model, state["step"]


def nearest(pictures: Pixels, training: Pixels) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return (root mean square difference of the pixels, number) of the training picture nearest to each picture."""
    a, b = (np.float64(each.reshape(len(each), -1)) for each in (pictures, training))
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares.min(axis=1), 0) / a.shape[1]), squares.argmin(axis=1)


def quantiles(distances: NDArray[np.float64]) -> dict[str, float]:
    """Return the distances that so many percent of the pictures lie below."""
    return {
        f"{100 * q:g} %": float(value) for q, value in zip(QUANTILES, np.quantile(distances, QUANTILES), strict=True)
    }


def real_distances(emoji: tuple[Emoji, ...], features: NDArray[Any], count: int) -> dict[str, float]:
    """Return quantiles of the Frechet distance between two sets of real pictures that share no activity.

    One is what another seed holds out, the other as many of the rest; `features` are in the order of `emoji`.
    """
    row = {one.image: number for number, one in enumerate(emoji)}
    values = []
    for seed in range(1000, 1000 + SPLITS):
        split, rng = split_of(emoji, seed), np.random.default_rng(seed)
        sides = [[row[one.image] for one in side] for side in (split.held_out, split.train)]
        n = min(count, *map(len, sides))
        values.append(frechet_distance(*(features[rng.choice(side, n, replace=False)] for side in sides)))
    return quantiles(np.array(values))


def measured(samples: Pixels, side: Side, classifier: Classifier, training: Pixels, close: float) -> dict[str, Any]:
    """Return all that is told of the samples for one side's captions."""
    features, real = classifier.features(samples), RealSet(classifier.features(side.pixels))
    agrees = classifier.classes(features) == side.kinds
    distribution = measure_set(Generated(features, agrees), real, rounds=ROUNDS).distribution
    distances, _ = nearest(samples, training)
    return {
        **{name: estimate.model_dump() for name, estimate in distribution.measures.items()},
        "nearest_training_picture": quantiles(distances),
        "nearer_than_5_percent_of_held_out": share(distances < close).model_dump(),
    }


def sheet(rows: Sequence[Pixels], path: Path) -> None:
    """Write rows of pictures, grey lines between groups where a row is empty."""
    width = COLUMNS * 32
    strips = [
        np.full((4, width, 3), 160, np.uint8)
        if not len(row)
        else np.uint8(np.round((row.transpose(2, 0, 3, 1).reshape(32, width, 3) + 1) * 127.5))
        for row in rows
    ]
    image = Image.fromarray(np.concatenate(strips))
    image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST).save(path, optimize=True)


def show(drawn: dict[str, Pixels], sides: dict[str, Side], training: Side, path: Path) -> list[str]:
    """Draw samples over the nearest training pictures, the held-out ones over the real picture too; name them."""
    rows: list[Pixels] = []
    captions: list[str] = []
    for name, side in sides.items():
        pick = np.arange(COLUMNS) * len(side.emoji) // COLUMNS
        samples = drawn[name][pick]
        rows += [samples, training.pixels[nearest(samples, training.pixels)[1]]]
        rows += [side.pixels[pick]] if name == "held_out" else []
        rows.append(samples[:0])
        captions += [side.captions[number] for number in pick]
    sheet(rows[:-1], path)
    return captions


def sides_of(split: Split, count: int | None) -> dict[str, Side]:
    """Return the held-out pictures, and as many of the training's, evenly spread; or `count` of each."""
    held_out = split.held_out if count is None else split.held_out[:: max(1, len(split.held_out) // count)][:count]
    rows = np.arange(len(held_out)) * len(split.train) // len(held_out)
    return {"held_out": Side.of(held_out), "train": Side.of([split.train[row] for row in rows])}


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path)
    source.add_argument("--checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, help="so many captions of each side, not all held-out ones")
    parser.add_argument("--out", type=Path, default=HERE / "emoji_card.json")
    return parser.parse_args()


def main() -> None:
    options = options_given()
    emoji = read_emoji(emoji_archive(options.work))
    split = split_of(emoji)
    model, step = opened(options)
    tokenizer = Tokenizer.from_file(str(options.work / "tokenizer.json"))
    classifier = Classifier.from_tensors(read_tables(EXPORTER / "emoji_classifier.safetensors"))
    sides, training = sides_of(split, options.images), Side.of(split.train)
    held_out_distances, _ = nearest(Side.of(split.held_out).pixels, training.pixels)
    close = float(np.quantile(held_out_distances, 0.05))
    results, drawn = [], {}
    for guidance in options.guidance:
        for seed in options.seeds:
            for name, side in sides.items():
                drawn[name] = sample(model, tokenizer, side.captions, guidance, options.steps, seed)
                row = measured(drawn[name], side, classifier, training.pixels, close)
                results.append({"captions": name, "guidance": guidance, "seed": seed, "images": len(side.emoji), **row})
                print(results[-1], flush=True)
    captions = show(drawn, sides, training, options.out.with_suffix(".png"))
    features = {name: classifier.features(side.pixels) for name, side in sides.items()}
    card = {
        "machine": machine().model_dump(),
        "checkpoint_step": step,
        "steps": options.steps,
        "real": {
            "frechet_distance": real_distances(
                emoji, classifier.features(pixels_of(emoji).numpy()), len(sides["train"].emoji)
            ),
            "agreement": {
                name: share(classifier.classes(features[name]) == side.kinds).model_dump()
                for name, side in sides.items()
            },
            "nearest_training_picture_of_held_out": quantiles(held_out_distances),
        },
        "results": results,
        "shown": captions,
    }
    options.out.write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
