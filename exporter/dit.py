"""The canonical DiT: the architecture of "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).

Parameter names are those of the original release, so its checkpoints load without translation and ONNX node names
read like them. The module is written as the seams of a trajectory (`condition`, `embed`, one `Branch` per residual
sub-layer, `head`); `forward` is their composition.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditc.exporter.dit_lora_layers import dit_lora_layers
from ditc.exporter.loras import WeightRows, module_layers
from ditc.loras import MergedLora
from ditc.spec import DiffusionSpec, ModelSpec, SamplerSpec

__all__ = ["DIT_SIZES", "DiT", "DiTConfig", "config_for_size"]

FREQUENCIES = 256  # width of the sinusoidal timestep embedding, fixed in every released DiT


@dataclass(frozen=True)
class DiTConfig:
    """Everything that decides what a DiT computes, save its weights. `input_size` is the latent's height and width.

    A model trained without dropping labels has no null class. The last three fields are where diffusers' DiT differs
    from the original: the divisor of the frequency exponent is half - freq_shift, the second norm of a block has an
    epsilon of its own, and every block may hold its own timestep and label embedders (converted releases hold equal
    copies of one).
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True
    qkv_bias: bool = True
    freq_shift: int = 0
    norm2_eps: float = 1e-6
    embedder_per_block: bool = False

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2


# hidden size, depth and heads of the released configurations (arXiv 2212.09748, table 1)
DIT_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
DIT_PATCHES = (2, 4, 8)
DIT_PIXELS = (256, 512)


def config_for_size(size: str, patch: int, pixels: int) -> DiTConfig:
    """The configuration of a released size, for example ("xl", 2, 256). The latent is pixels / 8 wide."""
    hidden, depth, heads = DIT_SIZES[size]
    return DiTConfig(input_size=pixels // 8, patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads)


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Fixed 2D sin-cos positions, (1, grid * grid, dim): the first half of the channels encodes x, the second y."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4.0))
    axis = torch.arange(grid, dtype=torch.float64)
    angles = torch.outer(axis, omega)  # (grid, dim / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    columns = line.repeat(grid, 1)
    rows = line.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep features through a two-layer MLP: (...) -> (..., dim)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim, half = config.hidden_size, FREQUENCIES // 2
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        freqs = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / (half - config.freq_shift))
        self.freqs: Tensor
        self.register_buffer("freqs", freqs, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.unsqueeze(-1) * self.freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # type: ignore[no-any-return]


class LabelEmbedder(nn.Module):
    """One row per class; with a null class one more at the end, for "no class" (classifier-free guidance)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + config.null_class, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Patches as tokens: (batch, channels, height, width) -> (batch, tokens, dim)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v from one linear layer."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.tokens = config.tokens
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        width = self.num_heads * self.head_dim
        heads = (-1, self.tokens, self.num_heads, self.head_dim)
        q, k, v = (part.reshape(heads).transpose(1, 2) for part in self.qkv(x).split(width, dim=-1))
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)  # (batch, heads, tokens, tokens)
        mixed = scores.softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(-1, self.tokens, width))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        inner = round(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class DiTBlock(nn.Module):
    """One adaLN-Zero block. Its linear layer for the modulation runs in `DiT.condition`, outside the block."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=config.norm2_eps)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.embedder_per_block:
            self.t_embedder = TimestepEmbedder(config)
            self.y_embedder = LabelEmbedder(config)


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))


