"""Small diffusers folders, as diffusers writes them, and what is said where one is refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from refusals import refusal_of

from ditc.exporter.diffusers_folder import dit_from_diffusers
from ditc.exporter.dit import DiT
from ditc.exporter.protocol import relative_error

Settings = dict[str, Any]


TINY: Settings = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "norm_num_groups": 8,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def transformer(**changes: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**TINY | changes).eval()


def share_embedders(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Every block a copy of the first one's embedders, as conversions of the original release have it."""
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@torch.no_grad()
def error_against(model: DiTTransformer2DModel, own: DiT) -> float:
    """Relative error of our forward pass: every row has a timestep and a label of its own."""
    config = model.config
    x = torch.randn(4, config.in_channels, config.sample_size, config.sample_size)
    t, y = torch.tensor([999, 500, 7, 0]), torch.tensor([0, 3, 9, 10])
    return relative_error(own(x, t.float(), y), model(x, timestep=t, class_labels=y).sample)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path) -> str:
    """The one line that a user reads when this folder is refused."""
    return refusal_of(lambda: dit_from_diffusers(folder), folder)


# the configurations beside the released DiT-XL/2 have exactly these keys, written by a diffusers of 2022
RELEASED: Settings = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 16,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 4,
    "num_embeds_ada_norm": 10,
    "num_layers": 2,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
    "upcast_attention": False,
    "use_linear_projection": False,
}


RELEASED_SCHEDULER: Settings = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.12.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "trained_betas": None,
}


def released_folder(folder: Path, **changes: Any) -> Path:
    """A transformer folder as the release has it, weights in a .bin file; `changes` are other settings.

    The weights are those of a DiT with such settings, as far as there is one.
    """
    own = own_signature(DiTTransformer2DModel).keys() & changes.keys() & {"num_attention_heads", "out_channels"}
    model = transformer(**{key: changes[key] for key in own})
    saved(share_embedders(model), folder, safe_serialization=False)
    (folder / "config.json").write_text(json.dumps(RELEASED | changes))
    return folder


def own_signature(kind: Any) -> Settings:
    parameters = inspect.signature(kind.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def pipeline(folder: Path, **settings: Any) -> Path:
    transformer().save_pretrained(folder / "transformer")
    DDIMScheduler(**settings).save_pretrained(folder / "scheduler")
    return folder
