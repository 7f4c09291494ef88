"""From what a user names to a model: the built-in one, a checkpoint, a diffusers folder, a size, or their own code."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from ditc.errors import CheckpointError, InputError
from ditc.exporter.diffusers_folder import decoder_from_vae, dit_from_diffusers
from ditc.exporter.dit import DIT_PATCHES, DIT_PIXELS, DIT_SIZES, DiT, DiTConfig, config_for_size
from ditc.exporter.original import dit_from_checkpoint
from ditc.exporter.protocol import check_decomposition
from ditc.spec import SamplerSpec

__all__ = ["builtin_digits", "load_model", "random_dit", "random_model", "with_vae"]

BUILTIN = "digits"


def load_model(name: str, *, num_heads: int | None = None, vae: Path | None = None) -> Any:
    """The model that `name` stands for, ready to export (fits `exporter.protocol.TrajectoryModel`).

    `name` is "digits", a .pt or .safetensors file with original DiT keys, a diffusers folder, "random:SIZE" or
    "random:SIZE:SEED" (see `random_model`), or "module:function" for a function of the user's that returns a
    TrajectoryModel. `vae` is a local `AutoencoderKL` folder whose decoder
    the model gets. Raises CheckpointError where something can't be read.
    """
    model = _named_model(name, num_heads)
    return model if vae is None else with_vae(model, vae)


def with_vae(model: Any, folder: Path) -> Any:
    """The model with the decoder of a local `AutoencoderKL`. Raises CheckpointError where the two don't fit."""
    decoder, scale = decoder_from_vae(folder)
    channels = decoder.vae.config.latent_channels
    if channels != model.spec.in_channels:
        raise CheckpointError(f"{folder} decodes {channels} channels, {model.spec.name} makes {model.spec.in_channels}")
    model.decoder, model.latent_scale = decoder, scale
    return model


def _named_model(name: str, num_heads: int | None) -> Any:
    if name == BUILTIN:
        return builtin_digits()
    random = re.fullmatch(r"random:([\w-]+)(?::(\d+))?", name)
    if random is not None:
        return random_model(random[1], seed=int(random[2] or 0))
    path = Path(name)
    if path.is_dir():
        return dit_from_diffusers(path)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return _users_own(name)
    return dit_from_checkpoint(path, num_heads=num_heads)


def builtin_digits() -> DiT:
    """The reference model: a 1.8 M parameter DiT trained on scikit-learn's digits (see exporter/digits.md)."""
    with as_file(files("ditc.exporter") / "digits.safetensors") as path:
        model = dit_from_checkpoint(path, num_heads=4)
    model.sampler = SamplerSpec(variance="learned")
    return model


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
