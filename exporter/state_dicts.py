"""The model's tensors in a checkpoint: training scripts save several sets, and wrappers prefix their keys."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ditc.errors import CheckpointError
from ditc.exporter.weight_files import StateDict, about_counters, check_floating, read_mapping, without_counters

__all__ = ["Checkpoint", "fitting_prefix", "read_checkpoint", "without_prefix"]

# names under which a model is saved, the one to take first: a moving average makes the better images
HOLDERS = ("ema", "model_ema", "ema_model", "state_dict_ema", "model", "state_dict", "module", "net")
AVERAGED = re.compile(r"(?:^|[._])ema(?:[._\d]|$)")
# names under which training scripts keep their arguments, the one to believe first
ARGUMENTS = ("args", "hparams", "hyper_parameters", "config", "cfg")
OUTERMOST = ""  # the name of the tensors that lie in a file without any holder
# heads that training alone reads: REPA (arXiv 2410.06940) aligns a block's output with an encoder's through them
ALIGNING = "projectors."
DEEPEST = 3  # levels of mappings that are looked into


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model under its own names, the training script's arguments, and what was assumed.

    `is_aligned` says whether heads of REPA's training lay beside them, which no image needs.
    """

    tensors: StateDict
    args: Mapping[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    is_aligned: bool = False


def read_checkpoint(path: Path, anchor: str) -> Checkpoint:
    """The model in a checkpoint file: the set of tensors that has the key `anchor`, perhaps behind a common prefix.

    Raises CheckpointError naming what the file holds instead, or a tensor that is of no floating type.
    """
    loaded = read_mapping(path)
    parted = {name: without_counters(tensors) for name, tensors in _tensor_sets(loaded)}
    sets = {name: tensors for name, (tensors, _) in parted.items()}
    if not any(sets.values()):
        raise CheckpointError(f"{path} holds no tensors; expected the weights of a diffusion transformer")
    fits = {name: prefix for name in sets if (prefix := fitting_prefix(sets[name], anchor)) is not None}
    if not fits:
        raise CheckpointError(f"{path} is not an original DiT checkpoint: {_misfit(sets, anchor)}")
    chosen = _chosen(fits, path)
    check_floating(sets[chosen], path)
    own = without_prefix(sets[chosen], fits[chosen])
    tensors = {name: tensor for name, tensor in own.items() if not name.startswith(ALIGNING)}
    return Checkpoint(
        tensors=tensors,
        args=_arguments(loaded),
        assumptions=(
            *_about_sets(sets, fits, chosen, loaded),
            *about_prefix(fits[chosen]),
            *about_counters(parted[chosen][1]),
            *_about_heads(len(own) - len(tensors)),
        ),
        is_aligned=len(tensors) < len(own),
    )


def _tensor_sets(mapping: Mapping[Any, Any], name: str = OUTERMOST, depth: int = 0) -> Iterable[tuple[str, StateDict]]:
    """Every mapping with tensors right in it by its dotted name, and those named as holders that are empty."""
    tensors = {str(key): value for key, value in mapping.items() if isinstance(value, Tensor)}
    if tensors or (_rank(name) is not None and not mapping):
        yield name, tensors
    if depth < DEEPEST:
        for key, value in mapping.items():
            if isinstance(key, str) and isinstance(value, Mapping) and key not in ARGUMENTS:
                yield from _tensor_sets(value, f"{name}.{key}" if name else key, depth + 1)


def fitting_prefix(names: Iterable[str], anchor: str) -> str | None:
    """The prefix that all names share and behind which `anchor` is one; "" for none, None where nothing fits."""
    names = list(names)
    for name in names:
        prefix = name.removesuffix(anchor)
        if name.endswith(anchor) and (not prefix or prefix.endswith(".")):
            return prefix if all(other.startswith(prefix) for other in names) else None
    return None


def without_prefix(tensors: StateDict, prefix: str) -> StateDict:
    """The same tensors under names without a prefix that all of them share."""
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def about_prefix(prefix: str) -> tuple[str, ...]:
    """The line about a prefix that was taken off, if any was."""
    return (f"the prefix {prefix!r} of every key belongs to a wrapper around the model",) if prefix else ()


def _about_heads(count: int) -> tuple[str, ...]:
    """The line about heads of REPA's training, if there are any."""
    if not count:
        return ()
    return (f"{ALIGNING}* ({count} tensors) are REPA's, for its training alone; guidance is on all channels, as there",)


def _rank(name: str) -> int | None:
    """Return the rank of a set by its name, 0 the best to take; None for a name that tells nothing.

    A moving average is told by the word "ema" wherever it stands (`ema.state_dict`, `ema_0.9999`), a model by the
    first part of the dotted name.
    """
    if name in HOLDERS:
        return HOLDERS.index(name)
    if AVERAGED.search(name):
        return HOLDERS.index("model") - 1  # behind the plain names of a moving average, before those of a model
    first = name.split(".", maxsplit=1)[0]
    return HOLDERS.index(first) if first in HOLDERS else len(HOLDERS) if name == OUTERMOST else None


def _chosen(fits: Mapping[str, str], path: Path) -> str:
    """The name of the set to take. Raises CheckpointError where no name is better than the others."""
    if len(fits) == 1:
        return next(iter(fits))
    ranks = {name: rank for name in fits if (rank := _rank(name)) is not None}
    best = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    if len(best) != 1:
        raise CheckpointError(
            f"{path} holds several models, {', '.join(best or fits)}; save the state dict of one of them alone"
        )
    return best[0]


def _about_sets(
    sets: Mapping[str, StateDict], fits: Mapping[str, str], chosen: str, loaded: Mapping[str, Any]
) -> tuple[str, ...]:
    """The line about which of several sets was taken, and why not a better one; none where there is one."""
    rank = _rank(chosen)
    reasons = {name: "has other keys" if tensors else "is empty" for name, tensors in sets.items()}
    reasons |= dict.fromkeys(_without_sets(loaded, sets), "holds no tensors by name")
    if rank is not None:
        better = {name: _rank(name) for name in reasons if name not in fits and not chosen.startswith(f"{name}.")}
        passed = [f"{name!r} {reasons[name]}" for name, other in better.items() if other is not None and other < rank]
        if passed:
            return (f"{_label(chosen)} holds the weights that are meant: {', '.join(passed)}",)
    others = [_label(name) for name in fits if name != chosen]
    return (f"{_label(chosen)} holds the weights that are meant, not {' or '.join(others)}",) if others else ()


def _without_sets(loaded: Mapping[str, Any], sets: Mapping[str, StateDict]) -> list[str]:
    """Names that hold something, but no tensors by name: a list of them, say."""
    return [
        name
        for name, value in loaded.items()
        if isinstance(value, (Mapping, list, tuple))
        and value
        and not any(other == name or other.startswith(f"{name}.") for other in sets)
    ]


def _label(name: str) -> str:
    return "the file itself" if name == OUTERMOST else repr(name)


def _misfit(sets: Mapping[str, StateDict], anchor: str) -> str:
    """Describe the sets where none has the key `anchor`, or some of its keys lack the prefix of others."""
    largest = max(sets, key=lambda name: len(sets[name]))
    names = list(sets[largest])
    held = f"it holds {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    where = f" under {largest!r}" if largest else ""
    if any(name.startswith("transformer_blocks.") for name in names):
        return "its keys are diffusers'; give the folder that it lies in, with its config.json"
    prefixes = sorted({name.removesuffix(anchor) for name in names if name.endswith(f".{anchor}")})
    if prefixes:
        other = next(name for name in names if not name.startswith(prefixes[0]))
        return f"some keys begin with {prefixes[0]!r}, others not ({other}){where}; save the model's state dict alone"
    return f"{anchor} is missing; {held}{where}"


def _arguments(loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training script's command line or settings: an argparse.Namespace, or a mapping."""
    arguments: dict[str, Any] = {}
    for holder in ARGUMENTS:
        content = loaded.get(holder)
        values = vars(content) if isinstance(content, argparse.Namespace) else content
        if isinstance(values, Mapping):
            arguments = {**{str(name): value for name, value in values.items()}, **arguments}
    return arguments
