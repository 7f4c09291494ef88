"""A local diffusers folder of PixArt-alpha or PixArt-Sigma: its transformer, scheduler, VAE and text encoder.

diffusers had one class for several kinds of transformers before 0.28, which PixArt-alpha's files name; a PixArt is the
one with ada_norm_single.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditc.errors import CheckpointError, InputError
from ditc.exporter.config_files import Config, Keys, class_named, config_of, read_json
from ditc.exporter.diffusers_folder import check_class, give_decoder, name_of, no_config, process_of, transformer_home
from ditc.exporter.folder_weights import read_folder_weights
from ditc.exporter.model_facts import ModelFacts, given_options
from ditc.exporter.pipeline_index import INDEX_FILE
from ditc.exporter.pixart import PixArt, place_tokens
from ditc.exporter.state_dicts import about_prefix, fitting_prefix, without_prefix
from ditc.exporter.weight_files import listed
from ditc.spec import SamplerSpec

__all__ = ["PIXART_KEYS", "SINGLE", "is_pixart", "pixart_from_diffusers"]

KIND, OLD_KIND = "PixArtTransformer2DModel", "Transformer2DModel"
SINGLE = "ada_norm_single"  # the norm_type of a PixArt
ANCHOR = "pos_embed.proj.weight"  # a key that every such model has
LARGEST_SIDE = 1024  # of the latent; beyond it positions alone fill a memory
TEXT_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # as the pipelines have it
DEFAULT_PIPELINE = "PixArtSigmaPipeline"
CLASS_OPTIONS = ("--classes", "--no-null")

ARCHITECTURE = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
}
UNUSED = {
    "dropout": "off where nothing is trained",
    "norm_num_groups": "a PixArt has no group norm",
    "upcast_attention": "attention is computed in float32 anyway",
    "num_embeds_ada_norm": "of norms with a table of timesteps",
}
PIXART_KEYS = {
    KIND: Keys(
        read=ARCHITECTURE,
        fixed={
            "norm_type": (SINGLE, SINGLE),
            "activation_fn": ("gelu-approximate", "gelu-approximate"),
            "norm_elementwise_affine": (False, False),
            "attention_type": ("default", "default"),
        },
        harmless=UNUSED,
    ),
    OLD_KIND: Keys(
        read={
            **ARCHITECTURE,
            "attention_head_dim": 88,
            "in_channels": None,
            "out_channels": None,
            "num_layers": 1,
            "cross_attention_dim": None,
            "attention_bias": False,
            "sample_size": None,
            "patch_size": None,
            "norm_eps": 1e-5,
        },
        fixed={
            "norm_type": ("layer_norm", SINGLE),
            "activation_fn": ("geglu", "gelu-approximate"),
            "norm_elementwise_affine": (True, False),
            "attention_type": ("default", "default"),
            "num_vector_embeds": (None, None),
            "only_cross_attention": (False, False),
            "double_self_attention": (False, False),
        },
        harmless={**UNUSED, "use_linear_projection": "of models without patches"},
    ),
}


def is_pixart(entries: Mapping[str, Any]) -> bool:
    """Is a transformer's configuration that of a PixArt?"""
    kind = class_named(entries)
    return kind == KIND or (kind == OLD_KIND and entries.get("norm_type") == SINGLE)


def pixart_from_diffusers(folder: Path, facts: ModelFacts | None = None) -> PixArt:
    """A PixArt from a pipeline folder (transformer/, scheduler/, vae/) or from a bare transformer folder.

    Without a VAE one of 1 or 3 channels makes pictures itself. `facts` state the noise process where the folder has no
    scheduler, and how many tokens a text has. Raises CheckpointError naming the file, key or setting that does not fit,
    InputError for a fact that is none of a folder's.
    """
    home, facts = transformer_home(folder), facts or ModelFacts()
    config = read_pixart_config(home, folder)
    if given := [option for option in given_options(facts) if option in CLASS_OPTIONS]:
        raise InputError(f"{config.path} is of a model that is asked for with a text; leave out {' and '.join(given)}")
    tensors, about_weights = read_folder_weights(home)
    prefix = fitting_prefix(tensors, ANCHOR) or ""
    transformer = _transformer(config, without_prefix(tensors, prefix), home)
    tokens, about_tokens = _text_tokens(folder, facts)
    model = PixArt(transformer, name=name_of(folder), text_tokens=tokens)
    model.diffusion, model.sampler, about_process = process_of(folder, facts, learned_sigma=False, tokens=model.tokens)
    if not (folder / "scheduler").is_dir() and model.diffusion.prediction != "flow":
        model.sampler = SamplerSpec(name="dpm++2m")  # as the pipelines have it
    model.assumptions = (*about_weights, *about_prefix(prefix), *about_process, *about_tokens)
    give_decoder(model, folder)
    model.text_folder = folder
    return model.eval()


def _text_tokens(folder: Path, facts: ModelFacts) -> tuple[int, tuple[str, ...]]:
    """(the length of texts: as stated, or that to which the folder's pipeline fills them up; what was assumed)."""
    path = folder / INDEX_FILE
    kind = class_named(read_json(path, "the index of a pipeline")) if path.is_file() else None
    if facts.text_tokens is not None or kind in TEXT_TOKENS:
        return facts.text_tokens or TEXT_TOKENS[str(kind)], ()
    tokens = TEXT_TOKENS[DEFAULT_PIPELINE]
    return tokens, (f"texts of {tokens} tokens, as {DEFAULT_PIPELINE} has them (--text-tokens)",)


