"""LoRAs merged into the weights of a model: W + weight * scale * B A, before anything else is done with it.

A model takes LoRAs by one method, which says for what layers they may be, by every name that a file may use:

    def lora_layers(self) -> dict[str, tuple[WeightRows, ...]]:
        return module_layers(self.transformer, "transformer.")

and by passing on in its `spec` what it is told: `self.loras`, `self.assumptions` and `self.doubts`. Weights that it
shares, and that a LoRA may change apart, stand there by the names that they have after its method `part_weights()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditc.errors import CheckpointError, InputError
from ditc.exporter.lora_files import Factors, LoraFile, read_lora
from ditc.exporter.weight_files import listed
from ditc.files import sha256_of
from ditc.loras import Lora, MergedLora

__all__ = ["LoraLayers", "WeightRows", "module_layers", "with_loras"]

LOUD = 1.0  # size of all changes over that of the weights: above it little is left of what was trained before


@dataclass(frozen=True)
class WeightRows:
    """The rows of a parameter that are one layer's weight, the last one not among them; without numbers all of them."""

    parameter: str
    first: int = 0
    last: int | None = None


LoraLayers = Mapping[str, tuple[WeightRows, ...]]


def module_layers(module: nn.Module, prefix: str = "") -> dict[str, tuple[WeightRows, ...]]:
    """Every linear layer and convolution of a module by its own name; `prefix` is the module's in the whole model."""
    return {
        name: (WeightRows(f"{prefix}{name}.weight"),)
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


@torch.no_grad()
def with_loras(model: Any, loras: Sequence[Lora]) -> Any:
    """The model, with all of the LoRAs merged into its weights; none is where one is refused.

    Changes are added up in float64 and rounded once: the order of LoRAs and of additions shows in hardly any bit.
    Raises CheckpointError naming what does not fit, and InputError for a model that takes no LoRAs.
    """
    if not loras:
        return model
    if not hasattr(model, "lora_layers"):
        raise InputError(
            f"{model.spec.name} does not say by a method lora_layers() where a LoRA would go; leave out --lora"
        )
    files = [read_lora(lora.path, model.lora_layers(), model.spec.name) for lora in loras]
    by_weight = _by_weight(_changes(files, loras, model), model)
    _tell(model, files, loras, (*_idle(files), *_loud(_checked_size(by_weight))))
    for weight, own in by_weight:
        weight.copy_(_merged(weight, own))
    return model


@dataclass(frozen=True)
class _Change:
    """The addition of `factor` times up @ down to rows of a parameter, and where that stands."""

    rows: WeightRows
    factors: Factors
    factor: float
    file: Path
    layer: str


def _changes(files: Sequence[LoraFile], loras: Sequence[Lora], model: Any) -> list[_Change]:
    """Place the factors of all files in the parameters of the model, whose weights are parted where that takes it."""
    places: LoraLayers = model.lora_layers()
    asked = {rows.parameter for file in files for layer in file.layers for rows in places[layer]}
    if not asked <= dict(model.named_parameters()).keys():
        model.part_weights()
        places = model.lora_layers()
    return [
        _Change(rows, factors, lora.weight * factors.scale, file.path, layer)
        for file, lora in zip(files, loras, strict=True)
        for layer, factors in file.layers.items()
        for rows in places[layer]
    ]


def _by_weight(changes: Sequence[_Change], model: Any) -> list[tuple[Tensor, list[_Change]]]:
    """Sort the changes by the weights that they are of. Raises CheckpointError where one does not fit its weight."""
    by_name: dict[str, list[_Change]] = {}
    for change in changes:
        by_name.setdefault(change.rows.parameter, []).append(change)
    by_weight = [(model.get_parameter(name), own) for name, own in by_name.items()]
    _check_shapes(by_weight)
    return by_weight


def _check_shapes(by_weight: Sequence[tuple[Tensor, list[_Change]]]) -> None:
    """Raise CheckpointError naming the layers whose factors have other shapes than their weight asks for."""
    misfits: dict[Path, list[str]] = {}
    for weight, own in by_weight:
        for change in own:
            outputs, *inputs = weight[change.rows.first : change.rows.last].shape
            rank = change.factors.down.shape[0]
            shapes = tuple(change.factors.down.shape), tuple(change.factors.up.shape)
            expected = (rank, *inputs), (outputs, rank, *(1 for _ in inputs[1:]))
            if shapes != expected:
                told = f"{change.layer} with A {shapes[0]} and B {shapes[1]} instead of {expected[0]} and {expected[1]}"
                misfits.setdefault(change.file, []).append(told)
    for file, layers in misfits.items():
        raise CheckpointError(f"{file} has other shapes than the model: {listed('layers', layers)}give one made for it")


def _merged(weight: Tensor, own: Sequence[_Change]) -> Tensor:
    """A weight with its changes added, in its own type. Raises CheckpointError where that holds no such numbers."""
    merged = (weight.double() + _added(weight, own)).to(weight.dtype)
    if not torch.isfinite(merged).all():
        change = own[0]
        raise CheckpointError(f"{change.file} makes {change.layer} overflow; give it a smaller weight, FILE:WEIGHT")
    return merged


def _added(weight: Tensor, own: Sequence[_Change]) -> Tensor:
    """The sum of the changes of a weight, of its shape, in float64."""
    added = torch.zeros(weight.shape, dtype=torch.float64)
    for change in own:
        rows = added[change.rows.first : change.rows.last]
        down, up = change.factors.down.double().flatten(1), change.factors.up.double().flatten(1)
        rows += change.factor * (up @ down).reshape(rows.shape)
    return added


def _idle(files: Sequence[LoraFile]) -> Iterator[str]:
    for file in files:
        if not any(factors.up.any() and factors.down.any() for factors in file.layers.values()):
            yield f"LoRA {file.path.name} changes nothing: one factor of every layer is zero, as before any training"


def _checked_size(by_weight: Sequence[tuple[Tensor, list[_Change]]]) -> float:
    """Return the size of all changes over that of the weights. Raises CheckpointError where a sum is not finite."""
    changed, before = 0.0, 0.0
    for weight, own in by_weight:
        changed += float((_merged(weight, own).double() - weight.double()).square().sum())
        before += float(weight.double().square().sum())
    return sqrt(changed / before) if before else 0.0


def _loud(size: float) -> Iterator[str]:
    if size > LOUD:
        yield (
            f"the LoRAs change the weights of their layers by {size:.1f} times their own size: look at the weight in "
            "--lora FILE:WEIGHT, and at alpha"
        )


def _tell(model: Any, files: Sequence[LoraFile], loras: Sequence[Lora], doubts: tuple[str, ...]) -> None:
    """Hand a model what its spec is to pass on. Raises InputError where it does not."""
    told = tuple(
        MergedLora(file=file.path.name, sha256=sha256_of(file.path), weight=lora.weight, layers=len(file.layers))
        for file, lora in zip(files, loras, strict=True)
    )
    assumptions = tuple(line for file in files for line in file.assumptions)
    with suppress(AttributeError):  # a property of a class of the user's
        model.assumptions = (*getattr(model, "assumptions", ()), *assumptions)
        model.doubts = (*getattr(model, "doubts", ()), *doubts)
        model.loras = (*getattr(model, "loras", ()), *told)
    if model.spec.loras[-len(told) :] != told:
        raise InputError(f"the spec of {model.spec.name} does not pass on `loras`, so none can be merged into it")
