"""Checkpoints with the key names of the original DiT release, such as DiT-XL-2-256x256.pt."""

from __future__ import annotations

import math
import re
from pathlib import Path

from torch import Tensor

from ditc.errors import CheckpointError
from ditc.exporter.dit import DIT_SIZES, DiT, DiTConfig
from ditc.exporter.weights import load_weights, read_tensors
from ditc.spec import SamplerSpec

__all__ = ["config_from_tensors", "dit_from_checkpoint"]


def dit_from_checkpoint(path: Path, *, num_heads: int | None = None) -> DiT:
    """A DiT from a checkpoint file; the configuration is read off the shapes.

    The head count leaves no trace in the weights. It is known for the released widths; for another one give
    `num_heads`. As in the original release, guidance applies to the first three latent channels.
    """
    tensors = read_tensors(path)
    config = config_from_tensors(tensors, path, num_heads)
    model = DiT(config, name=path.stem)
    load_weights(model, tensors, path)
    model.cfg_channels = min(3, config.in_channels)  # the release's choice "for exact reproducibility"
    model.sampler = SamplerSpec(variance="learned" if config.learn_sigma else "fixed-small")
    return model.eval()


def config_from_tensors(tensors: dict[str, Tensor], source: Path, num_heads: int | None) -> DiTConfig:
    """The configuration that the shapes spell out. Raises CheckpointError naming the key that doesn't fit."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != rank:
            found = "is missing" if name not in tensors else f"has shape {tuple(tensors[name].shape)}"
            raise CheckpointError(f"{source} is not an original DiT checkpoint: {name} {found}")
        return tuple(tensors[name].shape)

    hidden, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    numbers = [int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))]
    if not numbers:
        raise CheckpointError(f"{source} is not an original DiT checkpoint: it has no blocks.0.attn.qkv.weight")
    outputs = shape("final_layer.linear.weight", 2)[0] // patch**2
    side = math.isqrt(shape("pos_embed", 3)[1])
    if outputs not in (channels, 2 * channels):
        raise CheckpointError(f"{source}: final_layer gives {outputs} channels, expected {channels} or {2 * channels}")
    classes = shape("y_embedder.embedding_table.weight", 2)[0] - 1
    if classes < 1:
        raise CheckpointError(f"{source}: y_embedder has {classes + 1} rows, expected one per class and one for none")
    return DiTConfig(
        input_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=max(numbers) + 1,
        num_heads=_heads(hidden, num_heads, source),
        mlp_ratio=shape("blocks.0.mlp.fc1.weight", 2)[0] / hidden,
        num_classes=classes,
        learn_sigma=outputs == 2 * channels,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
    )


def _heads(hidden: int, given: int | None, source: Path) -> int:
    if given is not None:
        if given < 1 or hidden % given:
            raise CheckpointError(f"{source} is {hidden} wide, which {given} heads don't divide; correct --heads")
        return given
    heads = {width: count for width, _, count in DIT_SIZES.values()}
    if hidden not in heads:
        raise CheckpointError(f"{source} is {hidden} wide, which no released DiT is; give its head count with --heads")
    return heads[hidden]
