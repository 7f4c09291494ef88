"""The training of the built-in text-to-image model: batches, the loss of flow matching, a step, the average.

A training is a value that can be written down and taken up again: what follows has the numbers that it would have had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditc.errors import InputError
from ditc.exporter.emoji_data import Emoji, pixels_of
from ditc.exporter.emoji_model import (
    TEXT_ENCODER,
    TRANSFORMER,
    EmojiModel,
    TextIds,
    build_emoji_model,
    initialize_weights,
    load_float16,
    text_ids,
)

__all__ = ["Batch", "Pictures", "Recipe", "Training", "draw_batch", "flow_loss", "measured_loss", "pictures_of"]

BATCH, PEAK_RATE, WARMUP, SEED = 64, 1e-3, 1000, 0
DROP_CAPTION, MAIN_CAPTION, AVERAGE = 0.1, 0.5, 0.9995


@dataclass(frozen=True)
class Recipe:
    """All that decides the numbers of a training beside its data and its precision.

    `steps` ends it; over the last `decay` of them the rate falls to zero. These two may change on the way.
    """

    steps: int
    decay: int = 0
    batch: int = BATCH
    peak_rate: float = PEAK_RATE
    warmup: int = WARMUP
    seed: int = SEED
    transformer: dict[str, Any] = field(default_factory=lambda: dict(TRANSFORMER))
    text_encoder: dict[str, Any] = field(default_factory=lambda: dict(TEXT_ENCODER))

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= self.steps:
            raise InputError(f"--decay takes from 0 to the {self.steps} steps, found {self.decay}")

    def rate(self, step: int, began: int = 0) -> float:
        """Return the learning rate of a step, counted from 0; the optimizer `began` at another."""
        rising = min(1.0, (step - began + 1) / self.warmup)
        falling = min(1.0, (self.steps - step) / (self.decay + 1))
        return self.peak_rate * min(rising, falling)

    def unchanging(self) -> dict[str, Any]:
        """Return the part that a training which goes on must agree with."""
        return {name: value for name, value in asdict(self).items() if name not in ("steps", "decay")}


@dataclass(frozen=True)
class Pictures:
    """Pictures (n, 3, 32, 32) in [-1, 1] with the tokens of all their captions; each is drawn by its weight.

    Caption j of picture i is row `first[i] + j` of `text`, and there are `count[i]`. `empty` is the empty caption.
    """

    pixels: Tensor
    text: TextIds
    first: Tensor
    count: Tensor
    weights: Tensor
    empty: TextIds

    def main_text(self) -> TextIds:
        """Return the main caption of each picture."""
        return self.text.rows(self.first)

    def some(self, count: int) -> Pictures:
        """Return `count` of the pictures, evenly spread, with their main captions alone."""
        rows = torch.arange(count) * len(self.pixels) // count
        return Pictures(
            pixels=self.pixels[rows],
            text=self.main_text().rows(rows),
            first=torch.arange(count),
            count=torch.ones(count, dtype=torch.int64),
            weights=self.weights[rows],
            empty=self.empty,
        )


def pictures_of(emoji: Sequence[Emoji], tokenizer: Any) -> Pictures:
    """Return pictures as a training takes them; of n pictures of one emoji each is drawn with weight 1 / sqrt(n)."""
    count = torch.tensor([len(one.captions) for one in emoji])
    return Pictures(
        pixels=pixels_of(emoji),
        text=text_ids(tokenizer, [caption for one in emoji for caption in one.captions]),
        first=count.cumsum(0) - count,
        count=count,
        weights=torch.tensor([one.variants**-0.5 for one in emoji]),
        empty=text_ids(tokenizer, [""]),
    )


@dataclass(frozen=True)
class Batch:
    """Pictures (n, 3, 32, 32), noise of that shape, sigmas (n,) and captions."""

    pixels: Tensor
    noise: Tensor
    sigma: Tensor
    text: TextIds


def draw_batch(pictures: Pictures, size: int, generator: torch.Generator) -> Batch:
    """Draw pictures with their captions: the main one in half of the cases, any of them else, none in a tenth."""
    pick = torch.multinomial(pictures.weights, size, replacement=True, generator=generator)
    other = (torch.rand(size, generator=generator) * pictures.count[pick]).long()
    main = torch.rand(size, generator=generator) < MAIN_CAPTION
    text = pictures.text.rows(pictures.first[pick] + torch.where(main, 0, other))
    dropped = (torch.rand(size, generator=generator) < DROP_CAPTION)[:, None]
    text = TextIds(
        torch.where(dropped, pictures.empty.ids, text.ids), torch.where(dropped, pictures.empty.mask, text.mask)
    )
    sigma = torch.randn(size, generator=generator).sigmoid()
    pixels = pictures.pixels[pick]
    return Batch(pixels, torch.randn(pixels.shape, generator=generator), sigma, text)


def flow_loss(model: EmojiModel, batch: Batch) -> Tensor:
    """Return the mean squared error of the flow, averaged over the batch."""
    sigma = batch.sigma[:, None, None, None]
    x = (1 - sigma) * batch.pixels + sigma * batch.noise
    flow: Tensor = model(x, batch.sigma, batch.text)
    return (flow.float() - (batch.noise - batch.pixels)).square().mean()


@torch.no_grad()
def measured_loss(model: EmojiModel, pictures: Pictures, draws: int = 4) -> float:
    """Return the loss on the main captions, averaged over seeded noises and evenly spread sigmas of each picture."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    n = len(pictures.pixels)
    for draw in range(draws):
        sigma = torch.rand(n, generator=generator).add(draw).div(draws)
        noise = torch.randn(pictures.pixels.shape, generator=generator)
        total += flow_loss(model, Batch(pictures.pixels, noise, sigma, pictures.main_text())).item() / draws
    return total


