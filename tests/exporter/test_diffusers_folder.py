"""Diffusers folders: the same numbers as diffusers computes, and clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditc.errors import CheckpointError, InputError
from ditc.exporter.diffusers_folder import diffusers_from_dit, dit_from_diffusers
from ditc.exporter.dit import DiT, DiTConfig, sincos_positions
from ditc.exporter.models import random_dit
from ditc.exporter.protocol import relative_error
from ditc.spec import DiffusionSpec, SamplerSpec

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
VARIANTS: dict[str, Settings] = {
    "learned sigma": {},
    "no learned sigma": {"out_channels": 4},
    "sigma left to the default": {"out_channels": None},
    "patch 4": {"patch_size": 4, "sample_size": 16},
    "no attention bias": {"attention_bias": False},
    "another epsilon": {"norm_eps": 0.1},
    "narrow heads": {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6},
    "one block": {"num_layers": 1},
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(transformer(), tmp_path / "tiny")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, drop: str | None = None, **added: Tensor) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(kept | added, path)


def refusal(folder: Path) -> str:
    """The one line that a user reads when this folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        dit_from_diffusers(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_computes_what_diffusers_computes(name: str, tmp_path: Path) -> None:
    model = transformer(**VARIANTS[name])
    own = dit_from_diffusers(saved(model, tmp_path / "tiny"))
    assert error_against(model, own) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_with_equal_embedders_computes_what_diffusers_computes(name: str, tmp_path: Path) -> None:
    model = share_embedders(transformer(**VARIANTS[name]))
    own = dit_from_diffusers(saved(model, tmp_path / "tiny"))
    assert not own.config.embedder_per_block
    assert error_against(model, own) < 1e-5


def test_embedders_that_differ_are_kept_per_block(folder: Path) -> None:
    model = dit_from_diffusers(folder)
    assert model.config.embedder_per_block
    assert not torch.equal(model.blocks[0].t_embedder.mlp[0].weight, model.blocks[1].t_embedder.mlp[0].weight)


def test_q_k_and_v_of_a_diffusers_block_are_joined(folder: Path) -> None:
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    expected = torch.cat([tensors[f"transformer_blocks.1.attn1.to_{part}.weight"] for part in "qkv"])
    assert torch.equal(dit_from_diffusers(folder).blocks[1].attn.qkv.weight, expected)


def test_the_spec_is_read_off_the_configuration(tmp_path: Path) -> None:
    own = dit_from_diffusers(saved(transformer(patch_size=4), tmp_path / "mine"))
    assert own.spec.name == "mine"
    assert own.spec.latent_shape == (4, 8, 8)
    assert own.spec.branch_shape == (4, 64)
    assert own.spec.null_label == own.spec.num_classes == 10
    assert own.spec.cfg_channels == 4
    assert own.spec.diffusion.learned_sigma
    assert not own.training


@pytest.mark.parametrize(
    "options", [{"max_shard_size": "100KB"}, {"max_shard_size": "100KB", "safe_serialization": False}]
)
def test_sharded_weights_are_read(options: Settings, tmp_path: Path) -> None:
    model = transformer()
    folder = saved(model, tmp_path / "tiny", **options)
    assert len(list(folder.glob("*-of-*"))) > 2
    assert error_against(model, dit_from_diffusers(folder)) < 1e-5


def test_bin_weights_are_read(tmp_path: Path) -> None:
    model = transformer()
    folder = saved(model, tmp_path / "tiny", safe_serialization=False)
    assert (folder / "diffusion_pytorch_model.bin").is_file()
    assert error_against(model, dit_from_diffusers(folder)) < 1e-5


def test_half_precision_weights_are_computed_with_in_float32(tmp_path: Path) -> None:
    own = dit_from_diffusers(saved(transformer().half(), tmp_path / "tiny"))
    assert {parameter.dtype for parameter in own.parameters()} == {torch.float32}


def test_positions_are_computed_where_the_weights_leave_them_out(folder: Path) -> None:
    assert torch.equal(dit_from_diffusers(folder).pos_embed, sincos_positions(64, 4))


def test_positions_in_the_weights_are_taken(folder: Path) -> None:
    positions = torch.randn(1, 16, 64)
    change_weights(folder, **{"pos_embed.pos_embed": positions})
    assert torch.equal(dit_from_diffusers(folder).pos_embed, positions)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "", "7"])
