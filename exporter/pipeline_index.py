"""`model_index.json` of a pipeline of diffusers: the class that each part is loaded with, whatever its file says."""

from __future__ import annotations

from pathlib import Path

from ditc.errors import CheckpointError
from ditc.exporter.config_files import read_json, spelled

__all__ = ["INDEX_FILE", "class_in_index"]

INDEX_FILE = "model_index.json"


def class_in_index(folder: Path, part: str) -> str | None:
    """The class of a pipeline's part, None where the index says nothing of it. Raises CheckpointError."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    entry = read_json(path, "the index of a pipeline").get(part)
    if entry is None or entry == [None, None]:
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise CheckpointError(f"{path}: {part} is {spelled(entry)}, expected a library and a class of it")
    return entry[1]
