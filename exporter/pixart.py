"""PixArt-alpha and PixArt-Sigma (arXiv 2310.00426, 2403.04692): diffusers' module, taken apart at a trajectory's seams.

A block is `h += gate * attn1(modulate(LN(h)))`, `h += attn2(h, text)` without norm or gate, `h += gate *
ff(modulate(LN(h)))`. Modulation depends on the timestep alone (adaLN-single), keys and values of the text on no
timestep. The layers are diffusers' own under their own names, and `forward` is diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditc.errors import InputError
from ditc.exporter.loras import WeightRows, module_layers
from ditc.exporter.text_encoders import TextEncoder, text_of_folder
from ditc.loras import MergedLora
from ditc.spec import Condition, DiffusionSpec, ModelSpec, SamplerSpec

__all__ = ["PixArt", "place_tokens"]

MASKED = -10000.0  # what diffusers adds to the scores of a token that is masked
LATENT_PIXELS = 8  # sides of a latent's place in a picture where no decoder tells
LARGEST_GRID = 512  # tokens on a side; beyond it attention fills a memory
PIXEL_CHANNELS = (1, 3)  # of a model that makes pictures without a decoder


class Text(NamedTuple):
    """A text as one block's attention takes it: keys and values, (batch, heads, text tokens, width of a head)."""

    keys: Tensor
    values: Tensor


class Parts(NamedTuple):
    """Tables of one step as the branches take them.

    `rows` are those of the modulation, (1, width) each, the same for every image; `bias` is added to the scores of a
    text's tokens, (batch, 1, 1, text tokens).
    """

    rows: tuple[Tensor, ...]
    texts: tuple[Text, ...]
    bias: Tensor


@dataclass(frozen=True)
class ModulatedBranch:
    """Self-attention or MLP of a block. Rows of the modulation from `first_row` on: shift, 1 + scale, gate."""

    name: str
    norm: nn.Module
    layer: Callable[[Tensor], Tensor]
    first_row: int

    def compute(self, h: Tensor, parts: Parts) -> Tensor:
        """The output before the gate: what a cache keeps (FORA, arXiv 2407.01425)."""
        shift, scale = parts.rows[self.first_row], parts.rows[self.first_row + 1]
        return self.layer(self.norm(h) * scale + shift)

    def merge(self, h: Tensor, out: Tensor, parts: Parts) -> Tensor:
        """Add the branch to the residual stream, with the gate of the current step."""
        return h + parts.rows[self.first_row + 2] * out


@dataclass(frozen=True)
class TextBranch:
    """Cross-attention of a block, by its number: no norm in front, no gate behind."""

    name: str
    attention: Any
    block: int
    tokens: int

    def compute(self, h: Tensor, parts: Parts) -> Tensor:
        """Mix the text's values by how well its keys, which hold the scale, fit the image's queries."""
        query = in_heads(self.attention.to_q(h), self.tokens, self.attention.heads)
        text = parts.texts[self.block]
        scores = query @ text.keys.transpose(-2, -1) + parts.bias
        return joined(self.attention, scores.softmax(dim=-1) @ text.values, self.tokens)

    def merge(self, h: Tensor, out: Tensor, parts: Parts) -> Tensor:  # noqa: ARG002 # no gate, so nothing of a step
        """Add the branch to the residual stream."""
        return h + out


