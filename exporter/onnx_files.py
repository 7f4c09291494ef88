"""ONNX models on disk: the graph in one file, its larger tensors in one file beside it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ditc.errors import InputError
from ditc.files import writing

__all__ = ["data_path", "load_model", "save_model", "save_sharing_data"]

INLINE_BYTES = 1024  # smaller tensors stay in the .onnx file


def data_path(path: Path) -> Path:
    """Where the larger tensors of a model lie."""
    return path.with_name(f"{path.name}.data")


def save_model(model: ir.Model, path: Path) -> None:
    """Write a model with its larger tensors in one file beside it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, path, external_data=data_path(path).name, size_threshold_bytes=INLINE_BYTES)


def save_sharing_data(model: ir.Model, path: Path) -> None:
    """Write a model whose larger tensors stay in the files they were loaded from, in the same folder."""
    with writing(path):
        ir.save(model, path)


def load_model(path: Path) -> ir.Model:
    """A model from disk; larger tensors stay memory-mapped until they are read."""
    try:
        return ir.load(path)
    except OSError as e:
        raise InputError(f"can't read {path}: {e.strerror or e}") from e