@dataclass(frozen=True)
class DiTBranch:
    """A residual sub-layer of one block. Rows of the modulation: shift, 1 + scale, gate, each (batch, 1, dim)."""

    name: str
    norm: nn.Module
    layer: nn.Module
    first_row: int

    def compute(self, h: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """The output before the gate: what a cache keeps (FORA, arXiv 2407.01425)."""
        shift, scale = rows[self.first_row], rows[self.first_row + 1]
        return self.layer(self.norm(h) * scale + shift)  # type: ignore[no-any-return]

    def merge(self, h: Tensor, out: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """Add the branch to the residual stream, with the gate of the current step."""
        return h + rows[self.first_row + 2] * out


class DiT(nn.Module):
    """A diffusion transformer, taken apart at the seams of a trajectory. Fits `exporter.protocol.TrajectoryModel`."""

    family: ClassVar[str] = "dit"

    def __init__(self, config: DiTConfig, name: str = "dit", diffusion: DiffusionSpec | None = None) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.diffusion = diffusion or DiffusionSpec(learned_sigma=config.learn_sigma)
        self.sampler = SamplerSpec()
        self.cfg_channels = config.in_channels
        self.latent_scale: float | None = None
        self.latent_shift = 0.0
        self.assumptions: tuple[str, ...] = ()
        self.doubts: tuple[str, ...] = ()
        self.loras: tuple[MergedLora, ...] = ()
        self.decoder: nn.Module | None = None
        self.x_embedder: Any = PatchEmbed(config)
        self.t_embedder: Any = TimestepEmbedder(config)
        self.y_embedder: Any = LabelEmbedder(config)
        positions = sincos_positions(config.hidden_size, config.input_size // config.patch_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks: Any = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer: Any = FinalLayer(config)

    @property
    def spec(self) -> ModelSpec:
        size = self.config.input_size
        return ModelSpec(
            name=self.name,
            family=self.family,
            in_channels=self.config.in_channels,
            space=(size, size),
            num_classes=self.config.num_classes,
            null_label=self.config.num_classes if self.config.null_class else None,
            cfg_channels=self.cfg_channels,
            branches=tuple(branch.name for branch in self.branches),
            branch_shape=(self.config.tokens, self.config.hidden_size),
            parameters=sum(p.numel() for name, p in self.named_parameters() if not name.startswith("decoder.")),
            diffusion=self.diffusion,
            sampler=self.sampler,
            latent_scale=self.latent_scale,
            latent_shift=self.latent_shift,
            assumptions=self.assumptions,
            doubts=self.doubts,
            loras=self.loras,
        )

    @property
    def branches(self) -> tuple[DiTBranch, ...]:
        branches = []
        for i, block in enumerate(self.blocks):
            branches.append(DiTBranch(f"blocks.{i}.attn", block.norm1, block.attn, 6 * i))
            branches.append(DiTBranch(f"blocks.{i}.mlp", block.norm2, block.mlp, 6 * i + 3))
        return tuple(branches)

    def condition(self, t: Tensor, y: Tensor) -> dict[str, Tensor]:
        """All modulation: (steps,) timesteps and (batch,) labels -> (steps, batch, 6 * depth + 2, dim).

        Rows of block i, from 6 i on: shift, 1 + scale, gate of attention, then of the MLP. The last two rows are
        shift and 1 + scale of the final layer.
        """
        return {"modulation": self.modulation(t[:, None], y[None])}

    def modulation(self, t: Tensor, y: Tensor) -> Tensor:
        """Every adaLN layer: timesteps and labels that broadcast to shape s -> (*s, rows, dim)."""
        dim = self.config.hidden_size
        offset = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], device=t.device).repeat_interleave(dim)
        shared = self._embed_condition(self, t, y)
        tables = []
        for block in self.blocks:
            c = self._embed_condition(block, t, y) if self.config.embedder_per_block else shared
            tables.append(block.adaLN_modulation[1](c) + offset)
        tables.append(self.final_layer.adaLN_modulation[1](shared) + offset[: 2 * dim])
        rows: Any = torch.cat(tables, dim=-1)
        return rows.unflatten(-1, (6 * self.config.depth + 2, dim))  # type: ignore[no-any-return]

    @staticmethod
    def _embed_condition(owner: Any, t: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.silu(owner.t_embedder(t) + owner.y_embedder(y))

    def unpack(self, step: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The modulation of one step, (batch, rows, dim), as one (batch, 1, dim) tensor per row."""
        return torch.split(step["modulation"], 1, dim=1)

    def embed(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.x_embedder(x)
        return tokens + self.pos_embed

    def head(self, h: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """Tokens back to (batch, out_channels, height, width)."""
        shift, scale = rows[-2], rows[-1]
        out = self.final_layer.linear(self.final_layer.norm_final(h) * scale + shift)
        p, c, side = self.config.patch_size, self.config.out_channels, self.config.input_size // self.config.patch_size
        out = out.reshape(-1, side, side, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(-1, c, side * p, side * p)  # type: ignore[no-any-return]

    def lora_layers(self) -> dict[str, tuple[WeightRows, ...]]:
        """The layers that a LoRA may be for, by the original release's names and by diffusers'."""
        names = (name for name in module_layers(self) if not name.startswith("decoder."))
        sharing = 0 if self.config.embedder_per_block else self.config.depth
        return dit_lora_layers(names, self.config.hidden_size, sharing)

    def part_weights(self) -> None:
        """Give every block embedders of its own, equal to the shared ones: those of one block can change alone."""
        for block in self.blocks:
            block.t_embedder, block.y_embedder = copy.deepcopy(self.t_embedder), copy.deepcopy(self.y_embedder)
        self.config = replace(self.config, embedder_per_block=True)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(batch, channels, height, width), (batch,) timesteps, (batch,) labels -> (batch, out_channels, h, w)."""
        rows = self.unpack({"modulation": self.modulation(t, y)})
        h = self.embed(x)
        for branch in self.branches:
            h = branch.merge(h, branch.compute(h, rows), rows)
        return self.head(h, rows)


def initialize_weights(model: DiT) -> None:
    """Initialise as the original does: Xavier linears, zero gates and zero output (adaLN-Zero)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(model.config.hidden_size, -1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    for index in (0, 2):
        nn.init.normal_(model.t_embedder.mlp[index].weight, std=0.02)
    zeroed = [block.adaLN_modulation[1] for block in model.blocks]
    zeroed += [model.final_layer.adaLN_modulation[1], model.final_layer.linear]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