def in_heads(rows: Tensor, tokens: int, heads: int) -> Tensor:
    """(batch, tokens, width) -> (batch, heads, tokens, width / heads)."""
    return rows.reshape(-1, tokens, heads, rows.shape[-1] // heads).transpose(1, 2)


def joined(attention: Any, mixed: Tensor, tokens: int) -> Tensor:
    """(batch, heads, tokens, width / heads) through the projection: (batch, tokens, width)."""
    width = attention.heads * mixed.shape[-1]
    return attention.to_out[0](mixed.transpose(1, 2).reshape(-1, tokens, width))  # type: ignore[no-any-return]


def self_attention(attention: Any, tokens: int) -> Callable[[Tensor], Tensor]:
    """Return diffusers' attention over the tokens themselves, (batch, tokens, width) -> the same."""

    def attend(rows: Tensor) -> Tensor:
        layers = (attention.to_q, attention.to_k, attention.to_v)
        query, key, value = (in_heads(layer(rows), tokens, attention.heads) for layer in layers)
        scores = (query * attention.scale) @ key.transpose(-2, -1)  # (batch, heads, tokens, tokens)
        return joined(attention, scores.softmax(dim=-1) @ value, tokens)

    return attend


def place_tokens(pos_embed: Any, rows: int, columns: int) -> None:
    """Give diffusers' patch embedding the positions of so many rows and columns of tokens, as it makes them itself."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    positions = get_2d_sincos_pos_embed(
        pos_embed.proj.out_channels,
        (rows, columns),
        base_size=pos_embed.base_size,
        interpolation_scale=pos_embed.interpolation_scale,
        output_type="pt",
    )
    pos_embed.pos_embed = positions.float().unsqueeze(0)
    pos_embed.height, pos_embed.width = rows, columns


class PixArt(nn.Module):
    """A `PixArtTransformer2DModel` of diffusers with seams. Fits `exporter.protocol.TrajectoryModel`.

    Conditions are the embeddings of a text, (text tokens, caption channels), and which of them are no padding; size
    and ratio of the picture, which some models take, are those of the model. The variance that some models return in a
    second half of their channels is dropped, as diffusers' pipelines do it.
    """

    def __init__(
        self, transformer: Any, *, name: str = "pixart", text_tokens: int = 300, diffusion: DiffusionSpec | None = None
    ) -> None:
        super().__init__()
        self._hidden = (transformer,)  # its layers are named here as they are there
        self.name = name
        self.text_tokens = text_tokens
        self.diffusion = diffusion or DiffusionSpec(learned_sigma=False)
        self.sampler = SamplerSpec()
        self.text_folder: Path | None = None  # of a pipeline, which may have a text encoder
        self.latent_scale: float | None = None
        self.latent_shift = 0.0
        self.assumptions: tuple[str, ...] = ()
        self.doubts: tuple[str, ...] = ()
        self.loras: tuple[MergedLora, ...] = ()
        self.decoder: Any = None
        self.pos_embed: Any = transformer.pos_embed
        self.transformer_blocks: Any = transformer.transformer_blocks
        self.adaln_single: Any = transformer.adaln_single
        self.caption_projection: Any = transformer.caption_projection
        self.norm_out: Any = transformer.norm_out
        self.proj_out: Any = transformer.proj_out
        self.scale_shift_table: Any = transformer.scale_shift_table

    @property
    def transformer(self) -> Any:
        """diffusers' own module, with the same layers."""
        return self._hidden[0]

    @property
    def config(self) -> Any:
        """diffusers' configuration."""
        return self.transformer.config

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        return self.pos_embed.height, self.pos_embed.width

    @property
    def tokens(self) -> int:
        """The number of image tokens."""
        rows, columns = self.grid
        return rows * columns

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.transformer.inner_dim)

    @property
    def pixels_of_a_place(self) -> int:
        """Sides of a latent's place in a picture: what the decoder's levels make of it, 1 for a model of pixels."""
        if self.decoder is not None:
            return int(2 ** (len(self.decoder.vae.config.block_out_channels) - 1))
        return 1 if self.config.in_channels in PIXEL_CHANNELS else LATENT_PIXELS

    def take_size(self, height: int, width: int) -> None:
        """Make pictures of so many pixels from here on. Raises InputError for sides that don't divide."""
        unit = self.pixels_of_a_place * self.config.patch_size
        if height % unit or width % unit or max(height, width) > unit * LARGEST_GRID:
            places = (min(max(1, round(side / unit)), LARGEST_GRID) for side in (height, width))
            near = "x".join(str(place * unit) for place in places)
            raise InputError(
                f"--size {height}x{width}: {self.name} makes pictures whose sides are multiples of {unit} pixels, "
                f"up to {unit * LARGEST_GRID}; take {near}"
            )
        self.take_space((height // self.pixels_of_a_place, width // self.pixels_of_a_place))

    def take_space(self, space: tuple[int, ...]) -> None:
        """Work on samples of so many rows and columns from here on, which the patches divide."""
        rows, columns = (side // self.config.patch_size for side in space)
        place_tokens(self.pos_embed, rows, columns)

    @property
    def spec(self) -> ModelSpec:
        rows, columns = self.grid
        patch, channels = self.config.patch_size, self.config.in_channels
        text = Condition(name="text", shape=(self.text_tokens, self.config.caption_channels), null="given")
        mask = Condition(name="text_mask", dtype="int64", shape=(self.text_tokens,), classes=2, null="given")
        return ModelSpec(
            name=self.name,
            family="pixart",
            in_channels=channels,
            space=(rows * patch, columns * patch),
            conditions=(text, mask),
            cfg_channels=channels,
            branches=tuple(branch.name for branch in self.branches),
            branch_shape=(self.tokens, self.width),
            parameters=sum(p.numel() for name, p in self.named_parameters() if not name.startswith("decoder.")),
            diffusion=self.diffusion,
            sampler=self.sampler,
            latent_scale=self.latent_scale,
            latent_shift=self.latent_shift,
            assumptions=(*self.assumptions, *self.about_size()),
            doubts=self.doubts,
            loras=self.loras,
        )

    @property
    def text(self) -> tuple[TextEncoder, ...]:
        """The text encoder of the folder that the model is from, loaded now; none where that has none."""
        return () if self.text_folder is None else text_of_folder(self.text_folder, self.text_tokens)

    @property
    def branches(self) -> tuple[ModulatedBranch | TextBranch, ...]:
        branches: list[ModulatedBranch | TextBranch] = []
        for i, block in enumerate(self.transformer_blocks):
            name, attend = f"transformer_blocks.{i}", self_attention(block.attn1, self.tokens)
            branches.append(ModulatedBranch(f"{name}.attn1", block.norm1, attend, 6 * i))
            branches.append(TextBranch(f"{name}.attn2", block.attn2, i, self.tokens))
            branches.append(ModulatedBranch(f"{name}.ff", block.norm2, block.ff, 6 * i + 3))
        return tuple(branches)

    def condition(self, t: Tensor, *conditions: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 # part of the protocol
        """Nothing: what depends on a text depends on no timestep, and the other way round."""
        return {}

    def timestep_tables(self, t: Tensor) -> dict[str, Tensor]:
        """Every adaLN row: (steps,) timesteps -> (steps, 6 * blocks + 2, width).

        Rows of block i, from 6 i on: shift, 1 + scale, gate of self-attention, then of the MLP. The last two rows are
        shift and 1 + scale in front of the last layer.
        """
        shared, embedded = self.adaln_single(
            t, self.size_conditions(t.shape[0]), batch_size=t.shape[0], hidden_dtype=t.dtype
        )
        offset = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])[:, None]
        rows = shared.unflatten(-1, (6, self.width))  # (steps, 6, width)
        tables = [rows + block.scale_shift_table + offset for block in self.transformer_blocks]
        last = embedded[:, None] + self.scale_shift_table + offset[:2]
        return {"modulation": torch.cat([*tables, last], dim=1)}

    def about_size(self) -> tuple[str, ...]:
        """The line about the size that the model is told of its pictures, where no decoder says what that is."""
        if not self.transformer.use_additional_conditions or self.decoder is not None:
            return ()
        times = self.pixels_of_a_place
        return (f"the model is told the size of pictures {times} times as wide as its samples (--vae)",)

    def size_conditions(self, rows: int) -> dict[str, Tensor] | None:
        """Size and ratio of the picture, as models that take them want them; None for others."""
        if not self.transformer.use_additional_conditions:
            return None
        height, width = (side * self.config.patch_size * self.pixels_of_a_place for side in self.grid)
        return {
            "resolution": torch.tensor([[float(height), float(width)]]).repeat(rows, 1),
            "aspect_ratio": torch.tensor([[height / width]]).repeat(rows, 1),
        }

    def request_tables(self, text: Tensor, text_mask: Tensor) -> dict[str, Tensor]:
        """Keys and values of every block, (batch, heads, text tokens, width of a head), and what masks their scores.

        The scale of the scores is in the keys already.
        """
        bias = (1 - text_mask.to(text.dtype)) * MASKED
        projected, tables = self.caption_projection(text), {"text_bias": bias[:, None, None]}
        for i, block in enumerate(self.transformer_blocks):
            attention = block.attn2
            keys, values = (
                in_heads(layer(projected), self.text_tokens, attention.heads)
                for layer in (attention.to_k, attention.to_v)
            )
            tables |= {f"text_keys.{i}": keys * attention.scale, f"text_values.{i}": values}
        return tables

    def unpack(self, step: dict[str, Tensor]) -> Parts:
        """The tables of one step in the form that the branches want."""
        blocks = range(len(self.transformer_blocks))
        return Parts(
            rows=torch.split(step["modulation"], 1, dim=0),
            texts=tuple(Text(step[f"text_keys.{i}"], step[f"text_values.{i}"]) for i in blocks),
            bias=step["text_bias"],
        )

    def lora_layers(self) -> dict[str, tuple[WeightRows, ...]]:
        """The layers that a LoRA may be for, by the names that diffusers has."""
        return module_layers(self.transformer)

    def embed(self, x: Tensor) -> Tensor:
        """Patches as tokens, with their positions."""
        tokens: Tensor = self.pos_embed.proj(x).flatten(2).transpose(1, 2)
        positions: Tensor = self.pos_embed.pos_embed
        return tokens + positions

    def head(self, h: Tensor, parts: Parts) -> Tensor:
        """Tokens back to (batch, channels, height, width), without a learned variance."""
        shift, scale = parts.rows[-2], parts.rows[-1]
        out = self.proj_out(self.norm_out(h) * scale + shift)
        (rows, columns), p, channels = self.grid, self.config.patch_size, self.config.in_channels
        out = out.reshape(-1, rows, columns, p, p, self.transformer.out_channels)[..., :channels]
        return out.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * p, columns * p)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """(batch, channels, height, width), (batch,) timesteps and conditions -> (batch, channels, height, width)."""
        out: Sequence[Tensor] = self.transformer(
            x,
            encoder_hidden_states=text,
            timestep=t,
            added_cond_kwargs=self.size_conditions(x.shape[0]),
            encoder_attention_mask=text_mask,
            return_dict=False,
        )
        return out[0][:, : self.config.in_channels]
