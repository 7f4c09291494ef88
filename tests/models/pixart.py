"""Tiny PixArts with random weights, as models and as folders: like alpha at 1024 pixels, like Sigma, of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from ditc.exporter.pixart import PixArt
from ditc.spec import DiffusionSpec, SamplerSpec

TOKENS, CAPTION = 7, 32  # of a text

SHARED: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "num_layers": 2,
    "cross_attention_dim": 48,
    "caption_channels": CAPTION,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # sample_size 128 turns size and ratio on; its patch keeps the tokens few
    "alpha": {"sample_size": 128, "patch_size": 32, "in_channels": 4, "out_channels": 8},
    "sigma": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "use_additional_conditions": False,
        "interpolation_scale": 2,
    },
    "pixels": {"sample_size": 16, "patch_size": 4, "in_channels": 3, "out_channels": 3},
}
VAES: dict[str, dict[str, Any]] = {
    "alpha": {"block_out_channels": (16,), "scaling_factor": 0.18215, "mid_block_add_attention": False},
    "sigma": {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "scaling_factor": 0.13025,
    },
}
PIPELINES: dict[str, Any] = {
    "alpha": PixArtAlphaPipeline,
    "sigma": PixArtSigmaPipeline,
    "pixels": PixArtSigmaPipeline,
}


def transformer(kind: str, **changes: Any) -> PixArtTransformer2DModel:
    """diffusers' module with seeded random weights; tables and gates large enough for every branch to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PixArtTransformer2DModel(**SHARED | CONFIGS[kind] | changes)
        with torch.no_grad():
            for block in model.transformer_blocks:
                block.scale_shift_table.normal_(std=0.5)
    return model.eval()


def model(kind: str, **changes: Any) -> PixArt:
    """The same as our model, without a decoder."""
    own = PixArt(
        transformer(kind, **changes), name=kind, text_tokens=TOKENS, diffusion=DiffusionSpec(learned_sigma=False)
    )
    own.sampler = SamplerSpec(name="dpm++2m")
    return own.eval()


def pipeline(kind: str, **changes: Any) -> Any:
    """diffusers' pipeline, without a text encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shape: dict[str, Any] = {"latent_channels": 4, "norm_num_groups": 8, "layers_per_block": 1}
        vae = AutoencoderKL(**shape | VAES[kind]).eval() if kind in VAES else None
    pipe = PIPELINES[kind](
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer(kind, **changes),
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(kind: str, folder: Path, **changes: Any) -> Path:
    """A diffusers folder of it."""
    pipeline(kind, **changes).save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Conditions of some images: texts of different lengths, and the same for their negative ones."""
    generator = torch.Generator().manual_seed(seed)
    arrays = {}
    for number, name in enumerate(("text", "null_text")):
        arrays[name] = torch.randn(count, tokens, CAPTION, generator=generator)
        lengths = (torch.arange(count) * 3 + 2 + number) % tokens + 1
        arrays[f"{name}_mask"] = (torch.arange(tokens) < lengths[:, None]).long()
    return arrays
