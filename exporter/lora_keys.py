"""Keys in the file of a LoRA: which part of which layer a tensor is, in each form that training tools write.

PEFT writes `base_model.model.blocks.0.attn.qkv.lora_A.weight`, kohya `lora_unet_blocks_0_attn_qkv.lora_down.weight`
with its `alpha`, diffusers before it had PEFT `blocks.0.attn1.processor.to_q_lora.down.weight` or
`blocks.0.attn1.to_q.lora.down.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Literal

__all__ = ["Part", "foreign_kind", "layer_and_part", "layer_named", "without_wrappers"]

Part = Literal["down", "up", "alpha"]

# how a key ends -> the part that it is: down is A (rank, inputs), up is B (outputs, rank)
ENDINGS: tuple[tuple[str, Part], ...] = (
    (r"\.lora_A(?:\.\w+)?\.weight", "down"),  # perhaps with the name that an adapter has in PEFT
    (r"\.lora_B(?:\.\w+)?\.weight", "up"),
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_up\.weight", "up"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight", "down"),
    (r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight", "up"),
    (r"(?:\.lora|_lora)?\.alpha", "alpha"),
)
# what a key may belong to that is not merged here
FOREIGN = (
    (r"(?:base_model\.model\.)?(?:text_encoder(?:_\d)?\.|lora_te\d?_|te\d?\.).*", "a LoRA of a text encoder"),
    (r".*(?:lora_magnitude_vector|dora_scale).*", "DoRA"),
    (r".*\.hada_.*", "LoHa"),
    (r".*\.lokr_.*", "LoKr"),
    (r".*\.oft_.*", "OFT"),
    (r".*\.lora_embedding_[AB].*", "a LoRA of an embedding table"),
    (r".*\.lora_mid\..*", "a convolution in three factors"),
    (r".*\.(?:lora_A|lora_B|lora_up|lora_down)(?:\.\w+)?\.bias|.*\.diff_b", "a change of biases"),
    (r".*\.diff", "a change of whole weights"),
)
# in front of a layer's own name: what held the model when it was saved
WRAPPERS = ("base_model.model.", "transformer.", "unet.", "diffusion_model.", "model.", "module.")
# in front of a name whose dots are underscores
FLATTENED = ("lora_unet_", "lora_transformer_", "lycoris_")


def foreign_kind(key: str) -> str | None:
    """Return what a key belongs to where that is known and not merged here, else None."""
    return next((kind for pattern, kind in FOREIGN if re.fullmatch(pattern, key)), None)


def layer_and_part(key: str) -> tuple[str, Part] | None:
    """Split a key into the layer, as the file names it, and the part of its LoRA; None for a key of no LoRA."""
    for ending, part in ENDINGS:
        if match := re.fullmatch(f"(.+?){ending}", key):
            return match[1], part
    return None


def layer_named(text: str, names: Collection[str]) -> str | None:
    """Return the one of a model's layers that a file means, None where it has no such layer, or several."""
    for start in FLATTENED:
        if text.startswith(start):
            return _only(name for name in names if name.replace(".", "_") == text.removeprefix(start))
    return next((name for name in _spellings(text) if name in names), None)


def without_wrappers(text: str) -> str:
    """A name without what stands in front of a layer's own."""
    *_, shortest = _unwrapped(text)
    return shortest


def _spellings(text: str) -> Iterator[str]:
    """Yield the names that a layer may have in a model, the most literal one first."""
    for name in _unwrapped(text):
        plain = name.replace(".processor.", ".")
        yield from (name, plain, f"{plain}.0") if plain.endswith(".to_out") else (name, plain)


def _unwrapped(text: str) -> Iterator[str]:
    """Yield a name as it is, and as it is behind each of the wrappers in front of it."""
    while True:
        yield text
        start = next((start for start in WRAPPERS if text.startswith(start)), None)
        if start is None:
            return
        text = text.removeprefix(start)


def _only(names: Iterable[str]) -> str | None:
    """Return the only one of some names, None where there is none or another."""
    several = [*names]
    return several[0] if len(several) == 1 else None
