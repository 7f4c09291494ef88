"""The configuration of a LoRA as PEFT writes it: in the metadata of a file of diffusers, or in adapter_config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditc.errors import CheckpointError
from ditc.exporter.config_files import read_json, spelled
from ditc.exporter.lora_keys import without_wrappers

__all__ = ["CONFIG_FILE", "LoraConfig", "config_beside", "config_in"]

CONFIG_FILE = "adapter_config.json"
IN_METADATA = "lora_adapter_metadata"  # diffusers' key in the metadata of a safetensors file
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# keys that may say something, since the tensors tell it as well, or it is of training
HARMLESS = frozenset(
    {
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("lora_dropout", "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision"),
        *("megatron_core", "peft_version", "qalora_group_size", "eva_config", "loftq_config", "runtime_config"),
    }
)
# keys that may say one of these. Other ways to initialize take their first A and B off the weights of the model itself
ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
NOTHING: tuple[Any, ...] = (None, False, "", [], {})  # of every other key, whichever release of PEFT it comes from
LITERAL = re.compile(r"\^?[\w.-]+")  # a pattern that is a name, or the end of one


@dataclass(frozen=True)
class LoraConfig:
    """The scale of every layer as a configuration states it. `source` is the place where it stands."""

    source: str
    alpha: float
    rank: int | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    rank_stabilized: bool = False

    def scale(self, layer: str, rank: int) -> float:
        """Return the scale of B A: alpha / rank, or alpha / sqrt(rank) where that was asked for (arXiv 2312.03732).

        Raises CheckpointError where the configuration says another rank than the tensors of the layer have.
        """
        said = _stated(self.rank_pattern, layer, self.rank)
        if said is not None and said != rank:
            raise CheckpointError(f"{self.source} says rank {said} of {layer}, its tensors have {rank}")
        alpha: float = _stated(self.alpha_pattern, layer, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def check_patterns(self, layers: Collection[str]) -> None:
        """Raise CheckpointError for a pattern that is of none of the layers: it would do nothing."""
        for name, pattern in (("alpha_pattern", self.alpha_pattern), ("rank_pattern", self.rank_pattern)):
            unused = [key for key in pattern if not any(_is_of(key, layer) for layer in layers)]
            if unused:
                raise CheckpointError(f"{self.source}: {name} has {spelled(unused[0])}, which is none of its layers")


def config_in(metadata: Mapping[str, str], path: Path) -> LoraConfig | None:
    """Return the configuration that diffusers keeps in the metadata of a file; None where there is none."""
    text = metadata.get(IN_METADATA)
    if text is None:
        return None
    source = f"the metadata of {path}"
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{source}: {IN_METADATA} is no JSON ({e}); save the LoRA again") from e
    if not isinstance(entries, dict):
        raise CheckpointError(f"{source}: {IN_METADATA} is {spelled(entries)}, expected an object")
    own = {without_wrappers(key): value for key, value in entries.items() if not key.startswith("text_encoder")}
    return _config(own, source)


def config_beside(path: Path) -> LoraConfig | None:
    """Return the configuration that PEFT writes beside a file; None where there is none."""
    beside = path.with_name(CONFIG_FILE)
    return _config(read_json(beside, "the configuration of a LoRA"), str(beside)) if beside.is_file() else None


def _config(entries: Mapping[str, Any], source: str) -> LoraConfig:
    """Hold a configuration to what is merged here. Raises CheckpointError naming the key that isn't."""
    for key, value in entries.items():
        if key in READ or key in HARMLESS:
            continue
        allowed = ALLOWED.get(key, ())
        if not any(type(value) is type(each) and value == each for each in (*allowed, *NOTHING)):
            expected = f"one of: {', '.join(map(spelled, allowed))}" if allowed else "nothing"
            raise CheckpointError(
                f"{source}: {key} is {spelled(value)}, expected {expected}; ditc does not merge such a LoRA: merge it "
                "with the tool that made it"
            )
    return LoraConfig(
        source=source,
        alpha=_positive(entries.get("lora_alpha"), "lora_alpha", source),
        rank=None if entries.get("r") is None else _rank(entries["r"], "r", source),
        alpha_pattern=_pattern(entries, "alpha_pattern", _positive, source),
        rank_pattern=_pattern(entries, "rank_pattern", _rank, source),
        rank_stabilized=_flag(entries.get("use_rslora"), source),
    )


def _pattern(entries: Mapping[str, Any], name: str, checked: Any, source: str) -> dict[str, Any]:
    """Return numbers by the end of a layer's name. Raises CheckpointError for a regular expression of another form."""
    pattern = entries.get(name) or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{source}: {name} is {spelled(pattern)}, expected an object")
    for key in pattern:
        if not LITERAL.fullmatch(key):
            raise CheckpointError(f"{source}: {name} has {spelled(key)}, expected names of layers or their ends")
    return {key: checked(value, f"{name} of {key}", source) for key, value in pattern.items()}


def _stated(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Return the number of the first key of a pattern that is of a layer."""
    return next((value for key, value in pattern.items() if _is_of(key, layer)), default)


def _is_of(key: str, layer: str) -> bool:
    """Is a pattern's key a layer's name, or its end behind a dot? One that begins with ^ is the whole name."""
    name = key.removeprefix("^")
    return layer == name or (not key.startswith("^") and layer.endswith(f".{name}"))


def _positive(value: Any, name: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{source}: {name} is {spelled(value)}, expected a number above 0")
    return float(value)


def _rank(value: Any, name: str, source: str) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{source}: {name} is {spelled(value)}, expected a whole number from 1")
    return value


def _flag(value: Any, source: str) -> bool:
    if value not in (None, True, False) or type(value) not in (type(None), bool):
        raise CheckpointError(f"{source}: use_rslora is {spelled(value)}, expected true or false")
    return bool(value)
