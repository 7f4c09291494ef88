"""The stage that exports: every FP segment as ONNX, held to torch; and digests that tell models apart."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from ditc.compiler.plan import Plan
from ditc.compiler.work import write_json
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.host_memory import return_free_memory

__all__ = ["behaviour_digest", "export", "model_digest", "parity_of"]


def model_digest(model: Any) -> str:
    """Return the SHA-256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def behaviour_digest(model: Any) -> str:
    """Return a digest of what the model computes: of settings that its weights don't show, as heads."""
    import torch

    from ditc.exporter.protocol import example_inputs

    with torch.no_grad():
        out = model(*example_inputs(model.spec, 2))
    return hashlib.sha256(np.ascontiguousarray(out.numpy()).tobytes()).hexdigest()


def export(plan: Plan, model: Any, folder: Path) -> None:
    """Write every FP segment as ONNX, each checked against torch; the errors go to parity.json."""
    from ditc.exporter.onnx_export import export_segment
    from ditc.exporter.segments import segments_of

    total = 1 + len(plan.cached_program.segments) + len(plan.cached_program.epilogue)
    parity = {}
    for done, segment in enumerate(segments_of(model, plan.cached_program)):
        plan.progress("export", done, total)
        path = folder / f"{segment.name}.onnx"
        export_segment(segment, path, plan.spec.branches)
        return_free_memory()
        parity[segment.name] = parity_of(plan.backend, segment, path)
    write_json(folder / "parity.json", parity)


def parity_of(backend: OnnxRuntimeBackend, segment: Any, path: Path) -> float:
    """Return the error of an exported segment against torch; its session is gone before the next one is made."""
    from ditc.exporter.onnx_export import parity_error

    session, names = backend.session(path), list(segment.outputs)
    inputs = {port.name for port in session.get_inputs()}

    def run(feeds: dict[str, Any]) -> dict[str, Any]:
        own = {name: array for name, array in feeds.items() if name in inputs}
        return dict(zip(names, session.run(names, own), strict=True))

    return parity_error(segment, run)
