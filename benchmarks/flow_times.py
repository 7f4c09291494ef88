"""Small flows of each time and predictors of noise, trained here, and what a look at their weights tells of them.

Over scikit-learn's digits, and over made-up latents: four channels of unit variance whose waves get weaker as they get
shorter, each class with a mean of its own. Each model is then said to be a flow of every time. Writes flow_times.json
beside this script, in about a minute for each of ten models: python benchmarks/flow_times.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditc.choices import FlowTimes, names_of
from ditc.diffusion import alphas_cumprod
from ditc.exporter.dit import DiT, DiTConfig, initialize_weights
from ditc.exporter.flow_check import LEVELS, Ends, FlowLook, doubts_of_flow, ends_of
from ditc.exporter.train_digits import digits_split
from ditc.machine import package_versions
from ditc.spec import DiffusionSpec

HERE = Path(__file__).parent
STEPS, BATCH, DROP_LABEL, CLASSES = 700, 64, 0.1, 10
NOISE = "noise"  # predicted over linear betas
NUMBERS = 1024  # in all rows of a look, at least
TIMES = names_of(FlowTimes)


def digits() -> tuple[Tensor, Tensor]:
    """(pixels, classes) of the training digits."""
    images, labels, *_ = digits_split()
    return images, labels


def latents() -> tuple[Tensor, Tensor]:
    """(latents, classes), 4,000 of 4 channels and 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    frequency = (torch.fft.fftfreq(8)[:, None].square() + torch.fft.rfftfreq(8).square()).sqrt()
    strength = (1 / (1 + (8 * frequency).square()) + 0.03).sqrt()

    def waves(count: int) -> Tensor:
        white = torch.randn(count, 4, 8, 8, generator=generator)
        samples = torch.fft.irfft2(torch.fft.rfft2(white) * strength, s=(8, 8))
        return samples / samples.std()

    labels = torch.randint(CLASSES, (4000,), generator=generator)
    spread = 0.5 + torch.rand(4000, 1, 1, 1, generator=generator)
    samples = waves(4000) * spread + 0.4 * waves(CLASSES)[labels]
    return samples / samples.std(), labels


DATA: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": digits, "latents": latents}


def mixed(kind: str, clean: Tensor, noise: Tensor, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(samples, times, what is to be predicted) of a batch."""
    if kind == NOISE:
        t = torch.randint(len(products), (len(clean),))
        signal = products[t].sqrt().view(-1, 1, 1, 1)
        return signal * clean + (1 - signal.square()).sqrt() * noise, t.float(), noise
    noise_at, data_at = ends_of(kind)
    level = torch.rand(len(clean))
    share = level.view(-1, 1, 1, 1)
    velocity = (noise - clean) * (1 if noise_at > data_at else -1)
    return (1 - share) * clean + share * noise, data_at + (noise_at - data_at) * level, velocity


def trained(kind: str, samples: Tensor, labels: Tensor) -> DiT:
    """A DiT of 0.2 M parameters after STEPS steps."""
    torch.manual_seed(0)
    channels, side = samples.shape[1], samples.shape[2]
    config = DiTConfig(side, 2, channels, 64, 2, 4, num_classes=CLASSES, learn_sigma=False)
    model, products = DiT(config), torch.from_numpy(alphas_cumprod(DiffusionSpec())).float()
    initialize_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        pick = torch.randint(len(samples), (BATCH,))
        y = torch.where(torch.rand(BATCH) < DROP_LABEL, CLASSES, labels[pick])
        x, t, wanted = mixed(kind, samples[pick], torch.randn_like(samples[pick]), products)
        loss: Any = (model(x, t, y) - wanted).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


@torch.no_grad()
def answer(model: DiT, said: Ends, timestep: float, size: float) -> tuple[Tensor, Tensor]:
    """(noise, noise minus data as a model of these times gives it) at a timestep of 1,000 to 0."""
    noise_at, data_at = said
    shape = (model.config.in_channels, model.config.input_size, model.config.input_size)
    rows = -(-NUMBERS // (shape[0] * shape[1] * shape[2]))
    noise = size * torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    time = data_at + (noise_at - data_at) * timestep / 1000
    out = model(noise, torch.full((rows,), time), torch.arange(rows) % CLASSES)
    return noise, out if noise_at > data_at else -out


def looks(model: DiT) -> Iterator[dict[str, Any]]:
    """A row for each time that the model is said to have."""
    for name in TIMES:
        times = ends_of(name)
        look = FlowLook(partial(answer, model, times), times, 1000)
        yield {
            "said": name,
            "cosine_at_noise": look.cosine(times, 1.0),
            "cosine_in_the_middle": look.cosine(times, 0.5),
            "reach": look.reach(),
            "shares": {str(level): look.share(level) for level in LEVELS},
            "doubts": doubts_of_flow(look, "--flow-times"),
        }


def main() -> None:
    """Train each model, look at it, and write the table."""
    torch.set_num_threads(1)
    rows = []
    for data, load in DATA.items():
        samples, labels = load()
        for kind in (*TIMES, NOISE):
            rows += [{"data": data, "trained": kind, **look} for look in looks(trained(kind, samples, labels))]
            right = [row for row in rows[-len(TIMES) :] if not row["doubts"]]
            print(f"{data}, {kind}: passes as {', '.join(row['said'] for row in right) or 'none'}", flush=True)
    document = {"steps": STEPS, "versions": package_versions(), "rows": rows}
    (HERE / "flow_times.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
