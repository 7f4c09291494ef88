"""ONNX models on disk: the graph in one file, its larger tensors in one file beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ditc.errors import InputError
from ditc.files import writing

__all__ = ["data_path", "load_graph", "save_derived", "save_graph", "save_sharing_data"]

INLINE_BYTES = 1024  # smaller tensors stay in the .onnx file
INLINE_LIMIT_BYTES = 64 << 20  # changed weights beyond this get a file of their own; one protobuf holds 2 GB at most


def data_path(path: Path) -> Path:
    """Return the file of a model's larger tensors."""
    return path.with_name(f"{path.name}.data")


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a model with its larger tensors in one file beside it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, path, external_data=data_path(path).name, size_threshold_bytes=INLINE_BYTES)


def save_sharing_data(model: ir.Model, path: Path) -> None:
    """Write a model whose larger tensors stay in the files they were loaded from, in the same folder."""
    with writing(path):
        ir.save(model, path)


def save_derived(model: ir.Model, path: Path) -> None:
    """Write a model that was loaded from the same folder and changed.

    Unchanged weights stay in the file they came from; where much has changed, all go to a file of the model's own.
    """
    changed = sum(bytes_in_memory(value) for value in model.graph.initializers.values())
    (save_sharing_data if changed < INLINE_LIMIT_BYTES else save_graph)(model, path)


def bytes_in_memory(value: ir.Value) -> int:
    """Size of a constant that the graph itself holds; 0 for one in a file beside it."""
    tensor = value.const_value
    return 0 if tensor is None or isinstance(tensor, ir.ExternalTensor) else int(tensor.nbytes)


def load_graph(path: Path) -> ir.Model:
    """A model from disk; larger tensors stay memory-mapped until they are read.

    onnx_ir takes none out of a link, nor out of a file that has two names, as caches of model hubs have them: those are
    mapped here, and are the model's own from then on.
    """
    try:
        model = ir.load(path)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and _is_shared(file := path.parent / tensor.location):
                value.const_value = _mapped(tensor, file)
    except OSError as e:
        raise InputError(f"can't read {path}: {e.strerror or e}") from e
    return model


def _is_shared(file: Path) -> bool:
    return file.is_symlink() or file.stat().st_nlink > 1


def _mapped(tensor: ir.ExternalTensor, file: Path) -> ir.TensorProtocol:
    dtype, shape = tensor.dtype.numpy(), tuple(tensor.shape.numpy())
    array = np.memmap(file, dtype, "r", tensor.offset or 0, shape)
    return ir.Tensor(array, name=tensor.name, doc_string=tensor.doc_string)