def test_a_damaged_configuration_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_a_model_of_another_class_is_refused(folder: Path) -> None:
    change_config(folder, _class_name="PixArtTransformer2DModel")
    message = refusal(folder)
    assert "PixArtTransformer2DModel" in message
    assert "expected DiTTransformer2DModel" in message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("activation_fn", "geglu"),
        ("norm_elementwise_affine", True),
        ("out_channels", 5),
        ("sample_size", None),
        ("num_embeds_ada_norm", None),
        ("num_attention_heads", "4"),
    ],
)
def test_a_setting_that_no_dit_has_is_named(setting: str, value: Any, folder: Path) -> None:
    change_config(folder, **{setting: value})
    assert setting in refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert "no weights" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = saved(transformer(), tmp_path / "tiny", max_shard_size="100KB")
    shard = sorted(folder.glob("*-00002-of-*"))[0]
    shard.unlink()
    assert shard.name in refusal(folder)


def test_an_index_without_a_weight_map_is_refused(tmp_path: Path) -> None:
    folder = saved(transformer(), tmp_path / "tiny", max_shard_size="100KB")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "index.json" in refusal(folder)


MISSING = [
    "pos_embed.proj.weight",
    "proj_out_2.bias",
    "transformer_blocks.1.ff.net.2.weight",
    "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight",
    "transformer_blocks.0.attn1.to_q.weight",
    "transformer_blocks.0.attn1.to_k.weight",
    "transformer_blocks.0.attn1.to_v.bias",
]


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_key_is_named_as_the_folder_names_it(key: str, folder: Path) -> None:
    change_weights(folder, drop=key)
    assert f"missing {key}" in refusal(folder)


@pytest.mark.parametrize("key", ["cross.weight", "transformer_blocks.0.attn2.to_q.weight", "scale"])
def test_an_unexpected_key_is_named_as_the_folder_names_it(key: str, folder: Path) -> None:
    change_weights(folder, **{key: torch.zeros(3)})
    assert f"unexpected {key}" in refusal(folder)


@pytest.mark.parametrize(("layers", "word"), [(1, "unexpected"), (3, "missing")])
def test_a_depth_that_the_weights_do_not_have_is_refused(layers: int, word: str, folder: Path) -> None:
    change_config(folder, num_layers=layers)
    assert word in refusal(folder)


@pytest.mark.parametrize("key", ["ff.net.2.bias", "attn1.to_k.weight"])
def test_a_wrong_shape_is_refused(key: str, folder: Path) -> None:
    change_weights(folder, **{f"transformer_blocks.1.{key}": torch.zeros(7, 5)})
    assert "shape" in refusal(folder)


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    change_weights(folder, **{"transformer_blocks.1.attn1.to_k.weight": torch.full((64, 64), float("nan"))})
    assert "NaN" in refusal(folder)


def pipeline_with(scheduler: Any, folder: Path) -> Path:
    transformer().save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


