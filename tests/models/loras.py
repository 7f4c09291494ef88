"""Random LoRAs, written in the form of each tool, and run as PEFT does, beside their layers: y = W x + s B (A x)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RANK = 3
Pairs = dict[str, tuple[Tensor, Tensor]]  # of a layer: A (rank, inputs, ...), B (outputs, rank, ...)


def pairs_for(model: nn.Module, names: Sequence[str], *, rank: int = RANK, seed: int = 0, size: float = 0.05) -> Pairs:
    """Random factors for layers of a model, linear ones and convolutions."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in names:
        outputs, *inputs = model.get_submodule(name).weight.shape
        down = size * torch.randn(rank, *inputs, generator=generator)
        up = torch.randn(outputs, rank, *(1 for _ in inputs[1:]), generator=generator)
        pairs[name] = down, up
    return pairs


def peft(pairs: Pairs, prefix: str = "transformer.") -> dict[str, Tensor]:
    """Keys as PEFT and diffusers write them today."""
    return {
        f"{prefix}{name}.lora_{letter}.weight": factor
        for name, pair in pairs.items()
        for letter, factor in zip("AB", pair, strict=True)
    }


def kohya(pairs: Pairs, alpha: float, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """Keys as kohya's scripts write them: dots are underscores, and alpha is a tensor."""
    keys = {}
    for name, (down, up) in pairs.items():
        flat = f"{prefix}{name.replace('.', '_')}"
        keys |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(alpha)}
    return keys


def old_diffusers(pairs: Pairs) -> dict[str, Tensor]:
    """Keys as diffusers wrote them before it had PEFT: attention's in a processor, others behind the layer."""
    keys = {}
    for name, pair in pairs.items():
        owner, _, layer = name.removesuffix(".0").rpartition(".")
        inside = layer in ("to_q", "to_k", "to_v", "to_out")
        start = f"unet.{owner}.processor.{layer}_lora" if inside else f"unet.{name}.lora"
        keys |= {f"{start}.{part}.weight": factor for part, factor in zip(("down", "up"), pair, strict=True)}
    return keys


def write(path: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """Write a safetensors file, with a configuration in its metadata where one is given, as diffusers does."""
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(config)} if config else {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@contextmanager
def beside(model: nn.Module, pairs: Pairs, scale: float | Callable[[str], float] = 1.0) -> Iterator[nn.Module]:
    """A model whose layers add scale * B (A x) to what they give, as PEFT runs a LoRA that is not merged."""

    def adding(name: str, down: Tensor, up: Tensor) -> Callable[..., Tensor]:
        own = scale(name) if callable(scale) else scale
        layer = model.get_submodule(name)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            if isinstance(layer, nn.Conv2d):
                inner = nn.functional.conv2d(inputs[0], down, stride=layer.stride, padding=layer.padding)
                return out + own * nn.functional.conv2d(inner, up)
            return out + own * (inputs[0] @ down.T) @ up.T

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(adding(name, down, up)) for name, (down, up) in pairs.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
