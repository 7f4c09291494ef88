"""The weights in a folder of diffusers: one file or shards, of full precision or of the only variant that is there."""

from __future__ import annotations

import re
from pathlib import Path

from ditc.errors import CheckpointError
from ditc.exporter.config_files import read_json
from ditc.exporter.weights import StateDict, check_floating, read_tensors

__all__ = ["found_there", "read_folder_weights"]

SUFFIXES = ("safetensors", "bin")  # the one to take first
SINGLE = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>[\w-]+))?\.(?P<suffix>safetensors|bin)")
INDEX = re.compile(r"diffusion_pytorch_model\.(?P<suffix>safetensors|bin)\.index(?:\.(?P<variant>[\w-]+))?\.json")


def read_folder_weights(home: Path) -> tuple[StateDict, tuple[str, ...]]:
    """(tensors of floating types, what was assumed). Raises CheckpointError naming what is wrong or lacking."""
    sources = _sources(home)
    variants = {variant for variant, _ in sources}
    if not sources:
        raise CheckpointError(
            f"no weights in {home}, it holds {found_there(home)}; expected diffusion_pytorch_model.safetensors, or its "
            ".bin or .index.json"
        )
    variant = "" if "" in variants else min(variants)
    if len(variants) > 1 and variant:
        raise CheckpointError(
            f"{home} holds weights in the variants {', '.join(sorted(variants))} only; keep the files of one of them"
        )
    path = next(sources[variant, suffix] for suffix in SUFFIXES if (variant, suffix) in sources)
    tensors = _sharded(path) if path.suffix == ".json" else read_tensors(path)
    check_floating(tensors, path)
    return tensors, (
        f"the weights of the variant {variant} are meant, no others are in {home.name}",
    ) if variant else ()


def _sources(home: Path) -> dict[tuple[str, str], Path]:
    """(variant or "", suffix) -> file of weights, or index of shards where there is no such file."""
    sources: dict[tuple[str, str], Path] = {}
    for form in (INDEX, SINGLE):  # a single file takes the place of an index
        for path in sorted(home.iterdir()):
            if (match := form.fullmatch(path.name)) is not None:
                sources[match["variant"] or "", match["suffix"]] = path
    return {key: path for key, path in sources.items() if not _is_shard(key[0])}


def _is_shard(variant: str) -> bool:
    return re.fullmatch(r"(?:[\w-]+)?\d{5}-of-\d{5}", variant) is not None


def _sharded(index: Path) -> StateDict:
    weight_map = read_json(index, "the index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from keys to files; copy the folder again")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which lies outside the folder; copy the folder again")
    return {key: value for shard in shards for key, value in read_tensors(index.with_name(shard)).items()}


def found_there(folder: Path) -> str:
    """What a folder holds, in words: the first names."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}" if names else "nothing"
