"""Train the classifier that measures images of the reference model: a small network on scikit-learn's digits.

    python -m ditc.exporter.train_digit_classifier --out exporter/digit_classifier.safetensors

Three linear layers with ReLU between, 64 pixels to 128 to 64 to 10 classes, trained on four fifths of the digits with
noise, shifts by a pixel and smoothed labels. The weights, rounded to float16, are what `ditc.quality.classifier` runs
without torch; digit_classifier.md beside them is its card.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditc.exporter.train_digits import digits_split

WIDTHS = (64, 128, 64, 10)
STEPS, BATCH, PEAK_RATE, DECAY, NOISE, SMOOTHING, SEED = 3000, 128, 5e-3, 0.02, 0.15, 0.05, 0


def classifier() -> nn.Sequential:
    """The network: linear layers with ReLU between."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(WIDTHS):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def shifted(images: Tensor) -> Tensor:
    """The images, all moved by the same -1, 0 or 1 pixel each way; what comes in is background."""
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = (int(pixels) for pixels in torch.randint(0, 3, (2,)))
    return padded[:, :, down : down + 8, right : right + 8]


def train(steps: int) -> nn.Sequential:
    """The trained network, its weights rounded to float16."""
    torch.manual_seed(SEED)
    images, labels, *_ = digits_split()
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    for step in range(steps):
        pick = torch.randint(len(images), (BATCH,))
        x = shifted(images[pick]) if step % 2 else images[pick]
        scores = model(x + NOISE * torch.randn_like(x))
        loss = nn.functional.cross_entropy(scores, labels[pick], label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        rate.step()
    model.load_state_dict({name: p.half().float() for name, p in model.state_dict().items()})
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of right answers."""
    return float((model(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    """Train, measure, and write the weights with a record of the training beside them."""
    parser = argparse.ArgumentParser(description="Train the digits' classifier on scikit-learn's digits.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = train(options.steps)
    images, labels, held_images, held_labels = digits_split()
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    tensors = {
        f"{i}.{name}": p.detach().half() for i, layer in enumerate(linear) for name, p in layer.named_parameters()
    }
    measured = {
        "steps": options.steps,
        "batch": BATCH,
        "seed": SEED,
        "torch": torch.__version__,
        "accuracy_train": accuracy(model, images, labels),
        "accuracy_held_out": accuracy(model, held_images, held_labels),
        "held_out_images": len(held_labels),
    }
    save_file(tensors, options.out)
    options.out.with_suffix(".training.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
