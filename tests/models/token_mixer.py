"""A transformer of a user's own that assumes as little as the protocol allows: any space, any conditions, any depth.

Tokens are the places of a sample's space, one token for a vector. Every branch is an MLP over tokens and channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ditc.spec import Condition, DiffusionSpec, ModelSpec, SamplerSpec

DIM = 64
CLASSES = 5
STYLE = 4  # numbers of a vector
TEXT_TOKENS, WORDS = 6, 8


class Mixer(nn.Module):
    """One branch: a scaled and shifted MLP over the channels and a product over the tokens, behind a gate."""

    def __init__(self, name: str, tokens: int, place: int) -> None:
        super().__init__()
        self.name, self.place = name, place
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.across = nn.Parameter(torch.eye(tokens) + 0.1 * torch.randn(tokens, tokens))

    def compute(self, h: Tensor, parts: dict[str, Tensor]) -> Tensor:
        shift, scale, _ = parts["modulation"][:, 3 * self.place : 3 * self.place + 3].split(1, dim=1)
        h = nn.functional.layer_norm(h, (DIM,)) * (1 + scale) + shift
        return self.down(nn.functional.gelu(self.up(self.across @ h)))

    def merge(self, h: Tensor, out: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return h + parts["modulation"][:, 3 * self.place + 2, None] * out


class TokenMixer(nn.Module):
    """Noise prediction for samples (channels, *space), with a class label."""

    decoder = None

    def __init__(self, channels: int, space: Sequence[int], depth: int = 3) -> None:
        super().__init__()
        self.channels, self.space = channels, tuple(space)
        self.inward, self.outward = nn.Linear(channels, DIM), nn.Linear(DIM, channels)
        self.places = nn.Parameter(torch.randn(prod(space), DIM))
        self.time = nn.Sequential(nn.Linear(2, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.label = nn.Embedding(CLASSES + 1, DIM)
        self.modulation = nn.Linear(DIM, 3 * max(depth, 1) * DIM)
        self.branches = nn.ModuleList(Mixer(f"layers.{n}.mlp", prod(space), n) for n in range(depth))

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            name="token-mixer",
            family="mine",
            in_channels=self.channels,
            space=self.space,
            cfg_channels=self.channels,
            branches=tuple(branch.name for branch in self.branches),
            branch_shape=(prod(self.space), DIM) if len(self.branches) else (),
            parameters=sum(p.numel() for p in self.parameters()),
            diffusion=DiffusionSpec(learned_sigma=False),
            sampler=SamplerSpec(),
            **self.stated(),
        )

    def stated(self) -> dict[str, Any]:
        """The conditions, as the spec states them."""
        return {"num_classes": CLASSES, "null_label": CLASSES}

    def embedded(self, t: Tensor, *conditions: Tensor) -> Tensor:
        """Timesteps and conditions that broadcast, as vectors (..., dim)."""
        return self.embedded_time(t) + self.label(conditions[0])

    def embedded_time(self, t: Tensor) -> Tensor:
        return self.time(torch.stack([(t / 200).sin(), (t / 200).cos()], dim=-1))

    def condition(self, t: Tensor, *conditions: Tensor) -> dict[str, Tensor]:
        rows = [condition[None] for condition in conditions]  # (1, batch, ...)
        c = nn.functional.silu(self.embedded(t[:, None], *rows))
        return {"modulation": self.modulation(c).unflatten(-1, (-1, DIM))}

    def unpack(self, step: dict[str, Tensor]) -> dict[str, Tensor]:
        return step

    def embed(self, x: Tensor) -> Tensor:
        return self.inward(x.flatten(2).transpose(1, 2) if self.space else x[:, None]) + self.places

    def head(self, h: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return self.outward(h).transpose(1, 2).reshape(-1, self.channels, *self.space)

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        c = nn.functional.silu(self.embedded(t, *conditions))
        parts = {"modulation": self.modulation(c).unflatten(-1, (-1, DIM))}
        h = self.embed(x)
        for branch in self.branches:
            h = branch.merge(h, branch.compute(h, parts), parts)
        return self.head(h, parts)


class Styled(TokenMixer):
    """A class and a vector, whose null is zeros; typical vectors are stated."""

    def __init__(self) -> None:
        super().__init__(3, (4, 4))
        self.style = nn.Linear(STYLE, DIM)

    def stated(self) -> dict[str, Any]:
        return super().stated() | {"conditions": (Condition(name="style", shape=(STYLE,), null=0.0),)}

    def embedded(self, t: Tensor, *conditions: Tensor) -> Tensor:
        label, style = conditions
        return super().embedded(t, label) + self.style(style)

    def example_conditions(self, count: int) -> dict[str, Tensor]:
        return {"style": torch.linspace(-1, 1, count * STYLE).reshape(count, STYLE)}


class Unconditional(TokenMixer):
    """Nothing but a sample and its timestep."""

    def __init__(self) -> None:
        super().__init__(3, (4, 4))

    def stated(self) -> dict[str, Any]:
        return {}

    def embedded(self, t: Tensor, *conditions: Tensor) -> Tensor:
        return self.embedded_time(t)


class Iterated(Unconditional):
    """Fresh noise at every step, beside the sampler's."""

    def stated(self) -> dict[str, Any]:
        return {"conditions": (Condition(name="jitter", shape=(DIM,), fresh=True),)}

    def condition(self, t: Tensor, *conditions: Tensor) -> dict[str, Tensor]:
        (jitter,) = conditions  # (steps, batch, dim)
        c = nn.functional.silu(self.embedded_time(t)[:, None] + 0.3 * jitter)
        return {"modulation": self.modulation(c).unflatten(-1, (-1, DIM))}

    def embedded(self, t: Tensor, *conditions: Tensor) -> Tensor:
        return self.embedded_time(t) + 0.3 * conditions[0]


