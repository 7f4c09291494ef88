"""`ditc export-polygraphy` as a function: a bundle in, a folder of recorded inputs, data loaders and scripts out.

The inputs are what the engines of a real run were bound to, cached ones included. Nothing here imports Polygraphy:
the folder is for a machine that has it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ditc.bundle import Bundle, open_bundle
from ditc.diagnosis.polygraphy_commands import SegmentFacts, loader_name
from ditc.diagnosis.polygraphy_scripts import SCRIPTS, script_text
from ditc.diagnosis.polygraphy_texts import LOADER, TITLE, readme
from ditc.engines.backend import lowered_path
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.recording import RecordedRun, RecordingBackend
from ditc.errors import InputError
from ditc.files import atomic_folder
from ditc.guidance import Guidance
from ditc.program import CONDITION, TIMESTEPS, Program
from ditc.requests import Request
from ditc.runtime.conditioning import condition_tables
from ditc.runtime.executor import seeded_request
from ditc.runtime.pipeline import Pipeline
from ditc.spec import Record
from ditc.tables import MIDPOINTS_INPUT, SCALES_INPUT

__all__ = ["PolygraphyExport", "RecordedSegment", "export_polygraphy", "recorded_calls", "recorded_runs"]

Runs = Mapping[str, Sequence[RecordedRun]]


class RecordedSegment(Record):
    """The recorded calls of a segment: how many, and the shapes of their inputs.

    `steps` are those it was recorded at, none for one that runs outside the loop.
    """

    points: int
    steps: tuple[int, ...]
    inputs: dict[str, tuple[int, ...]]


class PolygraphyExport(Record):
    """The files written into `folder`; `tensorrt` says whether there is anything for TensorRT in it."""

    folder: str
    tensorrt: bool
    segments: dict[str, RecordedSegment]
    files: tuple[str, ...]


def export_polygraphy(bundle: Path, out: Path, *, points: int = 4, force: bool = False) -> PolygraphyExport:
    """Write everything that Polygraphy needs to compare, inspect and reduce the segments of a bundle into `out`.

    `points` is how many calls of each segment are recorded. Returns the recorded steps and input shapes per segment,
    and the files. Raises InputError where `out` exists (with `force`: unless it is an earlier export) or has to do
    with the bundle.
    """
    if points < 1:
        raise InputError(f"--points must be at least 1, found {points}")
    target = out.absolute()
    _check_target(target, bundle, force)
    opened = open_bundle(bundle)
    runs = recorded_runs(opened, points)
    facts = [segment_facts(opened, name, recorded) for name, recorded in runs.items()]
    place = os.path.relpath(bundle.resolve(), target.parent.resolve() / target.name)
    with atomic_folder(target) as folder:
        _write_inputs(folder / "inputs", runs)
        _write_loaders(folder, opened, facts)
        # a script has the bytes of the path, whatever they say in the locale
        _write_scripts(folder, facts, os.fsencode(Path(place).as_posix()).decode(errors="surrogateescape"))
        (folder / "README.md").write_text(readme(opened, facts), "utf-8")
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return PolygraphyExport(
        folder=str(out),
        tensorrt=any(part.typed is not None for part in facts),
        segments={part.name: _recorded(opened.manifest.program, part, runs[part.name]) for part in facts},
        files=tuple(files),
    )


def _check_target(target: Path, bundle: Path, force: bool) -> None:
    real, source = target.resolve(), bundle.resolve()
    if real.is_relative_to(source) or source.is_relative_to(real):
        raise InputError(f"{target} and the bundle {bundle} lie one in the other; choose a folder beside the bundle")
    if not target.exists():
        return
    if not force:
        raise InputError(f"{target} exists already; remove it, choose another folder, or add --force")
    notes = target / "README.md"
    if not notes.is_file() or not notes.read_text(errors="replace").startswith(TITLE):
        raise InputError(f"{target} exists and was not made by export-polygraphy, so --force does not replace it")


def recorded_calls(program: Program, points: int) -> dict[str, list[int]]:
    """Choose the calls of each segment to record: at most `points`, spread from the first call to the last."""
    counts = Counter({CONDITION: 1}) + Counter(step.segment for step in program.steps) + Counter(program.epilogue)
    return {
        name: sorted({int(call) for call in np.linspace(0, count - 1, min(points, count)).round()})
        for name, count in counts.items()
    }


def recorded_runs(bundle: Bundle, points: int) -> dict[str, list[RecordedRun]]:
    """Record what the engine of every segment is bound to at `points` of its calls, along one request of the bundle."""
    manifest = bundle.manifest
    backend = RecordingBackend(OnnxRuntimeBackend(), recorded_calls(manifest.program, points))
    request = bundle.examples().in_turn(0, manifest.batch)
    with Pipeline(bundle, backend=backend) as pipe:
        for _ in pipe.generate(request):
            pass
    return backend.runs | {CONDITION: [with_every_row(bundle, request, run) for run in backend.runs[CONDITION]]}


def with_every_row(bundle: Bundle, request: Request, run: RecordedRun) -> RecordedRun:
    """Return a run of `condition` with the conditions of every network row, as an engine of fixed shapes takes it.

    On the CPU it was given equal rows once.
    """
    spec, steps = bundle.manifest.model, len(bundle.manifest.program.steps)
    drawn, _, _ = seeded_request(spec, request, 0, 0, steps)
    rows = Guidance.of(spec, bundle.manifest.guidance).row_conditions(drawn)
    session = OnnxRuntimeBackend().session(bundle.segment_path(CONDITION))
    tables = condition_tables(session, run.inputs.get(TIMESTEPS, np.empty(0)), rows)
    return RecordedRun(run.call, {**run.inputs, **rows}, tables)


def segment_facts(bundle: Bundle, name: str, runs: Sequence[RecordedRun]) -> SegmentFacts:
    """Return the facts of a segment for its commands, read from its graph and its recorded runs."""
    from ditc.exporter.onnx_files import load_graph
    from ditc.lowering.modulation_folding import OVER_MAGNITUDE

    portable = bundle.segment_path(name)
    graph = load_graph(portable).graph

    def form(backend: str) -> str | None:
        path = lowered_path(portable, backend)
        return _inside(bundle, path) if path.exists() else None

    typed = form("trt")
    return SegmentFacts(
        name=name,
        reference=_inside(bundle, bundle.reference_path(name)),
        portable=_inside(bundle, portable),
        onnxrt=form("onnxrt"),
        typed=typed,
        quantized=any(node.op_type == "QuantizeLinear" for node in graph),
        shapes={key: value.shape for key, value in runs[0].inputs.items()},
        rms={key: max(_rms(run.outputs[key]) for run in runs) for key in runs[0].outputs},
        cut=str(list(graph)[len(graph) // 2].outputs[0].name),
        quantized_inputs={SCALES_INPUT, MIDPOINTS_INPUT} & runs[0].inputs.keys(),
        typed_only=[] if typed is None else tensors_with(bundle.path / typed, OVER_MAGNITUDE),
    )


def tensors_with(segment: Path, text: str) -> list[str]:
    """Return the names of inner tensors of a graph that have a text in them."""
    from ditc.exporter.onnx_files import load_graph

    return [str(value.name) for node in load_graph(segment).graph for value in node.outputs if text in str(value.name)]


def _inside(bundle: Bundle, path: Path) -> str:
    return path.relative_to(bundle.path).as_posix()


def _rms(values: np.ndarray[Any, Any]) -> float:
    """Return the root mean square of what is finite: a run that diverges is worth a look as well."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


