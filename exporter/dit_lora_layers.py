"""The layers of a DiT that a LoRA may be for, by the names of the original release and by those of diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ditc.exporter.diffusers_keys import diffusers_names
from ditc.exporter.loras import WeightRows

__all__ = ["dit_lora_layers"]

OWN_EMBEDDER = re.compile(r"blocks\.\d+\.(?=t_embedder\.)")


def dit_lora_layers(names: Iterable[str], width: int, sharing_blocks: int) -> dict[str, tuple[WeightRows, ...]]:
    """Return the rows of weights of each of a DiT's layers `names`, by either name.

    diffusers has q, k and v apart, each a third of the rows of `qkv`, and an embedder of timesteps in every block: of
    blocks that share one, the first `sharing_blocks`, the rows are those that they would have by themselves. The final
    layer reads block 0's. A name of the original release means all copies.
    """
    own = [*names]
    shared = [name for name in own if name.startswith("t_embedder.")]
    apart = [f"blocks.{number}.{name}" for number in range(sharing_blocks) for name in shared]
    layers: dict[str, tuple[WeightRows, ...]] = {}
    for layer, rows in (*_original(own), *_in_diffusers([*own, *apart], width)):
        layers[layer] = (*layers.get(layer, ()), rows)
    return layers


def _original(names: Iterable[str]) -> Iterator[tuple[str, WeightRows]]:
    for name in names:
        yield OWN_EMBEDDER.sub("", name), WeightRows(f"{name}.weight")


def _in_diffusers(names: Iterable[str], width: int) -> Iterator[tuple[str, WeightRows]]:
    for name in names:
        weight = f"{name}.weight"
        keys = [key.removesuffix(".weight") for key in diffusers_names(weight)]
        for place, key in enumerate(keys):
            yield key, WeightRows(weight, place * width, (place + 1) * width) if len(keys) > 1 else WeightRows(weight)
