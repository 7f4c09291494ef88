"""A local diffusers folder: `DiTTransformer2DModel`, its scheduler's configuration, `AutoencoderKL` when present."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ditc.errors import CheckpointError, InputError
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.weights import listed, load_weights, read_tensors
from ditc.spec import DiffusionSpec, SamplerSpec

__all__ = ["decoder_from_vae", "diffusers_from_dit", "dit_from_diffusers"]

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

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
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "squared-cosine"}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
VARIANCES = {
    "learned_range": "learned",
    "fixed_small": "fixed-small",
    "fixed_small_log": "fixed-small",
    "fixed_large": "fixed-large",
    "fixed_large_log": "fixed-large",
}


def dit_from_diffusers(folder: Path) -> DiT:
    """A DiT from a pipeline folder (transformer/, scheduler/, vae/) or from a bare transformer folder.

    Guidance applies to all latent channels, as diffusers' own pipeline does it. Raises CheckpointError naming the
    file, key or setting that does not fit.
    """
    home = folder / "transformer" if (folder / "transformer").is_dir() else folder
    settings = _read_json(home / "config.json")
    kind = settings.get("_class_name")
    if kind != "DiTTransformer2DModel":
        raise CheckpointError(f"{home / 'config.json'} describes {kind}, expected DiTTransformer2DModel")
    tensors = _read_weights(home)
    config = _config(settings, tensors, home)
    model = DiT(config, name=folder.resolve().name)
    load_weights(model, _renamed(tensors, model, home), home)
    model.diffusion, model.sampler = _process(folder / "scheduler" / "scheduler_config.json", config)
    if (folder / "vae").is_dir():
        model.decoder, model.latent_scale = decoder_from_vae(folder / "vae")
    return model.eval()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise CheckpointError(f"no such file: {path}; expected a diffusers folder with a DiT transformer") from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} is not readable JSON ({e})") from e
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def _read_weights(home: Path) -> dict[str, Tensor]:
    for name in WEIGHT_FILES:
        if (home / name).is_file():
            return read_tensors(home / name)
        if (home / f"{name}.index.json").is_file():
            weight_map = _read_json(home / f"{name}.index.json").get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{home / name}.index.json has no weight_map; copy the folder again")
            shards = sorted(set(weight_map.values()))
            return {key: value for shard in shards for key, value in read_tensors(home / shard).items()}
    raise CheckpointError(f"no weights in {home}; expected {' or '.join(WEIGHT_FILES)}, or its .index.json")


def _whole_number(settings: dict[str, Any], key: str, default: int, home: Path) -> int:
    found = settings.get(key, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"{home / 'config.json'}: {key} is {found!r}, expected a whole number above 0")
    return found


def _config(settings: dict[str, Any], tensors: dict[str, Tensor], home: Path) -> DiTConfig:
    if settings.get("activation_fn", "gelu-approximate") != "gelu-approximate":
        raise CheckpointError(f"{home}: activation_fn is {settings['activation_fn']!r}, expected 'gelu-approximate'")
    if settings.get("norm_elementwise_affine", False):
        raise CheckpointError(f"{home}: norm_elementwise_affine is true, expected false as in every released DiT")
    heads = _whole_number(settings, "num_attention_heads", 16, home)
    depth = _whole_number(settings, "num_layers", 28, home)
    channels = _whole_number(settings, "in_channels", 4, home)
    outputs = channels if settings.get("out_channels") is None else _whole_number(settings, "out_channels", 4, home)
    if outputs not in (channels, 2 * channels):
        raise CheckpointError(f"{home}: out_channels is {outputs}, expected {channels} or {2 * channels}")
    return DiTConfig(
        input_size=_whole_number(settings, "sample_size", 32, home),
        patch_size=_whole_number(settings, "patch_size", 2, home),
        in_channels=channels,
        hidden_size=heads * _whole_number(settings, "attention_head_dim", 72, home),
        depth=depth,
        num_heads=heads,
        num_classes=_whole_number(settings, "num_embeds_ada_norm", 1000, home),
        learn_sigma=outputs == 2 * channels,
        qkv_bias=settings.get("attention_bias", True),
        freq_shift=1,
        norm2_eps=settings.get("norm_eps", 1e-5),
        embedder_per_block=not _embedders_equal(tensors, depth),
    )


def _embedders_equal(tensors: dict[str, Tensor], depth: int) -> bool:
    """Do all blocks hold copies of one embedder, as conversions of the original release do?"""
    names = [name.split(".", 2)[2] for name in tensors if name.startswith("transformer_blocks.0.norm1.emb.")]
    first = {name: tensors[f"transformer_blocks.0.{name}"] for name in names}
    return all(
        torch.equal(tensors[key], value)
        for block in range(1, depth)
        for name, value in first.items()
        if (key := f"transformer_blocks.{block}.{name}") in tensors
    )


def _renamed(tensors: dict[str, Tensor], model: DiT, home: Path) -> dict[str, Tensor]:
    """The state dict under the names of the original release.

    Raises CheckpointError naming, as diffusers does, the keys that are missing or that no DiT has.
    """
    sources = {name: _diffusers_names(name) for name, _ in model.named_parameters() if name != "pos_embed"}
    wanted = {key for keys in sources.values() for key in keys}
    known = wanted | {"pos_embed.pos_embed"} | _copied_embedders(tensors, model.config)
    missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - known)
    if missing or extra:
        raise CheckpointError(
            f"{home} does not fit its config.json: {listed('missing', missing)}{listed('unexpected', extra)}"
            "expected the keys of DiTTransformer2DModel"
        )
    fixed = {"pos_embed": tensors["pos_embed.pos_embed"]} if "pos_embed.pos_embed" in tensors else {}
    return fixed | {name: _joined([tensors[key] for key in keys], keys, home) for name, keys in sources.items()}


def _diffusers_names(name: str) -> list[str]:
    """Where one of our parameters lies in a diffusers state dict: one key, or those of q, k and v to join."""
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
        return [f"transformer_blocks.{match[1]}.attn1.to_{part}.{match[2]}" for part in "qkv"]
    module, leaf = name.rsplit(".", 1)
    if module in OUTER_NAMES:
        return [f"{OUTER_NAMES[module]}.{leaf}"]
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return [f"transformer_blocks.{match[1]}.{BLOCK_NAMES[match[2]]}.{leaf}"]
    return [f"transformer_blocks.0.{BLOCK_NAMES[module]}.{leaf}"]  # the embedder that all blocks share


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
            keys = _diffusers_names(name)
            for key, part in zip(keys, parameter.detach().chunk(len(keys)), strict=True):
                if not torch.equal(state.setdefault(key, part), part):
                    raise InputError(f"{model.name} is not diffusers' DiT: its final layer has an embedder of its own")
    embedder = "transformer_blocks.0.norm1.emb."
    shared = {key: value for key, value in state.items() if key.startswith(embedder)}
    for block in range(1, model.config.depth):
        for key, value in shared.items():
            state.setdefault(key.replace("blocks.0", f"blocks.{block}", 1), value)
    return state


def _copied_embedders(tensors: dict[str, Tensor], config: DiTConfig) -> set[str]:
    """Keys of the equal copies that later blocks hold of the one embedder that is kept."""
    if config.embedder_per_block:
        return set()
    numbers = range(config.depth)
    return {key for key in tensors for i in numbers if key.startswith(f"transformer_blocks.{i}.norm1.emb.")}


def _joined(parts: list[Tensor], keys: list[str], home: Path) -> Tensor:
    if len({tuple(part.shape) for part in parts}) > 1:
        found = ", ".join(f"{key} {tuple(part.shape)}" for key, part in zip(keys, parts, strict=True))
        raise CheckpointError(f"{home}: q, k and v must have one shape, found {found}")
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _process(path: Path, config: DiTConfig) -> tuple[DiffusionSpec, SamplerSpec]:
    """The diffusion process and default sampler of a scheduler's configuration; the release's where there is none."""
    if not path.is_file():
        return DiffusionSpec(learned_sigma=config.learn_sigma), SamplerSpec(spacing="leading")
    found = _read_json(path)

    if str(found.get("_class_name", "")).startswith("FlowMatch"):
        raise CheckpointError(f"{path} is a {found['_class_name']}; ditc knows noise-predicting diffusion, not flows")

    def pick(table: dict[str, str], key: str, default: str) -> str:
        value = found.get(key) or default
        if value not in table:
            raise CheckpointError(f"{path}: {key} is {value!r}, expected one of: {', '.join(sorted(table))}")
        return table[value]

    if found.get("rescale_betas_zero_snr") or found.get("trained_betas") is not None or found.get("thresholding"):
        raise CheckpointError(
            f"{path} rescales or replaces the betas, or thresholds; ditc knows the plain schedules only"
        )
    try:
        return _specs(found, pick, config)
    except ValidationError as e:
        first = e.errors()[0]
        raise CheckpointError(f"{path}: {first['loc'][0]}: {first['msg']}, found {first['input']!r}") from e


def _specs(
    found: dict[str, Any], pick: Callable[[dict[str, str], str, str], str], config: DiTConfig
) -> tuple[DiffusionSpec, SamplerSpec]:
    diffusion = DiffusionSpec(
        train_steps=found.get("num_train_timesteps", 1000),
        beta_schedule=pick(BETA_SCHEDULES, "beta_schedule", "linear"),  # type: ignore[arg-type]
        beta_start=found.get("beta_start", 1e-4),
        beta_end=found.get("beta_end", 2e-2),
        prediction=pick(PREDICTIONS, "prediction_type", "epsilon"),  # type: ignore[arg-type]
        learned_sigma=config.learn_sigma,
    )
    ddpm = str(found.get("_class_name", "")).startswith("DDPM")
    sampler = SamplerSpec(
        name="ddpm" if ddpm else "ddim",
        spacing=pick({n: n for n in ("linspace", "leading", "trailing")}, "timestep_spacing", "leading"),  # type: ignore[arg-type]
        offset=found.get("steps_offset", 0) if found.get("timestep_spacing", "leading") == "leading" else 0,
        variance=pick(VARIANCES, "variance_type", "fixed_small"),  # type: ignore[arg-type]
        final_alpha_one=ddpm or found.get("set_alpha_to_one", True),
        clip=found.get("clip_sample_range", 1.0) if found.get("clip_sample", False) else None,
    )
    return diffusion, sampler


class Decoder(nn.Module):
    """Latents as the transformer makes them to images: unscale, then the VAE's decoder."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.latent_scale = float(vae.config.scaling_factor)

    def forward(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent / self.latent_scale, return_dict=False)[0]  # type: ignore[no-any-return]


def decoder_from_vae(folder: Path) -> tuple[Decoder, float]:
    """(decoder module, scale of the latents) of a local `AutoencoderKL` folder."""
    kind = _read_json(folder / "config.json").get("_class_name")
    if kind != "AutoencoderKL":
        raise CheckpointError(f"{folder / 'config.json'} describes {kind}, expected AutoencoderKL")
    try:
        from diffusers import AutoencoderKL
    except ImportError as e:
        raise InputError("reading a VAE needs diffusers; install it with: pip install 'ditc[export]'") from e
    try:
        kind_of_vae: Any = AutoencoderKL
        vae = kind_of_vae.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except Exception as e:  # diffusers raises many kinds
        raise CheckpointError(f"{folder} is not a readable AutoencoderKL ({str(e).splitlines()[0]})") from e
    decoder = Decoder(vae).eval()
    return decoder, decoder.latent_scale
