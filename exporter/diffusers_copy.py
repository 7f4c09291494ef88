"""The way back: a DiT as diffusers' own class, for what is measured beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditc.errors import InputError
from ditc.exporter.diffusers_keys import diffusers_names
from ditc.exporter.dit import DiT

__all__ = ["diffusers_from_dit"]


def diffusers_from_dit(model: Any) -> Any:
    """A `DiTTransformer2DModel` that computes what the model computes, its weights shared.

    The frequencies of the original release differ from diffusers'; the copy takes the model's. Raises InputError for a
    model that diffusers' class can't be.
    """
    if not isinstance(model, DiT):
        raise InputError(
            f"diffusers' DiT is made from a DiT of the original or diffusers' form, found {type(model).__name__}"
        )
    config = model.config
    if config.mlp_ratio != 4:
        raise InputError(f"{model.name} is not diffusers' DiT: its MLP ratio is {config.mlp_ratio:g}, expected 4")
    if not config.null_class:
        raise InputError(f"{model.name} is not diffusers' DiT: it has no null class")
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as e:
        raise InputError("diffusers is not installed; install it with: pip install 'ditc[export]'") from e
    kind: Any = DiTTransformer2DModel
    copy = kind(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        attention_bias=config.qkv_bias,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=config.norm2_eps,
    )
    copy.load_state_dict(_diffusers_state(model), strict=True, assign=True)
    copy.pos_embed.pos_embed = model.pos_embed.data
    for block in copy.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = config.freq_shift
    return copy.eval()


def _diffusers_state(model: DiT) -> dict[str, Tensor]:
    """The model's parameters under diffusers' keys, with the shared embedders in every block."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name != "pos_embed" and not name.startswith("decoder."):
            keys = diffusers_names(name)
            for key, part in zip(keys, parameter.detach().chunk(len(keys)), strict=True):
                if not torch.equal(state.setdefault(key, part), part):
                    raise InputError(f"{model.name} is not diffusers' DiT: its final layer has an embedder of its own")
    embedder = "transformer_blocks.0.norm1.emb."
    shared = {key: value for key, value in state.items() if key.startswith(embedder)}
    for block in range(1, model.config.depth):
        for key, value in shared.items():
            state.setdefault(key.replace("blocks.0", f"blocks.{block}", 1), value)
    return state
