"""From what a user names to a model: a built-in one, a checkpoint, a diffusers folder, a size, or their own code."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from ditc.errors import CheckpointError, InputError
from ditc.exporter.config_files import class_named, read_json
from ditc.exporter.diffusers_folder import TRANSFORMER_KEYS, dit_from_diffusers, transformer_home
from ditc.exporter.dit import DIT_PATCHES, DIT_PIXELS, DIT_SIZES, DiT, DiTConfig, config_for_size
from ditc.exporter.emoji import EMOJI, builtin_emoji
from ditc.exporter.loras import with_loras
from ditc.exporter.model_facts import FACT_OPTIONS, ModelFacts, given_options
from ditc.exporter.noise_check import doubts_about
from ditc.exporter.original_checkpoint import dit_from_checkpoint
from ditc.exporter.pixart_folder import PIXART_KEYS, is_pixart, pixart_from_diffusers
from ditc.exporter.protocol import check_decomposition
from ditc.exporter.vae import check_decodes, decoder_from_vae
from ditc.loras import Lora
from ditc.spec import SamplerSpec

__all__ = ["builtin_digits", "load_model", "random_dit", "random_model", "with_vae"]

SAID_IN_SCHEDULER = "prediction_type in scheduler_config.json"
# what its card says (exporter/digits.md)
DIGITS = ModelFacts(
    classes=10,
    null_class=True,
    prediction="epsilon",
    beta_schedule="linear",
    beta_range=(1e-4, 2e-2),
    train_steps=1000,
)


def load_model(
    name: str,
    *,
    num_heads: int | None = None,
    vae: Path | None = None,
    facts: ModelFacts | None = None,
    loras: Sequence[Lora] = (),
) -> Any:
    """The model that `name` stands for, ready to export (fits `exporter.protocol.TrajectoryModel`).

    `name` is "digits" or "emoji", a .pt or .safetensors file with original DiT keys, a diffusers folder,
    "random:SIZE" or "random:SIZE:SEED" (see `random_model`), or "module:function" for a function of the user's that
    returns a TrajectoryModel. `num_heads` and `facts` state what a file leaves open; `vae` is a local `AutoencoderKL`
    folder whose decoder the model gets; `loras` are merged into its weights. Raises CheckpointError where something
    can't be read, and InputError for an option that says what the model says itself.
    """
    stated = Stated(num_heads, vae, facts or ModelFacts(), tuple(loras))
    path = Path(name)
    if name in BUILT_IN:
        _check_useful(stated, name, "--heads", "--vae", *FACT_OPTIONS)
        return with_loras(BUILT_IN[name](), stated.loras)
    if random := re.fullmatch(r"random:([\w-]+)(?::(\d+))?", name):
        _check_useful(stated, name, "--heads", *FACT_OPTIONS)
        return with_vae(with_loras(random_model(random[1], seed=int(random[2] or 0)), stated.loras), vae)
    if path.is_dir():
        return _from_folder(path, stated)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        _check_useful(stated, name, "--heads", *FACT_OPTIONS)
        return with_vae(with_loras(_users_own(name), stated.loras), vae)
    model = with_loras(dit_from_checkpoint(path, num_heads=num_heads, facts=facts), stated.loras)
    flow = model.diffusion.prediction == "flow"
    model.doubts += doubts_about(model, "--prediction, --flow-times" if flow else "--prediction")
    return with_vae(model, vae)


@dataclass(frozen=True)
class Stated:
    """The options about a model."""

    num_heads: int | None
    vae: Path | None
    facts: ModelFacts
    loras: tuple[Lora, ...] = ()

    @property
    def options(self) -> list[str]:
        """Those that were given, as the command line has them."""
        others = (("--heads", self.num_heads), ("--vae", self.vae))
        return [option for option, value in others if value is not None] + given_options(self.facts)


def _check_useful(stated: Stated, name: str, *known: str) -> None:
    """Raise InputError for options about what a model is `known` to say itself: they would change nothing."""
    useless = [option for option in stated.options if option in known]
    if useless:
        reason = "makes images itself" if useless == ["--vae"] else "states its heads, classes and process itself"
        raise InputError(f"{name} {reason}; leave out {' and '.join(useless)}")


def _from_folder(path: Path, stated: Stated) -> Any:
    if stated.num_heads is not None:
        raise InputError(f"the config.json in {path} states num_attention_heads; leave out --heads")
    model = with_vae(with_loras(_reader_of(path)(path, stated.facts), stated.loras), stated.vae)
    if stated.facts.size is not None:  # in pixels, which a decoder makes of latents
        model.take_size(*stated.facts.size)
    said_in = "scheduler_config.json" if model.diffusion.prediction == "flow" else SAID_IN_SCHEDULER
    model.doubts += doubts_about(model, said_in if (path / "scheduler").is_dir() else "--prediction")
    return model


def _reader_of(folder: Path) -> Callable[[Path, ModelFacts], Any]:
    """Return the reader of a diffusers folder's family; a DiT's says what is wrong with a folder that is of none."""
    config = transformer_home(folder) / "config.json"
    if not config.is_file():
        return dit_from_diffusers
    entries = read_json(config, "a diffusers folder with a transformer")
    if is_pixart(entries):
        return pixart_from_diffusers
    kind, known = class_named(entries), {*TRANSFORMER_KEYS, *PIXART_KEYS}
    if kind not in known:
        raise CheckpointError(f"{config} describes {kind}, expected one of {', '.join(sorted(known))}")
    return dit_from_diffusers


def with_vae(model: Any, folder: Path | None) -> Any:
    """The model with the decoder of a local `AutoencoderKL`. Raises CheckpointError where the two don't fit."""
    if folder is None:
        return model
    if model.decoder is not None:
        raise InputError(f"{model.spec.name} has a decoder of its own; leave out --vae")
    decoder, assumed = decoder_from_vae(folder)
    check_decodes(decoder, folder, model.spec.in_channels, model.spec.name)
    with suppress(AttributeError):
        model.decoder = decoder
    if model.decoder is not decoder:  # a property of a class of the user's
        raise InputError(f"{model.spec.name} can't be given a decoder; leave out --vae")
    model.latent_scale, model.latent_shift = decoder.latent_scale, decoder.latent_shift
    model.assumptions = (*getattr(model, "assumptions", ()), *assumed)
    return model