class Reading(Mixer):
    """A branch that attends to a text, whose keys and values a request has once."""

    def compute(self, h: Tensor, parts: dict[str, Tensor]) -> Tensor:
        keys, values = parts["text"][:, None].chunk(2, dim=-1)
        read = nn.functional.scaled_dot_product_attention(h[:, None], keys, values)[:, 0]
        return self.down(torch.cat([read, self.up(h)[..., DIM:]], dim=-1))


class Prompted(TokenMixer):
    """A text of a few tokens; its negative comes with the request."""

    def __init__(self) -> None:
        super().__init__(3, (4, 4))
        self.text = nn.Linear(WORDS, 2 * DIM)
        self.branches.append(Reading("layers.3.cross", 16, 2))

    def stated(self) -> dict[str, Any]:
        return {"conditions": (Condition(name="text", shape=(TEXT_TOKENS, WORDS), null="given"),)}

    def request_tables(self, text: Tensor) -> dict[str, Tensor]:
        return {"text": self.text(text)}

    def condition(self, t: Tensor, *conditions: Tensor) -> dict[str, Tensor]:
        c = nn.functional.silu(self.embedded_time(t)[:, None] + conditions[0].mean(dim=1) @ self.text.weight[:DIM].T)
        return {"modulation": self.modulation(c).unflatten(-1, (-1, DIM))}

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        (text,) = conditions
        c = nn.functional.silu(self.embedded_time(t) + text.mean(dim=1) @ self.text.weight[:DIM].T)
        parts = {"modulation": self.modulation(c).unflatten(-1, (-1, DIM)), "text": self.text(text)}
        h = self.embed(x)
        for branch in self.branches:
            h = branch.merge(h, branch.compute(h, parts), parts)
        return self.head(h, parts)


class Clocked(Prompted):
    """A text, and modulation by the timestep alone: what makes that never gets into a bundle.

    With `by_condition` its tables are those of any model, a row for each image.
    """

    by_condition = False

    def request_tables(self, text: Tensor) -> dict[str, Tensor]:
        return {"text": self.text(text)}

    def rows(self, t: Tensor) -> Tensor:
        return self.modulation(nn.functional.silu(self.embedded_time(t))).unflatten(-1, (-1, DIM))

    def condition(self, t: Tensor, *conditions: Tensor) -> dict[str, Tensor]:
        if not self.by_condition:
            return {}
        return {"modulation": self.rows(t)[:, None].expand(-1, conditions[0].shape[0], -1, -1)}

    def timestep_tables(self, t: Tensor) -> dict[str, Tensor]:
        return {} if self.by_condition else {"modulation": self.rows(t)}

    def unpack(self, step: dict[str, Tensor]) -> dict[str, Tensor]:
        return step if self.by_condition else step | {"modulation": step["modulation"][None]}  # the same for all images

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        parts = {"modulation": self.rows(t), **self.request_tables(*conditions)}
        h = self.embed(x)
        for branch in self.branches:
            h = branch.merge(h, branch.compute(h, parts), parts)
        return self.head(h, parts)


def seeded(make: Any, *args: Any, **kwargs: Any) -> Any:
    """What `make` makes, with seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return make(*args, **kwargs).eval()


def video() -> TokenMixer:
    """Samples (2, 3, 4, 4): frames of latents."""
    return seeded(TokenMixer, 2, (3, 4, 4))


def vector() -> TokenMixer:
    """Samples (6,)."""
    return seeded(TokenMixer, 6, ())


def styled() -> TokenMixer:
    """A class and a vector."""
    return seeded(Styled)


def unconditional() -> TokenMixer:
    """No condition at all."""
    return seeded(Unconditional)


def without_branches() -> TokenMixer:
    """Nothing to cache."""
    return seeded(TokenMixer, 3, (4, 4), depth=0)


def iterated() -> TokenMixer:
    """Noise of a condition, fresh at every step."""
    return seeded(Iterated)


def prompted() -> TokenMixer:
    """A text with a negative one."""
    return seeded(Prompted)


def clocked() -> TokenMixer:
    """A text, and tables of the timestep alone."""
    return seeded(Clocked)


EVERY = (video, vector, styled, unconditional, without_branches, iterated, prompted, clocked)
MODELS = {make.__name__: make for make in EVERY}
