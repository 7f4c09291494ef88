"""A local diffusers folder: its DiT, its scheduler's configuration, its `AutoencoderKL` where there is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditc.errors import CheckpointError, InputError
from ditc.exporter.config_files import Config, Keys, class_named, config_of, read_json
from ditc.exporter.diffusers_keys import diffusers_names
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.folder_weights import found_there, read_folder_weights
from ditc.exporter.model_facts import ModelFacts, check_of_dit, given_options
from ditc.exporter.original_checkpoint import process_from_facts
from ditc.exporter.pipeline_index import INDEX_FILE, class_in_index
from ditc.exporter.schedulers import process_from_scheduler
from ditc.exporter.sit import FLOW_SAMPLER
from ditc.exporter.state_dicts import about_prefix, fitting_prefix, without_prefix
from ditc.exporter.training_args import TrainingArgs
from ditc.exporter.vae import check_decodes, decoder_from_vae
from ditc.exporter.weight_files import StateDict, listed, load_weights
from ditc.spec import DiffusionSpec, SamplerSpec

__all__ = [
    "TRANSFORMER_KEYS",
    "check_class",
    "dit_from_diffusers",
    "give_decoder",
    "name_of",
    "no_config",
    "process_of",
    "transformer_home",
]

ANCHOR = "pos_embed.proj.weight"  # a key that every such model has
CLASS_OPTIONS = ("--classes", "--no-null")
PROCESS_OPTIONS = ("--prediction", "--flow-times", "--beta-schedule", "--train-steps")
LARGEST_SIDE = 1024  # of the latent; beyond it positions alone fill a memory

UNUSED = {
    "dropout": "off where nothing is trained",
    "norm_num_groups": "a DiT has no group norm",
    "upcast_attention": "attention is computed in float32 anyway",
}
# class -> its keys. Before 0.28 diffusers had one class for several kinds of transformers; a DiT is the one with
# ada_norm_zero and none of the others' parts. Its defaults are no DiT's, so what it leaves out is mostly refused.
TRANSFORMER_KEYS = {
    "DiTTransformer2DModel": Keys(
        read={
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": None,
            "num_layers": 28,
            "attention_bias": True,
            "sample_size": 32,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_eps": 1e-5,
        },
        fixed={
            "norm_type": ("ada_norm_zero", "ada_norm_zero"),
            "activation_fn": ("gelu-approximate", "gelu-approximate"),
            "norm_elementwise_affine": (False, False),
        },
        harmless=UNUSED,
    ),
    "Transformer2DModel": Keys(
        read={
            "num_attention_heads": 16,
            "attention_head_dim": 88,
            "in_channels": None,
            "out_channels": None,
            "num_layers": 1,
            "attention_bias": False,
            "sample_size": None,
            "patch_size": None,
            "num_embeds_ada_norm": None,
            "norm_eps": 1e-5,
        },
        fixed={
            "norm_type": ("layer_norm", "ada_norm_zero"),
            "activation_fn": ("geglu", "gelu-approximate"),
            "norm_elementwise_affine": (True, False),
            "cross_attention_dim": (None, None),
            "num_vector_embeds": (None, None),
            "only_cross_attention": (False, False),
            "double_self_attention": (False, False),
            "attention_type": ("default", "default"),
            "caption_channels": (None, None),
            "interpolation_scale": (None, None),
        },
        harmless={
            **UNUSED,
            "use_linear_projection": "of models without patches",
            "use_additional_conditions": "of ada_norm_single",
        },
    ),
}


def dit_from_diffusers(folder: Path, facts: ModelFacts | None = None) -> DiT:
    """A DiT from a pipeline folder (transformer/, scheduler/, vae/) or from a bare transformer folder.

    Guidance applies to all latent channels, as diffusers' own pipeline does it. `facts` state the noise process where
    the folder has no scheduler; one that its files state is refused. Raises CheckpointError naming the file, key or
    setting that does not fit, InputError for a fact that is none of a folder's.
    """
    home = transformer_home(folder)
    facts = facts or ModelFacts()
    config_file = read_config(home, folder)
    check_of_dit(facts, config_file.path)
    _check_no_class_facts(facts, config_file)
    tensors, about_weights = read_folder_weights(home)
    prefix = fitting_prefix(tensors, ANCHOR) or ""
    tensors = without_prefix(tensors, prefix)
    config = _config(config_file, tensors, home)
    model = DiT(config, name=name_of(folder))
    load_weights(model, _renamed(tensors, model, home), home)
    model.diffusion, model.sampler, about_process = process_of(
        folder, facts, learned_sigma=config.learn_sigma, tokens=config.tokens
    )
    model.assumptions = (*about_weights, *about_prefix(prefix), *about_process)
    give_decoder(model, folder)
    return model.eval()


def transformer_home(folder: Path) -> Path:
    """Return where the transformer of a pipeline's folder lies, or the folder itself, of a bare transformer."""
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def give_decoder(model: Any, folder: Path) -> None:
    """Give a model the decoder of its pipeline's VAE, where there is one. Raises CheckpointError for one of another."""
    if not (folder / "vae").is_dir():
        return
    check_class(folder, "vae", "AutoencoderKL")
    model.decoder, about_vae = decoder_from_vae(folder / "vae")
    check_decodes(model.decoder, folder / "vae", model.config.in_channels, model.name)
    model.latent_scale, model.latent_shift = model.decoder.latent_scale, model.decoder.latent_shift
    model.assumptions += about_vae