DDIM = SamplerSpec(name="ddim", spacing="leading", clip=1.0)
SCHEDULERS: dict[str, tuple[Any, dict[str, Any], SamplerSpec]] = {
    "ddim": (DDIMScheduler(), {}, DDIM),
    "released DiT": (DDIMScheduler(clip_sample=False), {}, DDIM.model_copy(update={"clip": None})),
    "clip range": (DDIMScheduler(clip_sample_range=2.5), {}, DDIM.model_copy(update={"clip": 2.5})),
    "trailing": (DDIMScheduler(timestep_spacing="trailing"), {}, DDIM.model_copy(update={"spacing": "trailing"})),
    "linspace": (DDIMScheduler(timestep_spacing="linspace"), {}, DDIM.model_copy(update={"spacing": "linspace"})),
    "offset": (DDIMScheduler(steps_offset=1), {}, DDIM.model_copy(update={"offset": 1})),
    "first alpha": (DDIMScheduler(set_alpha_to_one=False), {}, DDIM.model_copy(update={"final_alpha_one": False})),
    "v": (DDIMScheduler(prediction_type="v_prediction"), {"prediction": "v"}, DDIM),
    "sample": (DDIMScheduler(prediction_type="sample"), {"prediction": "sample"}, DDIM),
    "scaled": (
        DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.012),
        {"beta_schedule": "scaled-linear", "beta_start": 0.001, "beta_end": 0.012},
        DDIM,
    ),
    "cosine": (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), {"beta_schedule": "squared-cosine"}, DDIM),
    "train steps": (DDIMScheduler(num_train_timesteps=400), {"train_steps": 400}, DDIM),
    "ddpm": (DDPMScheduler(), {}, DDIM.model_copy(update={"name": "ddpm"})),
    "learned variance": (
        DDPMScheduler(variance_type="learned_range", clip_sample=False),
        {},
        SamplerSpec(name="ddpm", spacing="leading", variance="learned"),
    ),
    "large variance": (
        DDPMScheduler(variance_type="fixed_large"),
        {},
        DDIM.model_copy(update={"name": "ddpm", "variance": "fixed-large"}),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_mapped(name: str, tmp_path: Path) -> None:
    scheduler, diffusion, sampler = SCHEDULERS[name]
    spec = dit_from_diffusers(pipeline_with(scheduler, tmp_path / "pipeline")).spec
    assert spec.diffusion == DiffusionSpec(learned_sigma=True).model_copy(update=diffusion)
    assert spec.sampler == sampler


def test_without_a_scheduler_the_process_is_that_of_the_release(tmp_path: Path) -> None:
    spec = dit_from_diffusers(saved(transformer(out_channels=4), tmp_path / "tiny")).spec
    assert spec.diffusion == DiffusionSpec(learned_sigma=False)
    assert spec.sampler.clip is None


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (DDIMScheduler(rescale_betas_zero_snr=True), "betas"),
        (DDIMScheduler(trained_betas=[0.1, 0.2]), "betas"),
        (DDIMScheduler(thresholding=True), "thresholds"),
        (DDPMScheduler(beta_schedule="sigmoid"), "beta_schedule is 'sigmoid'"),
        (DDPMScheduler(variance_type="learned"), "variance_type is 'learned'"),
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_process_that_ditc_does_not_know_is_refused(scheduler: Any, named: str, tmp_path: Path) -> None:
    message = refusal(pipeline_with(scheduler, tmp_path / "pipeline"))
    assert "scheduler_config.json" in message
    assert named in message


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(), DPMSolverMultistepScheduler()])
def test_a_scheduler_that_never_clips_gives_a_sampler_that_does_not(scheduler: Any, tmp_path: Path) -> None:
    assert dit_from_diffusers(pipeline_with(scheduler, tmp_path / "pipeline")).spec.sampler.clip is None


def autoencoder(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    settings: Settings = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    return AutoencoderKL(**settings | changes).eval()


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.18215, 0.5])
def test_the_decoder_is_the_vae_s_on_unscaled_latents(scale: float, tmp_path: Path) -> None:
    vae = autoencoder(scaling_factor=scale)
    transformer().save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    model = dit_from_diffusers(tmp_path)
    latent = torch.randn(2, 4, 8, 8)
    assert model.spec.latent_scale == scale
    assert model.decoder is not None
    torch.testing.assert_close(model.decoder(latent), vae.decode(latent / scale).sample)


def test_the_decoder_is_not_counted_among_the_parameters(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    alone = dit_from_diffusers(tmp_path).spec.parameters
    autoencoder().save_pretrained(tmp_path / "vae")
    assert dit_from_diffusers(tmp_path).spec.parameters == alone


def test_without_a_vae_there_is_no_decoder(folder: Path) -> None:
    model = dit_from_diffusers(folder)
    assert model.decoder is None
    assert model.spec.latent_scale is None


def test_a_vae_of_another_class_is_refused(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    autoencoder().save_pretrained(tmp_path / "vae")
    change_config(tmp_path / "vae", _class_name="AutoencoderTiny")
    assert "AutoencoderTiny, expected AutoencoderKL" in refusal(tmp_path)


def test_a_truncated_vae_is_refused(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    autoencoder().save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "not a readable AutoencoderKL" in refusal(tmp_path)


OWN = DiTConfig(input_size=8, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=10)


@pytest.mark.parametrize(
    "changes",
    [{}, {"freq_shift": 1, "norm2_eps": 1e-5}, {"learn_sigma": False, "qkv_bias": False}, {"embedder_per_block": True}],
)
def test_a_dit_as_diffusers_class_computes_the_same_and_shares_its_weights(changes: Settings) -> None:
    own = random_dit(replace(OWN, **changes), "own")
    if own.config.embedder_per_block:  # diffusers takes the first block's for the final layer too
        own.t_embedder, own.y_embedder = own.blocks[0].t_embedder, own.blocks[0].y_embedder
    model = diffusers_from_dit(own)
    assert error_against(model, own) < 1e-4
    assert model.transformer_blocks[1].ff.net[2].weight.data_ptr() == own.blocks[1].mlp.fc2.weight.data_ptr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mlp_ratio": 2.0}, "MLP ratio is 2, expected 4"), ({"embedder_per_block": True}, "embedder of its own")],
)
def test_a_dit_that_diffusers_class_can_not_be_is_refused(changes: Settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        diffusers_from_dit(random_dit(replace(OWN, **changes), "own"))