class Training:
    """A training that stands at some step: the network, its average, the optimizer and the generator of its draws."""

    def __init__(self, recipe: Recipe, bfloat16: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.bfloat16, self.step, self.began = recipe, bfloat16, 0, 0
        self.model = build_emoji_model(recipe.transformer, recipe.text_encoder)
        initialize_weights(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.peak_rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True
        )
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.log: list[dict[str, float]] = []
        self.runs: list[dict[str, Any]] = []

    def advance(self, pictures: Pictures) -> Tensor:
        """Take one step and return its loss."""
        batch = draw_batch(pictures, self.recipe.batch, self.generator)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step, self.began)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            loss = flow_loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        done = self.step - self.began
        decay = min(AVERAGE, (1 + done) / (10 + done))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        return loss.detach()

    def begin_with(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on from the average of an earlier training, `tensors` in float16, and its `record` of what it did.

        Its optimizer begins anew, with the warm-up; the draws are others than that training's. Raises InputError where
        it is of another recipe.
        """
        own = self.recipe.unchanging()
        if {name: record.get(name) for name in own} != own:
            raise InputError("the weights to begin with are of another recipe; take the options that they began with")
        load_float16(self.model, tensors)
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self.step = self.began = record["steps"]
        self.log, self.runs = list(record["log"]), list(record["runs"])
        self.generator.manual_seed(self.recipe.seed + self.step)

    def averaged(self) -> EmojiModel:
        """Return a model with the averaged weights, to be measured or drawn from."""
        model = build_emoji_model(self.recipe.transformer, self.recipe.text_encoder).eval()
        with torch.no_grad():
            for p, average in zip(model.parameters(), self.average, strict=True):
                p.copy_(average)
        return model

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint holds."""
        return {
            "recipe": self.recipe.unchanging(),
            "step": self.step,
            "began": self.began,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "log": self.log,
            "runs": self.runs,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint; raises InputError where it is of another recipe."""
        if state["recipe"] != self.recipe.unchanging():
            raise InputError("the checkpoint is of another recipe; take another --work, or the options it began with")
        self.step, self.log, self.runs = state["step"], state["log"], state["runs"]
        self.began = state["began"]
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