def _write_inputs(folder: Path, runs: Runs) -> None:
    """Write NAME.npz per segment: each input stacked over its points, (points, ...)."""
    folder.mkdir()
    for name, recorded in runs.items():
        stacked: dict[str, Any] = {key: np.stack([run.inputs[key] for run in recorded]) for key in recorded[0].inputs}
        np.savez(folder / f"{name}.npz", **stacked)


def _write_loaders(folder: Path, bundle: Bundle, facts: Sequence[SegmentFacts]) -> None:
    """Write a data loader for the portable form and one for TensorRT's, each with the types that its graph takes."""
    from ditc.exporter.onnx_files import load_graph

    for part in facts:
        for form in (part.portable, part.typed):
            if form is None:
                continue
            inputs = load_graph(bundle.path / form).graph.inputs
            types = {value.name: value.dtype.numpy().name for value in inputs if value.dtype is not None}
            rows = "".join(f"    {name!r}: {kind!r},\n" for name, kind in types.items())
            text = LOADER.format(segment=part.name, form=form, types=rows)
            (folder / loader_name(part.name, form)).write_text(text, "utf-8")


def _write_scripts(folder: Path, facts: Sequence[SegmentFacts], bundle: str) -> None:
    for script in SCRIPTS:
        text = script_text(script, facts, bundle)
        if text is not None:
            path = folder / script.name
            path.write_bytes(text.encode(errors="surrogateescape"))
            path.chmod(0o755)


def _recorded(program: Program, part: SegmentFacts, runs: Sequence[RecordedRun]) -> RecordedSegment:
    steps = [step.index for step in program.steps if step.segment == part.name]
    return RecordedSegment(
        points=len(runs),
        steps=tuple(steps[run.call] for run in runs) if steps else (),
        inputs={name: tuple(shape) for name, shape in part.shapes.items()},
    )
