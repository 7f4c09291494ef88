"""Train the built-in reference model on scikit-learn's handwritten digits.

    python -m ditc.exporter.train_digits --steps 12000 --out exporter/digits.safetensors

Real data (1,797 scans of 8 x 8 pixels; a fifth is held out), the loss of Improved DDPM (mean squared error of the
noise plus the variational bound for the learned variance, arXiv 2102.09672), an exponential moving average of the
weights. The average, rounded to float16, is the model; digits.md beside it is its card.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ditc.exporter.dit import DiT, DiTConfig, initialize_weights

DIGITS = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=128, depth=6, num_heads=4, num_classes=10, learn_sigma=True
)
BATCH, PEAK_RATE, WARMUP, DROP_LABEL, SEED = 128, 1e-3, 300, 0.1, 0


def digits_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, held-out images, held-out labels); images (n, 1, 8, 8) in [-1, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images / 8.0 - 1.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=data.target)
    return images[train], labels[train], images[held_out], labels[held_out]


class Diffusion:
    """Forward process and training loss for a linear schedule of 1,000 steps."""

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        posterior = betas * (1 - before) / (1 - alpha_bar)
        self.alpha_bar = alpha_bar.float()
        self.log_max = betas.log().float()
        self.log_min = torch.cat([posterior[1:2], posterior[1:]]).log().float()
        self.from_x0 = (betas * before.sqrt() / (1 - alpha_bar)).float()

    def loss(self, model: DiT, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(noise mean squared error, variational bound in nats per pixel), each averaged over the batch."""
        at = [table[t].view(-1, 1, 1, 1) for table in (self.alpha_bar, self.log_min, self.log_max, self.from_x0)]
        alpha_bar, low, high, from_x0 = at
        xt = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        eps, raw = model(xt, t.float(), y).chunk(2, dim=1)
        mse = (eps - noise).square().mean()
        fraction = (raw + 1) / 2
        log_var = fraction * high + (1 - fraction) * low
        x0_hat = (xt - (1 - alpha_bar).sqrt() * eps.detach()) / alpha_bar.sqrt()
        gap = from_x0 * (x0 - x0_hat)  # the two posterior means differ in their x0 alone
        bound = 0.5 * (log_var - low - 1 + (low - log_var).exp() + gap.square() * (-log_var).exp())
        return mse, bound.mean()


def train(steps: int, seed: int = SEED) -> tuple[DiT, list[dict[str, float]]]:
    """The averaged model and a log of its losses."""
    torch.manual_seed(seed)
    images, labels, *_ = digits_split()
    model = DiT(DIGITS, name="digits")
    initialize_weights(model)
    average = {name: p.detach().clone() for name, p in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / WARMUP) * 0.5 * (1 + np.cos(np.pi * min(1.0, i / steps)))
    )
    diffusion, log, start = Diffusion(), [], time.perf_counter()
    for step in range(1, steps + 1):
        pick = torch.randint(len(images), (BATCH,))
        y = torch.where(torch.rand(BATCH) < DROP_LABEL, DIGITS.num_classes, labels[pick])
        x0 = images[pick]
        mse, bound = diffusion.loss(model, x0, torch.randint(1000, (BATCH,)), y, torch.randn_like(x0))
        optimizer.zero_grad(set_to_none=True)
        loss: Any = mse + bound
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        decay = min(0.9995, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in model.state_dict().items():
                average[name].lerp_(p, 1 - decay)
        if step % 250 == 0 or step == steps:
            log.append({"step": step, "mse": mse.item(), "bound": bound.item()})
            print(
                f"{step:6d}  mse {mse.item():.4f}  bound {bound.item():.4f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.load_state_dict(average)
    return model, log


@torch.no_grad()
def mean_loss(model: DiT, images: Tensor, labels: Tensor, draws: int = 20) -> float:
    """Noise mean squared error averaged over `draws` seeded timesteps and noises per image."""
    generator = torch.Generator().manual_seed(1)
    diffusion, total = Diffusion(), 0.0
    for _ in range(draws):
        t = torch.randint(1000, (len(images),), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        total += diffusion.loss(model, images, t, labels, noise)[0].item() / draws
    return total


def main() -> None:
    """Train, measure, and write the weights with a record of the training beside them."""
    parser = argparse.ArgumentParser(description="Train the built-in reference model on scikit-learn's digits.")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model, log = train(options.steps)
    weights = {name: p.half() for name, p in model.state_dict().items()}
    model.load_state_dict({name: p.float() for name, p in weights.items()})
    model.eval()
    images, labels, held_images, held_labels = digits_split()
    measured = {
        "steps": options.steps,
        "batch": BATCH,
        "seed": SEED,
        "torch": torch.__version__,
        "mse_train": mean_loss(model, images, labels),
        "mse_held_out": mean_loss(model, held_images, held_labels),
        "log": log,
    }
    save_file(weights, options.out)
    options.out.with_suffix(".training.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