def builtin_digits() -> DiT:
    """The reference model: a 1.8 M parameter DiT trained on scikit-learn's digits (see exporter/digits.md)."""
    with as_file(files("ditc.exporter") / "digits.safetensors") as path:
        return dit_from_checkpoint(path, num_heads=4, facts=DIGITS)


BUILT_IN: dict[str, Callable[[], Any]] = {"digits": builtin_digits, EMOJI: builtin_emoji}  # `choices.BuiltIn`


def random_model(size: str, *, seed: int = 0, depth: int | None = None) -> DiT:
    """A DiT of a released size with random weights, for latency work; "dit-xl-2-256" is DiT-XL/2 at 256 pixels.

    The weights are torch's default initialisation, so no gate is zero and every branch matters. `depth` overrides the
    number of blocks.
    """
    known = f"({'|'.join(DIT_SIZES)})-({'|'.join(map(str, DIT_PATCHES))})-({'|'.join(map(str, DIT_PIXELS))})"
    match = re.fullmatch(f"dit-{known}", size)
    if match is None:
        raise InputError(
            f"unknown size {size!r}; expected dit-SIZE-PATCH-PIXELS matching dit-{known}, like dit-xl-2-256"
        )
    config: DiTConfig = config_for_size(match[1], int(match[2]), int(match[3]))
    if depth is not None:
        config = replace(config, depth=depth)
    return random_dit(config, f"{size}-random", seed=seed)


def random_dit(config: DiTConfig, name: str, *, seed: int = 0) -> DiT:
    """A DiT of any size with random weights: torch's default initialisation, so no gate is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiT(config, name=name).eval()
    model.sampler = SamplerSpec(variance="learned" if config.learn_sigma else "fixed-small")
    return model


def _users_own(name: str) -> Any:
    module_name, function = name.split(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        build = getattr(importlib.import_module(module_name), function)
    except Exception as e:  # a module of the user's may fail in any way
        raise CheckpointError(f"can't import {name}: {e}; expected MODULE:FUNCTION returning a TrajectoryModel") from e
    finally:
        sys.path.pop(0)
    try:
        model = build()
    except Exception as e:  # the user's code may fail in any way
        raise CheckpointError(f"{name}() failed: {type(e).__name__}: {e}".splitlines()[0]) from e
    check_decomposition(model)
    return model.eval()
