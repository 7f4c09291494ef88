"""Decoders: a local folder of diffusers' `AutoencoderKL`, from the model's latents to images in [-1, 1]."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditc.errors import CheckpointError, InputError
from ditc.exporter.config_files import Config, Keys, class_named, config_of, read_json
from ditc.exporter.file_formats import download_advice
from ditc.exporter.folder_weights import found_there, read_folder_weights
from ditc.exporter.weight_files import StateDict, listed

__all__ = ["VAE_KEYS", "Decoder", "check_decodes", "decoder_from_vae"]

# handed to the class as they are: it builds the decoder from them
ARCHITECTURE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
VAE_KEYS = Keys(
    read={**ARCHITECTURE, "scaling_factor": 0.18215, "shift_factor": None},
    # pipelines of other models normalize latents by these, diffusers' DiT pipeline does not
    fixed={"latents_mean": (None, None), "latents_std": (None, None)},
    harmless={"sample_size": "for decoding in tiles only", "force_upcast": "decoded in float32 anyway"},
)
PICTURES = (1, 3)  # channels that a picture can have
ENCODING = ("encoder.", "quant_conv.")  # keys of what is not needed
# names of the attention's layers in files before 2023 -> today's
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Decoder(nn.Module):
    """Latents as the transformer makes them to images: to the VAE's own scale and place, then its decoder."""

    def __init__(self, vae: Any, scale: float, shift: float = 0.0) -> None:
        super().__init__()
        self.vae = vae
        self.latent_scale = scale
        self.latent_shift = shift

    def forward(self, latent: Tensor) -> Tensor:
        latent = latent / self.latent_scale
        if self.latent_shift:
            latent = latent + self.latent_shift
        return self.vae.decode(latent, return_dict=False)[0]  # type: ignore[no-any-return]


def decoder_from_vae(folder: Path) -> tuple[Decoder, tuple[str, ...]]:
    """(decoder of a local `AutoencoderKL` folder, what was assumed).

    Raises CheckpointError naming the file, key or setting that does not fit.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no AutoencoderKL folder with a config.json, {_held(folder)}")
    entries = read_json(path, "the configuration of a VAE")
    if class_named(entries) != "AutoencoderKL":
        raise CheckpointError(f"{path} describes {class_named(entries)}, expected AutoencoderKL")
    config = config_of(path, entries, VAE_KEYS)
    if config.whole("out_channels") not in PICTURES:
        raise config.error("out_channels", "1 or 3, of gray or coloured pictures")
    scale = config.number("scaling_factor", above=0)
    shift = 0.0 if config.values["shift_factor"] is None else config.number("shift_factor")
    tensors, assumed = read_folder_weights(folder)
    vae = _vae_of(config)
    _load(vae, tensors, folder)
    about = tuple(f"of the VAE {line}" for line in assumed)
    return Decoder(vae, scale, shift).eval(), about


def _held(folder: Path) -> str:
    """Describe what lies in place of a VAE's folder, and say what to do."""
    if (folder / "vae" / "config.json").is_file():
        return f"it is a pipeline's; give the VAE in it: {folder / 'vae'}"
    if folder.is_dir():
        return f"it holds {found_there(folder)}"
    if folder.exists():
        return "it is a file; give the folder that it lies in"
    return f"there is no such folder{download_advice(str(folder))}"


def check_decodes(decoder: Decoder, folder: Path, channels: int, name: str) -> None:
    """Raise CheckpointError where a VAE's latents are not those of a model called `name`, which makes `channels`."""
    decoded = decoder.vae.config.latent_channels
    if decoded != channels:
        raise CheckpointError(
            f"{folder} decodes {decoded} channels, {name} makes {channels}; give the VAE that the model was trained "
            "with"
        )


def _vae_of(config: Config) -> Any:
    """diffusers' module, its weights not yet those of the folder."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as e:
        raise InputError("reading a VAE needs diffusers; install it with: pip install 'ditc[export]'") from e
    kind: Any = AutoencoderKL
    try:
        return kind(**{key: config.values[key] for key in ARCHITECTURE})
    except Exception as e:  # diffusers raises many kinds
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CheckpointError(f"{config.path} describes no AutoencoderKL that diffusers can build ({reason})") from e


def _load(vae: nn.Module, tensors: StateDict, folder: Path) -> None:
    """Fill what decodes. Raises CheckpointError naming keys that don't fit: none is left as it was initialized."""
    given = {_todays_name(name): tensor for name, tensor in tensors.items() if not name.startswith(ENCODING)}
    own = {name: parameter for name, parameter in vae.named_parameters() if not name.startswith(ENCODING)}
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"{folder} does not fit its config.json: {listed('missing', missing)}{listed('unexpected', extra)}"
            "expected the keys of AutoencoderKL"
        )
    for name, parameter in own.items():
        if given[name].shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(given[name].shape)}, its config.json says {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(given[name])
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"{folder}: {name} contains NaN or infinity; the VAE is not usable")


def _todays_name(name: str) -> str:
    match = re.fullmatch(rf"(.*\.attentions\.\d+)\.({'|'.join(ATTENTION_NAMES)})\.(\w+)", name)
    return name if match is None else f"{match[1]}.{ATTENTION_NAMES[match[2]]}.{match[3]}"
