"""Reading weight files without trusting them: safetensors, or torch archives with `weights_only=True`."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditc.errors import CheckpointError

__all__ = ["listed", "load_weights", "read_tensors"]

StateDict = dict[str, Tensor]

LFS_POINTER = b"version https://git-lfs"


def read_tensors(path: Path) -> StateDict:
    """The tensors of a .safetensors, .pt, .pth, .ckpt or .bin file, on the CPU.

    Training checkpoints of the original release hold several state dicts: the moving average ("ema") is taken.
    Raises CheckpointError for a missing, truncated or foreign file, and for a pickle with anything but tensors in it.
    """
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}; expected a .pt or .safetensors file or a diffusers folder")
    loaded: dict[str, Any] = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for holder in ("ema", "model", "state_dict"):
        inner = loaded.get(holder)
        if isinstance(inner, Mapping):
            loaded = dict(inner)
            break
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; expected the weights of a diffusion transformer")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is not a whole safetensors file ({e}); copy the checkpoint again") from e


def _read_torch(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights themselves; fetch them with: git lfs pull"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols; what can't be read raises below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(
            f"{path} is a pickle with more than weights in it, and ditc runs no code from a checkpoint; "
            "save the state dict alone, best as .safetensors"
        ) from e
    except Exception as e:  # what a foreign file raises inside torch's unpickler has no common class
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CheckpointError(f"{path} is not a whole torch checkpoint ({reason}); copy the checkpoint again") from e
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a state dict")
    return dict(loaded)


def load_weights(model: nn.Module, tensors: StateDict, source: Path | str) -> None:
    """Fill every parameter of `model` in float32. Raises CheckpointError naming keys that don't fit, or a NaN."""
    own = dict(model.named_parameters())
    missing = [name for name in own if name not in tensors and name != "pos_embed"]  # fixed: computed where absent
    extra = [name for name in tensors if name not in own]
    if missing or extra:
        raise CheckpointError(
            f"{source} does not fit this architecture: {listed('missing', missing)}{listed('unexpected', extra)}"
            "expected the keys of the original DiT release"
        )
    for name, parameter in own.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the other keys say {tuple(parameter.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} contains NaN or infinity; the checkpoint is not usable")
        with torch.no_grad():
            parameter.copy_(tensor)


def listed(word: str, names: list[str]) -> str:
    """A part of an error message that names the first keys of a list; empty for an empty list."""
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{word} {', '.join(names[:3])}{more}; "
