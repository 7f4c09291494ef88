"""Decoders of diffusers' AutoencoderKL: its numbers for every configuration that is taken, refusals for the others."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from refusals import refusal_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditc.errors import CheckpointError
from ditc.exporter.protocol import relative_error
from ditc.exporter.vae import ENCODING, VAE_KEYS, decoder_from_vae

Settings = dict[str, Any]

SMALL: Settings = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def autoencoder(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL | changes).eval()


def saved(model: AutoencoderKL, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(autoencoder(), tmp_path / "vae")


def change_config(folder: Path, drop: str | None = None, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config.pop(drop, None)
    path.write_text(json.dumps(config))


def rename(folder: Path, change: Any) -> None:
    tensors = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS).items() if change(name)}
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path) -> str:
    return refusal_of(lambda: decoder_from_vae(folder), folder.name)


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected_images(model: AutoencoderKL) -> Tensor:
    """As diffusers' pipelines of models with a shift decode: z / scale + shift."""
    shift = model.config.shift_factor or 0.0
    return model.decode(latents() / model.config.scaling_factor + shift).sample


def test_the_keys_and_their_defaults_are_the_class_s_own() -> None:
    parameters = {name: p.default for name, p in inspect.signature(AutoencoderKL.__init__).parameters.items()}
    del parameters["self"]
    assert VAE_KEYS.known == parameters.keys()
    defaults = {**VAE_KEYS.read, **{key: default for key, (default, _) in VAE_KEYS.fixed.items()}}
    assert defaults == {key: parameters[key] for key in defaults}


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scaling_factor": 0.5},
        {"shift_factor": 0.1159},
        {"shift_factor": -0.7, "scaling_factor": 0.3611},
        {"shift_factor": 0.0},
        {"use_quant_conv": False},
        {"use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {"force_upcast": False},
        {"act_fn": "relu"},
        {"norm_num_groups": 4},
        {"layers_per_block": 2},
        {"out_channels": 1},
        {"sample_size": 64},
    ],
)
def test_a_decoder_is_diffusers_own(changes: Settings, tmp_path: Path) -> None:
    model = autoencoder(**changes)
    decoder, assumed = decoder_from_vae(saved(model, tmp_path / "vae"))
    assert relative_error(decoder(latents()), expected_images(model)) < 1e-5
    assert decoder.latent_scale == model.config.scaling_factor
    assert decoder.latent_shift == (model.config.shift_factor or 0)
    assert assumed == ()
    assert not decoder.training


@torch.no_grad()
def test_a_shift_is_not_left_out(folder: Path) -> None:
    plain = decoder_from_vae(folder)[0](latents())
    change_config(folder, shift_factor=0.5)
    assert relative_error(decoder_from_vae(folder)[0](latents()), plain) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("key", sorted(VAE_KEYS.known))
def test_a_key_that_a_file_leaves_out_is_the_class_s_default(key: str, folder: Path) -> None:
    settings = {**SMALL, "scaling_factor": 0.7, "shift_factor": 0.2, "act_fn": "relu"}
    saved(autoencoder(**settings), folder)
    change_config(folder, drop=key)
    try:
        model = AutoencoderKL.from_config(json.loads((folder / "config.json").read_text())).eval()
        unlike = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        decodes = not [name for names in unlike for name in names if not name.startswith(ENCODING)]
    except (RuntimeError, IndexError, ValueError):  # by its defaults another architecture than that of the weights
        decodes = False
    if not decodes:
        refusal(folder)
        return
    assert relative_error(decoder_from_vae(folder)[0](latents()), expected_images(model)) < 1e-5


