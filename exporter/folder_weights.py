"""The weights in a folder of diffusers: one file or shards, of full precision or of the only variant that is there."""

from __future__ import annotations

import re
from pathlib import Path

from ditc.errors import CheckpointError
from ditc.exporter.config_files import read_json
from ditc.exporter.weight_files import StateDict, about_counters, check_floating, read_tensors, without_counters

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
    path, about = _preferred(next(sources[variant, suffix] for suffix in SUFFIXES if (variant, suffix) in sources))
    tensors, counters = without_counters(_sharded(path) if path.suffix == ".json" else read_tensors(path))
    check_floating(tensors, path)
    if variant:
        about = (*about, f"the weights of the variant {variant} are meant, no others are in {home.name}")
    return tensors, (*about, *about_counters(counters))


def _sources(home: Path) -> dict[tuple[str, str], list[Path]]:
    """(variant or "", suffix) -> an index of shards, a file of weights, or both in this order."""
    sources: dict[tuple[str, str], list[Path]] = {}
    for form in (INDEX, SINGLE):
        for path in sorted(home.iterdir()):
            if (match := form.fullmatch(path.name)) is not None:
                sources.setdefault((match["variant"] or "", match["suffix"]), []).append(path)
    return {key: paths for key, paths in sources.items() if not _is_shard(key[0])}


def _is_shard(variant: str) -> bool:
    return re.fullmatch(r"(?:[\w-]+)?\d{5}-of-\d{5}", variant) is not None


def _preferred(paths: list[Path]) -> tuple[Path, tuple[str, ...]]:
    """(index or single file, the line about the choice): of the two one is left from another save.

    diffusers takes the index wherever it is; one without its shards can't be meant.
    """
    index = paths[0]
    if len(paths) == 1:
        return index, ()
    single = paths[1]
    missing = [shard for shard in _shards(index) if not index.with_name(shard).is_file()]
    if missing:
        return single, (f"{single.name} holds the weights that are meant: of {index.name} {missing[0]} is missing",)
    return index, (
        f"the shards of {index.name} hold the weights that are meant, as diffusers has it, not {single.name}",
    )


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    weight_map = read_json(index, "the index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from keys to files; copy the folder again")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which lies outside the folder; copy the folder again")
    return shards


def _sharded(index: Path) -> StateDict:
    tensors: StateDict = {}
    for shard in _shards(index):
        path = index.with_name(shard)
        if not path.is_file():
            raise CheckpointError(f"{index} names {shard}, which is not there; copy the folder again, with every shard")
        tensors |= read_tensors(path)
    return tensors


def found_there(folder: Path) -> str:
    """List the first names in a folder, in words."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}" if names else "nothing"
