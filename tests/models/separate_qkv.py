"""A user's own diffusion transformer, written unlike DiT wherever it can be; `build()` is what they hand to ditc."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditc.spec import DiffusionSpec, ModelSpec, SamplerSpec

CHANNELS, HEIGHT, WIDTH, PATCH = 3, 6, 12, 3
DIM, HEADS, DEPTH, CLASSES, FREQUENCIES = 48, 3, 2, 5, 32
ROWS, COLUMNS = HEIGHT // PATCH, WIDTH // PATCH
TOKENS = ROWS * COLUMNS


class RMSNorm(nn.Module):
    """No mean is taken off, and the scale is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class SelfAttention(nn.Module):
    """Three separate projections without a bias, and torch's fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(DIM, DIM, bias=False)
        self.to_k = nn.Linear(DIM, DIM, bias=False)
        self.to_v = nn.Linear(DIM, DIM, bias=False)
        self.to_out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """SwiGLU in place of GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 2 * DIM)
        self.up = nn.Linear(DIM, 2 * DIM)
        self.down = nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Two branches; `offset` is added to the modulation that all layers share: shift, scale, gate, shift, scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = RMSNorm()
        self.attention = SelfAttention()
        self.norm_feedforward = RMSNorm()
        self.feedforward = GatedFeedForward()
        self.offset = nn.Parameter(0.3 * torch.randn(5, DIM))

    def forward(self, h: Tensor, shared: Tensor) -> Tensor:
        shift_a, scale_a, gate, shift_f, scale_f = (shared + self.offset).split(1, dim=1)
        h = h + gate * self.attention(self.norm_attention(h) * (1 + scale_a) + shift_a)
        return h + self.feedforward(self.norm_feedforward(h) * (1 + scale_f) + shift_f)


@dataclass(frozen=True)
class AttentionBranch:
    """Gated, like DiT's."""

    name: str
    layer: Layer

    def compute(self, h: Tensor, parts: dict[str, Tensor]) -> Tensor:
        shift, scale = (parts["shared"][:, :2] + self.layer.offset[:2]).split(1, dim=1)
        return self.layer.attention(self.layer.norm_attention(h) * (1 + scale) + shift)

    def merge(self, h: Tensor, out: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return h + (parts["shared"][:, 2:3] + self.layer.offset[2]) * out


@dataclass(frozen=True)
class FeedForwardBranch:
    """Added as it is, without a gate."""

    name: str
    layer: Layer

    def compute(self, h: Tensor, parts: dict[str, Tensor]) -> Tensor:
        shift, scale = (parts["shared"][:, 3:] + self.layer.offset[3:]).split(1, dim=1)
        return self.layer.feedforward(self.layer.norm_feedforward(h) * (1 + scale) + shift)

    def merge(self, h: Tensor, out: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return h + out


class SeparateQkvTransformer(nn.Module):
    """Inherits and registers nothing of ditc's; not square, and it learns no variance."""

    decoder = None

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(CHANNELS * PATCH**2, DIM)
        self.positions = nn.Parameter(0.5 * torch.randn(TOKENS, DIM))
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.label = nn.Embedding(CLASSES + 1, DIM)
        self.modulation = nn.Linear(DIM, 5 * DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.norm = RMSNorm()
        self.final_table = nn.Parameter(0.3 * torch.randn(2, DIM))
        self.pixels = nn.Linear(DIM, CHANNELS * PATCH**2)
        frequencies = torch.exp(-math.log(1000.0) * torch.arange(FREQUENCIES // 2) / (FREQUENCIES // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            name="separate-qkv",
            family="mine",
            in_channels=CHANNELS,
            height=HEIGHT,
            width=WIDTH,
            num_classes=CLASSES,
            null_label=CLASSES,
            cfg_channels=CHANNELS,
            branches=tuple(branch.name for branch in self.branches),
            branch_shape=(TOKENS, DIM),
            parameters=sum(p.numel() for p in self.parameters()),
            diffusion=DiffusionSpec(beta_schedule="squared-cosine", prediction="v", learned_sigma=False),
            sampler=SamplerSpec(spacing="trailing"),
        )

    @property
    def branches(self) -> list[AttentionBranch | FeedForwardBranch]:
        found: list[AttentionBranch | FeedForwardBranch] = []
        for i, layer in enumerate(self.layers):
            found += [
                AttentionBranch(f"layers.{i}.attention", layer),
                FeedForwardBranch(f"layers.{i}.feedforward", layer),
            ]
        return found

    def embed_condition(self, t: Tensor, y: Tensor) -> Tensor:
        angles = t.unsqueeze(-1) * self.frequencies
        return self.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.label(y)

    def condition(self, t: Tensor, y: Tensor) -> dict[str, Tensor]:
        c = self.embed_condition(t[:, None], y[None])  # (steps, batch, dim)
        return {"shared": self.modulation(nn.functional.silu(c)).unflatten(-1, (5, DIM)), "condition": c}

    def unpack(self, step: dict[str, Tensor]) -> dict[str, Tensor]:
        return step

    def embed(self, x: Tensor) -> Tensor:
        cut = x.reshape(-1, CHANNELS, ROWS, PATCH, COLUMNS, PATCH).permute(0, 2, 4, 1, 3, 5)
        return self.patches(cut.reshape(-1, TOKENS, CHANNELS * PATCH**2)) + self.positions

    def head(self, h: Tensor, parts: dict[str, Tensor]) -> Tensor:
        shift, scale = (parts["condition"][:, None] + self.final_table).split(1, dim=1)
        out = self.pixels(self.norm(h) * (1 + scale) + shift)
        cut = out.reshape(-1, ROWS, COLUMNS, CHANNELS, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return cut.reshape(-1, CHANNELS, HEIGHT, WIDTH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.embed_condition(t, y)
        shared = self.modulation(nn.functional.silu(c)).unflatten(-1, (5, DIM))
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, shared)
        return self.head(h, {"condition": c})


def build() -> SeparateQkvTransformer:
    """The model with seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return SeparateQkvTransformer()
