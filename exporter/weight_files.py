"""Reading weight files without trusting them: safetensors, or torch archives with `weights_only=True`."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditc.errors import CheckpointError, one_line
from ditc.exporter.file_formats import download_advice, weight_format

__all__ = [
    "StateDict",
    "about_counters",
    "check_floating",
    "listed",
    "load_weights",
    "read_mapping",
    "read_tensors",
    "without_counters",
]

StateDict = dict[str, Tensor]

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SAFETENSORS_FLOATING = ("F16", "BF16", "F32", "F64")
TAKEN = "expected float16, bfloat16, float32 or float64: give the weights as they were before they were quantized"
# a class that does nothing but hold attributes: the original training script keeps its arguments in one
INERT: list[Any] = [argparse.Namespace]


def read_tensors(path: Path) -> StateDict:
    """The tensors of a file that holds one state dict, on the CPU. Raises CheckpointError where there are none."""
    content = read_mapping(path)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        nested = ", ".join([name for name, value in content.items() if isinstance(value, Mapping)][:3])
        instead = f" right in it, it holds {nested}; save the state dict in there alone" if nested else ""
        raise CheckpointError(
            f"{path} holds no tensors{instead or '; expected the weights of a diffusion transformer'}"
        )
    return tensors


def read_mapping(path: Path) -> dict[str, Any]:
    """All that a file of safetensors or torch.save holds, on the CPU; how to read it is told by its first bytes.

    Raises CheckpointError for a missing, truncated or foreign file, and for a pickle with more than tensors, plain
    values and `argparse.Namespace` in it.
    """
    if not path.is_file():
        raise CheckpointError(
            f"no such checkpoint: {path}; expected a .pt or .safetensors file or a diffusers folder"
            f"{download_advice(str(path))}"
        )
    loaded = _read_safetensors(path) if weight_format(path) == "safetensors" else _read_torch(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected a state dict")
    return {str(name): value for name, value in loaded.items()}


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as e:
        _check_types(path)  # one that is not known here reads like damage
        raise CheckpointError(f"{path} is not a whole safetensors file ({e}); copy the checkpoint again") from e


def _check_types(path: Path) -> None:
    """Raise CheckpointError naming the first tensor of a safetensors file whose type is not taken."""
    with path.open("rb") as file:
        try:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            types = {name: str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError):  # the header itself is damaged
            return
    for name, dtype in types.items():
        if dtype not in SAFETENSORS_FLOATING:
            raise CheckpointError(f"{path}: {name} is {dtype}, {TAKEN}")


def _read_torch(path: Path) -> Any:
    try:
        # a file and not a path: torch would go by the suffix of that
        with path.open("rb") as file, warnings.catch_warnings(), torch.serialization.safe_globals(INERT):
            warnings.simplefilter("ignore")  # of unusual pickle protocols; what can't be read raises below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        match = re.search(r"GLOBAL ([\w.]+)", str(e))
        named = f" ({match[1]})" if match else ""
        raise CheckpointError(
            f"{path} is a pickle with more than weights in it{named}, and ditc runs no code from a checkpoint; save "
            "the state dict alone, best as .safetensors"
        ) from e
    except Exception as e:  # what a foreign file raises inside torch's unpickler has no common class
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CheckpointError(f"{path} is not a whole torch checkpoint ({reason}); copy the checkpoint again") from e


def without_counters(tensors: StateDict) -> tuple[StateDict, tuple[str, ...]]:
    """(the tensors that may be weights, names of the others): a single whole number counts steps or updates."""
    counters = tuple(name for name, tensor in tensors.items() if tensor.ndim == 0 and tensor.dtype in WHOLE)
    return {name: tensor for name, tensor in tensors.items() if name not in counters}, counters


def about_counters(names: tuple[str, ...]) -> tuple[str, ...]:
    """The line about counters that were passed over, if any were."""
    return (f"single whole numbers are no weights: {', '.join(map(one_line, names[:3]))}",) if names else ()


def check_floating(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise CheckpointError naming the first tensor that is no plain array of a floating type."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            raise CheckpointError(f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}, {TAKEN}")
        if tensor.layout is not torch.strided or tensor.is_meta:
            form = "without values (meta)" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise CheckpointError(f"{source}: {name} is {form}, expected a plain tensor; save it as one")


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
        with torch.no_grad():
            parameter.copy_(tensor)
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"{source}: {name} contains NaN or infinity; the checkpoint is not usable")


def listed(word: str, names: list[str]) -> str:
    """A part of an error message that names the first keys of a list; empty for an empty list."""
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{word} {', '.join(names[:3])}{more}; "