def read_pixart_config(home: Path, folder: Path) -> Config:
    """The transformer's configuration. Raises CheckpointError for one that a PixArt can't have."""
    path = home / "config.json"
    if not path.is_file():
        raise CheckpointError(no_config(path, folder))
    entries = read_json(path, "a diffusers folder with a PixArt transformer")
    kind = class_named(entries)
    if kind not in PIXART_KEYS:
        raise CheckpointError(f"{path} describes {kind}, expected {KIND}")
    check_class(folder, "transformer", *PIXART_KEYS)
    # a released file that today's diffusers read and saved again has the new class and keys of the old one, ignored
    config = config_of(path, entries, PIXART_KEYS[kind], PIXART_KEYS[OLD_KIND].known)
    _check_agrees(config)
    return config


def _check_agrees(config: Config) -> None:
    """Raise CheckpointError where a file of the old class leaves out what no weight tells, and the new one differs."""
    if config.kind == OLD_KIND and "norm_eps" in config.absent:
        raise config.error("norm_eps", f"it in the file: today's {KIND} has another default")


def _transformer(config: Config, tensors: Mapping[str, Tensor], home: Path) -> Any:
    """diffusers' module with the weights of a folder. Raises CheckpointError naming what does not fit."""
    settings = _settings(config, len(tensors))
    _check_width(settings, tensors, home)
    try:
        from diffusers import PixArtTransformer2DModel
    except ImportError as e:
        raise InputError("reading a PixArt needs diffusers; install it with: pip install 'ditc[export]'") from e
    kind: Any = PixArtTransformer2DModel
    with torch.device("meta"):  # its weights come from the files, and need no memory twice
        transformer = kind(**settings)
    _check_fits(dict(transformer.named_parameters()), tensors, home)
    own = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    transformer.load_state_dict(own, assign=True)
    place_tokens(transformer.pos_embed, transformer.pos_embed.height, transformer.pos_embed.width)  # in no file
    return transformer


def _settings(config: Config, keys: int) -> dict[str, Any]:
    """The arguments of diffusers' class. Raises CheckpointError for a value that no PixArt has."""
    heads, size = config.whole("num_attention_heads"), config.whole("attention_head_dim")
    channels, side = config.whole("in_channels"), config.whole("sample_size", most=LARGEST_SIDE)
    patch = config.whole("patch_size")
    outputs = channels if config.values["out_channels"] is None else config.whole("out_channels")
    if outputs not in (channels, 2 * channels):
        raise config.error("out_channels", f"{channels} or {2 * channels}")
    if side % patch:
        raise config.error("sample_size", f"a multiple of the patch_size {patch}")
    if config.whole("cross_attention_dim") != heads * size:
        raise config.error("cross_attention_dim", f"{heads * size}, num_attention_heads times attention_head_dim")
    sized = config.values["use_additional_conditions"] is not None and config.flag("use_additional_conditions")
    sized = sized or (config.values["use_additional_conditions"] is None and side == 128)
    if heads * size % (12 if sized else 4):
        raise config.error("attention_head_dim", f"a width that {12 if sized else 4} divides, found {heads * size}")
    scale = None if config.values["interpolation_scale"] is None else config.number("interpolation_scale", above=0)
    return {
        "num_attention_heads": heads,
        "attention_head_dim": size,
        "in_channels": channels,
        "out_channels": outputs,
        "num_layers": config.whole("num_layers", most=keys),  # every block has keys: one more is not built to be missed
        "cross_attention_dim": heads * size,
        "attention_bias": config.flag("attention_bias"),
        "sample_size": side,
        "patch_size": patch,
        "norm_eps": config.number("norm_eps", above=0),
        "interpolation_scale": scale,
        "use_additional_conditions": sized,
        "caption_channels": config.whole("caption_channels"),
    }


def _check_width(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], home: Path) -> None:
    """Raise CheckpointError where the weights are of another width: one of the file's might fit no memory."""
    width = settings["cross_attention_dim"]
    expected = (width, settings["in_channels"], settings["patch_size"], settings["patch_size"])
    shape = tuple(tensors[ANCHOR].shape) if ANCHOR in tensors else None
    if shape != expected:
        problem = f"missing {ANCHOR}" if shape is None else f"{ANCHOR} has shape {shape}"
        raise CheckpointError(
            f"{home} does not fit its config.json: {problem}, expected {expected} from num_attention_heads, "
            "attention_head_dim, in_channels and patch_size"
        )


def _check_fits(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], home: Path) -> None:
    """Raise CheckpointError naming keys that are missing or left over, of another shape, or no numbers."""
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"{home} does not fit its config.json: {listed('missing', missing)}{listed('unexpected', extra)}"
            f"expected the keys of {KIND}"
        )
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{home} does not fit its config.json: {name} has shape {tuple(tensors[name].shape)}, expected "
                f"{tuple(parameter.shape)}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"{home}: {name} contains NaN or infinity; the checkpoint is not usable")
