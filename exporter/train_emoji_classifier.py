"""Train the classifier that measures pictures of the text-to-image model: a small network on its training split.

    python -m ditc.exporter.train_emoji_classifier --work FOLDER --out exporter/emoji_classifier.safetensors

Three convolutions of 3 x 3 at stride 2 (24, 48 and 80 channels) and two linear layers, to 64 features and to 16 kinds,
trained on Noto's emoji, turned, scaled, shifted, mirrored, in other brightness and with noise. The weights, rounded to
float16, are what `ditc.quality.classifier` runs without torch; emoji_classifier.md is its card.

Beside them goes what pictures are compared with, as pictures themselves would be too large for the package: the main
caption, kind and side of the split of each (emoji_pictures.tsv), and their features (emoji_features.safetensors).
FOLDER is where the archive of the pictures lies or goes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditc.exporter.emoji_data import Emoji, emoji_archive, pixels_of, read_emoji, split_of
from ditc.exporter.emoji_kinds import KINDS, kind_of

CHANNELS, FEATURES = (3, 24, 48, 80), 64
STEPS, BATCH, PEAK_RATE, DECAY, SMOOTHING, SEED = 4000, 128, 3e-3, 0.05, 0.1, 0
TURN, SHIFT, SCALES, NOISE = 0.25, 0.2, (0.85, 1.25), 0.1  # radians, shares of half a width, and standard deviation


@dataclass(frozen=True)
class Labelled:
    """Pictures (n, 3, 32, 32) in [-1, 1], the numbers of their kinds (n,), and the weight each is drawn with, (n,)."""

    pixels: Tensor
    kinds: Tensor
    weights: Tensor


def labelled(emoji: Sequence[Emoji]) -> Labelled:
    """Return pictures with their kinds; of n pictures of one emoji each has weight 1 / sqrt(n)."""
    return Labelled(
        pixels=pixels_of(emoji),
        kinds=torch.tensor([KINDS.index(kind_of(one.category, one.subcategory)) for one in emoji]),
        weights=torch.tensor([one.variants**-0.5 for one in emoji]),
    )


def classifier() -> nn.Sequential:
    """Build the network, with dropout that only the training has."""
    convolutions: list[nn.Module] = []
    for before, after in pairwise(CHANNELS):
        convolutions += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    inputs = CHANNELS[-1] * 4 * 4
    head = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(inputs, FEATURES), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*convolutions, *head, nn.Linear(FEATURES, len(KINDS)))


def varied(pixels: Tensor) -> Tensor:
    """Return the pictures turned, scaled, shifted, some mirrored, in other brightness and colour, with noise."""
    n = len(pixels)
    angle, scale = (torch.rand(n) * 2 - 1) * TURN, torch.empty(n).uniform_(*SCALES)
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = (torch.rand(2, n) * 2 - 1) * SHIFT
    maps = torch.stack(
        [torch.stack([cos * mirror, -sin, shift[0]], 1), torch.stack([sin * mirror, cos, shift[1]], 1)], 1
    )
    grid = nn.functional.affine_grid(maps, list(pixels.shape), align_corners=False)
    moved = nn.functional.grid_sample(pixels - 1, grid, align_corners=False) + 1  # what comes in is white
    tinted = moved * (1 + 0.1 * torch.randn(n, 1, 1, 1)) + 0.05 * torch.randn(n, 3, 1, 1)
    return (tinted + NOISE * torch.randn_like(pixels)).clamp(-1, 1)


def train(pictures: Labelled, steps: int) -> nn.Sequential:
    """Return the trained network, its weights rounded to float16."""
    torch.manual_seed(SEED)
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for _ in range(steps):
        pick = torch.multinomial(pictures.weights, BATCH, replacement=True)
        scores = model(varied(pictures.pixels[pick]))
        loss = nn.functional.cross_entropy(scores, pictures.kinds[pick], label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        rate.step()
    model.load_state_dict({name: p.half().float() for name, p in model.state_dict().items()})
    return model.eval()


def tensors_of(model: nn.Sequential) -> dict[str, Tensor]:
    """Return the weights in float16 under the names that `ditc.quality.classifier` reads."""
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    named = [(f"conv{i}", layer) for i, layer in enumerate(convolutions)] + [(f"{i}", x) for i, x in enumerate(linear)]
    return {f"{name}.{part}": p.detach().half() for name, layer in named for part, p in layer.named_parameters()}


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Labelled) -> dict[str, float]:
    """Return the share of right answers: of all pictures alike, and with the weights they are drawn by."""
    right = (model(pictures.pixels).argmax(dim=1) == pictures.kinds).float()
    weighted = (right * pictures.weights).sum() / pictures.weights.sum()
    return {"pictures": len(right), "right": float(right.mean()), "right_weighted": float(weighted)}


@torch.no_grad()
def write_pictures(model: nn.Sequential, split: dict[str, Sequence[Emoji]], folder: Path) -> None:
    """Write caption, kind and side of each picture, and features in float16 in the same order."""
    lines = ["caption\tkind\tside"]
    for side, emoji in split.items():
        lines += [f"{one.captions[0]}\t{kind_of(one.category, one.subcategory)}\t{side}" for one in emoji]
    (folder / "emoji_pictures.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    features = model[:-1](pixels_of([one for emoji in split.values() for one in emoji]))
    save_file({"features": features.half()}, folder / "emoji_features.safetensors")


def main() -> None:
    """Train, measure, and write the weights, a record of the training, and the features of all pictures."""
    parser = argparse.ArgumentParser(description="Train the classifier of emoji on Noto's emoji.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the archive")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    split = split_of(read_emoji(emoji_archive(options.work)))
    seen, unseen = labelled(split.train), labelled(split.held_out)
    model = train(seen, options.steps)
    measured = {
        "steps": options.steps,
        "batch": BATCH,
        "seed": SEED,
        "torch": str(torch.__version__),
        "kinds": KINDS,
        "train": accuracy(model, seen),
        "held_out": accuracy(model, unseen),
    }
    save_file(tensors_of(model), options.out)
    options.out.with_suffix(".training.json").write_text(json.dumps(measured, indent=1) + "\n")
    write_pictures(model, {"train": split.train, "held out": split.held_out}, options.out.parent)


if __name__ == "__main__":
    main()
