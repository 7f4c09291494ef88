"""Files of LoRAs: the two factors of each layer's change, and the number that multiplies them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ditc.errors import CheckpointError
from ditc.exporter.file_formats import download_advice, weight_format
from ditc.exporter.folder_weights import found_there
from ditc.exporter.lora_config import CONFIG_FILE, LoraConfig, config_beside, config_in
from ditc.exporter.lora_keys import Part, foreign_kind, layer_and_part, layer_named, without_wrappers
from ditc.exporter.weight_files import StateDict, check_floating, listed, read_tensors

__all__ = ["Factors", "LoraFile", "read_lora"]

PEFT_FILE = "adapter_model"  # the name under which PEFT writes one, with its configuration beside it

Keys = Mapping[str, Mapping[Part, str]]  # of each layer of a model
Scale = Callable[[str, int], float]  # (a layer as the file names it, its rank) -> what multiplies B A
Assumed = tuple[str, ...]


@dataclass(frozen=True)
class Factors:
    """The change of one layer, scale * up @ down: down is (rank, inputs, ...), up (outputs, rank, ...)."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """A LoRA by the layers of the model that it is for, and what was assumed."""

    path: Path
    layers: Mapping[str, Factors]
    assumptions: Assumed = ()


def read_lora(path: Path, names: Collection[str], model: str) -> LoraFile:
    """Read a LoRA for a model that has layers `names`.

    Raises CheckpointError, naming the first keys and how many there are, for a file of another kind or model, and for
    one that is not whole: nothing of a LoRA is passed over.
    """
    _check_file(path)
    tensors = read_tensors(path)
    _check_kind(tensors, path)
    keys = _keys_by_layer(tensors, names, path, model)
    _check_whole(keys, path)
    scale, assumed = _scale_of(tensors, keys, path)
    layers = {layer: _factors(own, tensors, scale, path) for layer, own in keys.items()}
    return LoraFile(path, layers, assumed)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected the file of a LoRA; give one in it: {found_there(path)}")
    if not path.is_file():
        raise CheckpointError(f"no such LoRA: {path}; expected FILE or FILE:WEIGHT{download_advice(str(path))}")


def _check_kind(tensors: StateDict, path: Path) -> None:
    """Raise CheckpointError naming keys of what is not merged here."""
    kinds: dict[str, list[str]] = {}
    for key in tensors:
        if (kind := foreign_kind(key)) is not None:
            kinds.setdefault(kind, []).append(key)
    for kind, keys in kinds.items():
        advice = (
            "save it without, or merge that with the tool that made it"
            if len(keys) < len(tensors)
            else "merge it with the tool that made it"
        )
        raise CheckpointError(f"{path} holds {kind}, which ditc does not merge: {listed('keys', keys)}{advice}")


def _keys_by_layer(tensors: StateDict, names: Collection[str], path: Path, model: str) -> Keys:
    """Sort the keys by the layers that they are of. Raises CheckpointError naming those that are of none."""
    keys: dict[str, dict[Part, str]] = {}
    strange, unknown = [], []
    for key in tensors:
        split = layer_and_part(key)
        layer = None if split is None else layer_named(split[0], names)
        if split is None:
            strange.append(key)
        elif layer is None:
            unknown.append(key)
        elif split[1] in keys.setdefault(layer, {}):
            raise CheckpointError(
                f"{path} has the same layer twice, {keys[layer][split[1]]} and {key}; save one LoRA in it alone"
            )
        else:
            keys[layer][split[1]] = key
    if strange:
        raise CheckpointError(
            f"{path} is no LoRA: {listed('keys', strange)}expected pairs like NAME.lora_A.weight and NAME.lora_B.weight"
        )
    if unknown:
        like = next((name for name in names if ".0." in name), next(iter(names), "none"))
        raise CheckpointError(
            f"{path} does not fit {model}: {listed('unknown', unknown)}expected linear layers of it, like {like}"
        )
    return keys


def _check_whole(keys: Keys, path: Path) -> None:
    factors: tuple[tuple[Part, str], ...] = (("up", "no B (up) for"), ("down", "no A (down) for"))
    for part, lacking in factors:
        alone = [next(iter(own.values())) for own in keys.values() if part not in own]
        if alone:
            raise CheckpointError(f"{path} is not whole: {listed(lacking, alone)}copy the LoRA again")


def _scale_of(tensors: StateDict, keys: Keys, path: Path) -> tuple[Scale, Assumed]:
    """Return the scale of every layer, and what was assumed of it.

    Alpha stands in the file's own metadata or tensors, else in PEFT's configuration beside it, else nowhere.
    """
    config, assumed = _config_of(tensors, path)
    alphas = {_in_file(own["down"]): _alpha(own["alpha"], tensors, path) for own in keys.values() if "alpha" in own}
    layers = [_in_file(own["down"]) for own in keys.values()]
    if config is not None:
        if alphas:
            raise CheckpointError(f"{config.source} and tensors in {path} both state alpha; remove one of them")
        config.check_patterns(layers)
        return config.scale, assumed
    if not alphas:
        return (lambda _, __: 1.0), (f"LoRA {path.name} states no alpha: it is the rank, and B A is added as it is",)
    without = [layer for layer in layers if layer not in alphas]
    if without:
        raise CheckpointError(f"{path} states alpha of some layers alone: {listed('none of', without)}save it again")
    return (lambda layer, rank: alphas[layer] / rank), ()


def _in_file(down: str) -> str:
    """Return the layer of a key as the file names it, without what stood around the model."""
    split = layer_and_part(down)
    assert split is not None
    return without_wrappers(split[0])


def _config_of(tensors: StateDict, path: Path) -> tuple[LoraConfig | None, Assumed]:
    """Return the configuration of a file of PEFT's form, and a line where it is only beside it."""
    config = config_in(_metadata(path), path)
    if config is not None or not any(".lora_A." in key for key in tensors):
        return config, ()
    config = config_beside(path)
    if config is None or path.stem == PEFT_FILE:
        return config, ()
    return config, (f"LoRA {path.name} has the alpha of the {CONFIG_FILE} beside it",)


def _metadata(path: Path) -> Mapping[str, str]:
    """Return what a safetensors file says of itself; nothing of another one."""
    from safetensors import safe_open

    if weight_format(path) != "safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _alpha(key: str, tensors: StateDict, path: Path) -> float:
    tensor = tensors[key]
    value = float(tensor) if tensor.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        shown = f"{value:g}" if tensor.numel() == 1 else f"of shape {tuple(tensor.shape)}"
        raise CheckpointError(f"{path}: {key} is {shown}, expected a number above 0")
    return value


def _factors(own: Mapping[Part, str], tensors: StateDict, scale: Scale, path: Path) -> Factors:
    """Return the factors of one layer. Raises CheckpointError where they are of another type or rank, or not finite."""
    pair = {own[part]: tensors[own[part]] for part in ("down", "up")}
    check_floating(pair, path)
    for key, tensor in pair.items():
        if tensor.ndim < 2 or 0 in tensor.shape:
            raise CheckpointError(f"{path}: {key} has shape {tuple(tensor.shape)}, expected a matrix")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {key} contains NaN or infinity; the LoRA is not usable")
    down, up = pair.values()
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise CheckpointError(f"{path}: {own['down']} has rank {rank}, {own['up']} {up.shape[1]}; copy the LoRA again")
    return Factors(down, up, scale(_in_file(own["down"]), rank))