def read_config(home: Path, folder: Path) -> Config:
    """The transformer's configuration, of one of the two classes that a DiT's is. Raises CheckpointError."""
    path = home / "config.json"
    if not path.is_file():
        raise CheckpointError(no_config(path, folder))
    entries = read_json(path, "a diffusers folder with a DiT transformer")
    kind = class_named(entries)
    if kind not in TRANSFORMER_KEYS:
        raise CheckpointError(f"{path} describes {kind}, expected DiTTransformer2DModel")
    check_class(folder, "transformer", *TRANSFORMER_KEYS)
    # a released file that today's diffusers read and saved again has the new class and keys of the old one, ignored
    return config_of(path, entries, TRANSFORMER_KEYS[kind], TRANSFORMER_KEYS["Transformer2DModel"].known)


def check_class(folder: Path, part: str, *known: str) -> None:
    """Raise CheckpointError where a pipeline loads a part with a class that is not known here."""
    kind = class_in_index(folder, part)
    if kind is not None and kind not in known:
        raise CheckpointError(f"{folder / INDEX_FILE} names {kind} as the {part}, expected {known[0]}")


def name_of(folder: Path) -> str:
    """A model's name: its folder's, and in a cache of the hub, where that is a hash, the repository's."""
    path = folder.resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--")[-1]
    return path.name


def _check_no_class_facts(facts: ModelFacts, config: Config) -> None:
    """Raise InputError for facts about classes: diffusers' models state their number, and always have a null class."""
    given = [option for option in given_options(facts) if option in CLASS_OPTIONS]
    if given:
        raise InputError(
            f"{config.path} states the classes, num_embeds_ada_norm {config.values['num_embeds_ada_norm']}, and a null "
            f"class comes with them; leave out {' and '.join(given)}"
        )


def no_config(path: Path, folder: Path) -> str:
    """Return the message about a folder without a transformer's configuration: its content, and where to look."""
    snapshots = sorted((folder / "snapshots").glob("*/"))
    if snapshots:
        current = [snapshot for snapshot in snapshots if snapshot.name == _current_snapshot(folder)]
        return f"{folder} is a cache of the hub, not a model; give the folder in it: {(current or snapshots)[-1]}"
    return (
        f"no such file: {path}; expected a diffusers folder with a DiT transformer, {path.parent} holds "
        f"{found_there(path.parent)}"
    )


def _current_snapshot(cache: Path) -> str | None:
    """The hash that a cache of the hub has as its main revision; of several snapshots the others are older."""
    path = cache / "refs" / "main"
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None


def _config(settings: Config, tensors: Mapping[str, Tensor], home: Path) -> DiTConfig:
    heads, channels = settings.whole("num_attention_heads"), settings.whole("in_channels")
    depth = settings.whole("num_layers", most=len(tensors))  # every block has keys: one more is not built to be missed
    outputs = channels if settings.values["out_channels"] is None else settings.whole("out_channels")
    if outputs not in (channels, 2 * channels):
        raise settings.error("out_channels", f"{channels} or {2 * channels}")
    size, patch = settings.whole("sample_size", most=LARGEST_SIDE), settings.whole("patch_size")
    if size % patch:
        raise settings.error("sample_size", f"a multiple of the patch_size {patch}")
    config = DiTConfig(
        input_size=size,
        patch_size=patch,
        in_channels=channels,
        hidden_size=heads * settings.whole("attention_head_dim"),
        depth=depth,
        num_heads=heads,
        num_classes=settings.whole("num_embeds_ada_norm"),
        learn_sigma=outputs == 2 * channels,
        qkv_bias=settings.flag("attention_bias"),
        freq_shift=1,
        norm2_eps=settings.number("norm_eps", above=0),
        embedder_per_block=not _embedders_equal(tensors, depth),
    )
    _check_size(config, tensors, home)
    return config