@torch.no_grad()
def test_a_file_with_the_old_names_of_attention_is_read(folder: Path) -> None:
    """Names that VAEs had before 2023, those beside the released DiTs among them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(name: str) -> str:
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        return name

    expected = decoder_from_vae(folder)[0](latents())
    rename(folder, change)
    assert any("proj_attn" in name for name in load_file(folder / WEIGHTS))
    assert torch.equal(decoder_from_vae(folder)[0](latents()), expected)


@torch.no_grad()
def test_an_encoder_is_not_needed(folder: Path) -> None:
    expected = decoder_from_vae(folder)[0](latents())
    rename(folder, lambda name: "" if name.startswith(("encoder.", "quant_conv.")) else name)
    assert torch.equal(decoder_from_vae(folder)[0](latents()), expected)


@pytest.mark.parametrize("key", ["decoder.conv_in.weight", "post_quant_conv.bias"])
def test_a_key_that_is_missing_is_named_and_not_left_random(key: str, folder: Path) -> None:
    rename(folder, lambda name: "" if name == key else name)
    assert f"missing {key}" in refusal(folder)


def test_a_key_that_no_vae_has_is_named(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"decoder.extra": torch.zeros(2)}, folder / WEIGHTS)
    assert "unexpected decoder.extra" in refusal(folder)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS) | {"decoder.conv_in.bias": torch.zeros(2)}, folder / WEIGHTS)
    assert "decoder.conv_in.bias has shape (2,), its config.json says (32,)" in refusal(folder)


def test_weights_that_are_not_finite_are_refused(folder: Path) -> None:
    broken = {"decoder.conv_in.bias": torch.full((32,), float("nan"))}
    save_file(load_file(folder / WEIGHTS) | broken, folder / WEIGHTS)
    assert "decoder.conv_in.bias contains NaN" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny, expected AutoencoderKL"),
        ({"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "latents_mean is [0.1, 0.2, 0.3, 0.4], expected null"),
        ({"latents_std": [0.1, 0.2, 0.3, 0.4]}, "latents_std is [0.1, 0.2, 0.3, 0.4], expected null"),
        ({"scaling_factor": None}, "scaling_factor is null"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": "0.18215"}, "scaling_factor is '0.18215'"),
        ({"scaling_factor": True}, "scaling_factor is true"),
        ({"shift_factor": "0.1"}, "shift_factor is '0.1'"),
        ({"shift_factor": [0.1]}, "shift_factor is [0.1]"),
        ({"latent_channels": "4"}, "config.json"),
        ({"block_out_channels": 16}, "config.json"),
        ({"up_block_types": ["NoBlock"] * 2}, "config.json"),
        ({"act_fn": None}, "config.json"),
        ({"batch_norm": True}, "batch_norm (true) is no key"),
        ({"block_out_channels": [16, 64]}, "shape"),
    ],
)
def test_a_setting_that_can_not_be_had_is_named(changes: Settings, named: str, folder: Path) -> None:
    change_config(folder, **changes)
    assert named in refusal(folder)


def test_a_truncated_vae_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    assert "not a whole safetensors file" in refusal(folder)


@torch.no_grad()
def test_a_vae_with_only_a_half_precision_variant_is_read_and_said(folder: Path) -> None:
    half = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")
    decoder, assumed = decoder_from_vae(folder)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    assert assumed == ("of the VAE the weights of the variant fp16 are meant, no others are in vae",)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stabilityai/sd-vae-ft-mse", "run: hf download stabilityai/sd-vae-ft-mse --local-dir sd-vae-ft-mse"),
        ("nowhere", "there is no such folder"),
    ],
)
def test_a_folder_that_is_not_there_says_so(name: str, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        decoder_from_vae(Path(name))
    assert said in str(caught.value)


def test_a_pipeline_s_folder_in_place_of_its_vae_is_pointed_into(folder: Path) -> None:
    assert f"it is a pipeline's; give the VAE in it: {folder.parent / 'vae'}" in refusal(folder.parent)


def test_what_is_there_in_place_of_a_folder_is_named_and_no_download_advised(tmp_path: Path) -> None:
    (tmp_path / "owner" / "empty").mkdir(parents=True)
    (tmp_path / "owner" / "vae.safetensors").write_bytes(b"")
    for name, said in (("empty", "it holds nothing"), ("vae.safetensors", "it is a file; give the folder")):
        message = refusal(tmp_path / "owner" / name)
        assert said in message
        assert "download" not in message


@pytest.mark.parametrize("channels", [2, 4])
def test_a_vae_whose_output_is_no_picture_is_refused(channels: int, folder: Path) -> None:
    change_config(folder, out_channels=channels)
    assert f"out_channels is {channels}, expected 1 or 3" in refusal(folder)
