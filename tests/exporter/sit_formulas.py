"""SiT as its paper and its original code have it, written out in torch: a network, and Euler's walk from noise to data.

Interpolating Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers, arXiv 2401.08740.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    side: int = 8
    patch: int = 2
    channels: int = 4
    width: int = 64
    depth: int = 2
    heads: int = 4
    inner: int = 256
    classes: int = 5
    null: bool = True
    learn_sigma: bool = True

    @property
    def grid(self) -> int:
        return self.side // self.patch

    @property
    def outputs(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)


def random_weights(sizes: Sizes, seed: int = 0) -> Tensors:
    """Weights under the original key names; positions are learned ones here."""
    width, patches = sizes.width, sizes.patch**2
    layers = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for block in range(sizes.depth):
        layers |= {
            f"blocks.{block}.attn.qkv": (3 * width, width),
            f"blocks.{block}.attn.proj": (width, width),
            f"blocks.{block}.mlp.fc1": (sizes.inner, width),
            f"blocks.{block}.mlp.fc2": (width, sizes.inner),
            f"blocks.{block}.adaLN_modulation.1": (6 * width, width),
        }
    layers |= {
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (patches * sizes.outputs, width),
    }
    shapes = {
        "x_embedder.proj.weight": (width, sizes.channels, sizes.patch, sizes.patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (sizes.classes + sizes.null, width),
        "pos_embed": (1, sizes.grid**2, width),
    }
    for name, (rows, columns) in layers.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    generator = torch.Generator().manual_seed(seed)
    scales = {name: (shape[-1] ** -0.5 if len(shape) > 1 else 0.1) for name, shape in shapes.items()}
    return {name: scales[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@dataclass
class Formulas:
    """The network of some weights; `held` has what each branch gave before its gate when it was last computed."""

    sizes: Sizes
    w: Tensors
    held: Tensors = field(default_factory=dict)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *, reuses: bool = False) -> Tensor:
        """All channels that the network returns for samples, t in [0, 1] and classes; `reuses` no branch computed."""
        sizes, w = self.sizes, self.w
        tokens = conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=sizes.patch)
        h = tokens.flatten(2).mT + w["pos_embed"]
        c = silu(self._time(t) + w["y_embedder.embedding_table.weight"][y])
        for block in range(sizes.depth):
            name = f"blocks.{block}"
            table = self._linear(f"{name}.adaLN_modulation.1", c)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.chunk(6, dim=1)
            if not reuses:
                self.held[f"{name}.attn"] = self._attention(name, self._modulated(h, shift_a, scale_a))
            h = h + gate_a[:, None] * self.held[f"{name}.attn"]
            if not reuses:
                inner = gelu(self._linear(f"{name}.mlp.fc1", self._modulated(h, shift_m, scale_m)), approximate="tanh")
                self.held[f"{name}.mlp"] = self._linear(f"{name}.mlp.fc2", inner)
            h = h + gate_m[:, None] * self.held[f"{name}.mlp"]
        shift, scale = self._linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
        out = self._linear("final_layer.linear", self._modulated(h, shift, scale))
        out = out.reshape(len(x), sizes.grid, sizes.grid, sizes.patch, sizes.patch, sizes.outputs)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), sizes.outputs, sizes.side, sizes.side)

    def velocity(self, x: Tensor, t: float, y: Tensor, *, reuses: bool = False) -> Tensor:
        """dx/dt at one time: of the channels that the network returns the first half."""
        return self(x, torch.full((len(x),), t), y, reuses=reuses)[:, : self.sizes.channels]

    def guided(self, x: Tensor, t: float, y: Tensor, weight: float, *, reuses: bool) -> Tensor:
        """Guidance of the first three channels, as the original has it."""
        null = torch.full_like(y, self.sizes.classes)
        own, free = self.velocity(torch.cat([x, x]), t, torch.cat([y, null]), reuses=reuses).chunk(2)
        return torch.cat([free[:, :3] + weight * (own[:, :3] - free[:, :3]), own[:, 3:]], dim=1)

    def walked(self, x: Tensor, y: Tensor, steps: int, *, weight: float = 1.0, every: int = 1) -> Tensor:
        """Euler's walk from noise at t = 0 to data at t = 1; every `every`-th step computes, the others reuse."""
        for step in range(steps):
            reuses, t = step % every > 0, step / steps
            v = self.velocity(x, t, y, reuses=reuses) if weight == 1 else self.guided(x, t, y, weight, reuses=reuses)
            x = x + v / steps
        return x

    def _linear(self, name: str, value: Tensor) -> Tensor:
        return linear(value, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _time(self, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.tensor(10000.0).log() * torch.arange(128) / 128)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self._linear("t_embedder.mlp.2", silu(self._linear("t_embedder.mlp.0", features)))

    def _modulated(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm(h, (self.sizes.width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def _attention(self, name: str, h: Tensor) -> Tensor:
        heads = (3, self.sizes.heads, self.sizes.width // self.sizes.heads)
        q, k, v = self._linear(f"{name}.attn.qkv", h).unflatten(-1, heads).permute(2, 0, 3, 1, 4)
        return self._linear(f"{name}.attn.proj", scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