def _check_size(config: DiTConfig, tensors: Mapping[str, Tensor], home: Path) -> None:
    """Raise CheckpointError where the weights are of another width: a model of that of the file might fit no memory."""
    if ANCHOR not in tensors:
        raise CheckpointError(
            f"{home} does not fit its config.json: missing {ANCHOR}; expected the keys of DiTTransformer2DModel"
        )
    shape = tuple(tensors[ANCHOR].shape)
    expected = (config.hidden_size, config.in_channels, config.patch_size, config.patch_size)
    if shape != expected:
        raise CheckpointError(
            f"{home} does not fit its config.json: {ANCHOR} has shape {shape}, expected {expected} from "
            "num_attention_heads, attention_head_dim, in_channels and patch_size"
        )


def _embedders_equal(tensors: Mapping[str, Tensor], depth: int) -> bool:
    """Do all blocks hold copies of one embedder, as conversions of the original release do?"""
    names = [name.split(".", 2)[2] for name in tensors if name.startswith("transformer_blocks.0.norm1.emb.")]
    first = {name: tensors[f"transformer_blocks.0.{name}"] for name in names}
    return all(
        torch.equal(tensors[key], value)
        for block in range(1, depth)
        for name, value in first.items()
        if (key := f"transformer_blocks.{block}.{name}") in tensors
    )


def _renamed(tensors: Mapping[str, Tensor], model: DiT, home: Path) -> StateDict:
    """The state dict under the names of the original release.

    Raises CheckpointError naming, as diffusers does, the keys that are missing or that no DiT has.
    """
    sources = {name: diffusers_names(name) for name, _ in model.named_parameters() if name != "pos_embed"}
    wanted = {key for keys in sources.values() for key in keys}
    known = wanted | {"pos_embed.pos_embed"} | _copied_embedders(tensors, model.config)
    missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - known)
    if missing or extra:
        raise CheckpointError(
            f"{home} does not fit its config.json: {listed('missing', missing)}{listed('unexpected', extra)}"
            "expected the keys of DiTTransformer2DModel"
        )
    if "pos_embed.pos_embed" in tensors:
        sources["pos_embed"] = ["pos_embed.pos_embed"]
    for name, keys in sources.items():
        rows, *rest = model.get_parameter(name).shape
        for key in keys:
            _check_shape(tensors[key], (rows // len(keys), *rest), key, home)
    return {name: _joined([tensors[key] for key in keys]) for name, keys in sources.items()}


# keys of the weights -> those of config.json that say their shapes
SHAPED_BY = (
    (r"pos_embed\.pos_embed", "sample_size and patch_size"),
    (r"proj_out_2\..*", "out_channels, in_channels and patch_size"),
    (r".*\.class_embedder\..*", "num_embeds_ada_norm"),
    (r".*", "num_attention_heads and attention_head_dim"),
)


def _check_shape(tensor: Tensor, expected: tuple[int, ...], key: str, home: Path) -> None:
    if tuple(tensor.shape) != expected:
        settings = next(names for pattern, names in SHAPED_BY if re.fullmatch(pattern, key))
        raise CheckpointError(
            f"{home} does not fit its config.json: {key} has shape {tuple(tensor.shape)}, expected {expected} from "
            f"{settings}"
        )


def _copied_embedders(tensors: Mapping[str, Tensor], config: DiTConfig) -> set[str]:
    """Keys of the equal copies that later blocks hold of the one embedder that is kept."""
    if config.embedder_per_block:
        return set()
    numbers = range(config.depth)
    return {key for key in tensors for i in numbers if key.startswith(f"transformer_blocks.{i}.norm1.emb.")}


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def process_of(
    folder: Path, facts: ModelFacts, *, learned_sigma: bool, tokens: int
) -> tuple[DiffusionSpec, SamplerSpec, tuple[str, ...]]:
    """(noise process, default sampler, what was assumed): the scheduler's, or as stated, or the release's.

    `tokens` of an image are what some schedulers shift their noise levels by.
    """
    given = [option for option in given_options(facts) if option in PROCESS_OPTIONS]
    home = folder / "scheduler"
    path = home / "scheduler_config.json"
    if home.is_dir():
        if given:
            raise InputError(f"{path} states the noise process; leave out {' and '.join(given)}")
        loaded_as = class_in_index(folder, "scheduler")
        return process_from_scheduler(path, learned_sigma=learned_sigma, loaded_as=loaded_as, tokens=tokens)
    if facts.flow_times is not None:
        raise InputError(
            f"a folder's model takes timesteps of 1000 at the noise to 0 at the data, found {facts.flow_times}; leave "
            "out --flow-times"
        )
    diffusion, assumed = process_from_facts(facts, TrainingArgs(), learned_sigma=learned_sigma)
    if diffusion.prediction == "flow":
        return diffusion, FLOW_SAMPLER, ()
    beside = folder.parent / "scheduler" / "scheduler_config.json"
    if assumed and beside.is_file():
        assumed = tuple(f"{line}; {folder.parent} has a scheduler that states it" for line in assumed)
    return diffusion, SamplerSpec(spacing="leading"), assumed
