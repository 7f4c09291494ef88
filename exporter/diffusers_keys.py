"""Names of a DiT's parameters: ours, which are the original release's, and those of diffusers."""

from __future__ import annotations

import re

__all__ = ["BLOCK_NAMES", "OUTER_NAMES", "diffusers_names"]

# our names -> diffusers'; q, k and v are separate there
BLOCK_NAMES = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
OUTER_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def diffusers_names(name: str) -> list[str]:
    """Return a parameter's keys in a diffusers state dict: one, or those of q, k and v to join."""
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
        return [f"transformer_blocks.{match[1]}.attn1.to_{part}.{match[2]}" for part in "qkv"]
    module, leaf = name.rsplit(".", 1)
    if module in OUTER_NAMES:
        return [f"{OUTER_NAMES[module]}.{leaf}"]
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return [f"transformer_blocks.{match[1]}.{BLOCK_NAMES[match[2]]}.{leaf}"]
    return [f"transformer_blocks.0.{BLOCK_NAMES[module]}.{leaf}"]  # the embedder that all blocks share
