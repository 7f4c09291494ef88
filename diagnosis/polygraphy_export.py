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
from ditc.diagnosis.polygraphy_commands import SCRIPTS, SegmentFacts, loader_name, script_text
from ditc.engines.backend import lowered_path
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.recording import RecordedRun, RecordingBackend
from ditc.errors import InputError
from ditc.files import atomic_folder
from ditc.guidance import Guidance
from ditc.program import CONDITION, LABELS, REUSE_ROWS, TIMESTEPS, Program
from ditc.runtime.conditioning import condition_tables
from ditc.runtime.pipeline import Pipeline
from ditc.spec import Record
from ditc.tables import step_inputs

__all__ = ["PolygraphyExport", "RecordedSegment", "export_polygraphy", "recorded_calls", "recorded_runs"]

Runs = Mapping[str, Sequence[RecordedRun]]

TITLE = "# Polygraphy on the segments of a bundle"


class RecordedSegment(Record):
    """How many calls of a segment were recorded, with inputs of which shapes.

    `steps` are those it was recorded at, none for one that runs outside the loop.
    """

    points: int
    steps: tuple[int, ...]
    inputs: dict[str, tuple[int, ...]]


class PolygraphyExport(Record):
    """What was written into `folder`; `tensorrt` says whether there is anything for TensorRT in it."""

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
    """Which calls of each segment to record: at most `points`, spread from the first call to the last."""
    counts = Counter({CONDITION: 1}) + Counter(step.segment for step in program.steps) + Counter(program.epilogue)
    return {
        name: sorted({int(call) for call in np.linspace(0, count - 1, min(points, count)).round()})
        for name, count in counts.items()
    }


def recorded_runs(bundle: Bundle, points: int) -> dict[str, list[RecordedRun]]:
    """What the engine of every segment was bound to at `points` of its calls, along one request of the bundle."""
    manifest = bundle.manifest
    backend = RecordingBackend(OnnxRuntimeBackend(), recorded_calls(manifest.program, points))
    labels = manifest.model.labels_in_turn(0, manifest.batch)
    with Pipeline(bundle, backend=backend) as pipe:
        for _ in pipe.generate(labels):
            pass
    return backend.runs | {CONDITION: [with_every_row(bundle, labels, run) for run in backend.runs[CONDITION]]}


def with_every_row(bundle: Bundle, labels: list[int], run: RecordedRun) -> RecordedRun:
    """A run of `condition` with a label for each network row, as an engine of fixed shapes takes it.

    On the CPU it was given each label once.
    """
    rows = Guidance.of(bundle.manifest.model, bundle.manifest.guidance).labels(labels)
    session = OnnxRuntimeBackend().session(bundle.segment_path(CONDITION))
    tables = condition_tables(session, run.inputs[TIMESTEPS], rows)
    return RecordedRun(run.call, {**run.inputs, LABELS: rows}, tables)


def segment_facts(bundle: Bundle, name: str, runs: Sequence[RecordedRun]) -> SegmentFacts:
    """What the commands of a segment need, read from its graph and its recorded runs."""
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
        quantized_inputs=(step_inputs(bundle.tables()).keys() - {REUSE_ROWS}) & runs[0].inputs.keys(),
        typed_only=[] if typed is None else tensors_with(bundle.path / typed, OVER_MAGNITUDE),
    )


def tensors_with(segment: Path, text: str) -> list[str]:
    """Names of inner tensors of a graph that have a text in them."""
    from ditc.exporter.onnx_files import load_graph

    return [str(value.name) for node in load_graph(segment).graph for value in node.outputs if text in str(value.name)]


def _inside(bundle: Bundle, path: Path) -> str:
    return path.relative_to(bundle.path).as_posix()


def _rms(values: np.ndarray[Any, Any]) -> float:
    """Root mean square of what is finite: a run that diverges is worth a look as well."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


def _write_inputs(folder: Path, runs: Runs) -> None:
    """NAME.npz per segment: each input stacked over its points, (points, ...)."""
    folder.mkdir()
    for name, recorded in runs.items():
        stacked: dict[str, Any] = {key: np.stack([run.inputs[key] for run in recorded]) for key in recorded[0].inputs}
        np.savez(folder / f"{name}.npz", **stacked)


def _write_loaders(folder: Path, bundle: Bundle, facts: Sequence[SegmentFacts]) -> None:
    """A data loader for the portable form and one for TensorRT's, each with the types that its graph takes."""
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


def readme(bundle: Bundle, facts: Sequence[SegmentFacts]) -> str:
    """The page that goes with the folder."""
    names = ", ".join(f"`{part.name}`" for part in facts)
    with_tensorrt = any(part.typed is not None for part in facts)
    tensorrt = TENSORRT_NOTES if with_tensorrt else NO_TENSORRT_NOTES.format(precision=bundle.manifest.precision)
    rows = "".join(
        f"| `{script.name}` | {script.head.splitlines()[0].rstrip('.')} |\n"
        for script in SCRIPTS
        if script_text(script, facts, ".") is not None
    )
    return README.format(title=TITLE, model=bundle.manifest.model.name, names=names, scripts=rows, tensorrt=tensorrt)


LOADER = '''\
"""Inputs of segment {segment}, recorded along a real trajectory, in the types that {form} takes.

For Polygraphy's --data-loader-script; needs NumPy only.
"""

from pathlib import Path

import numpy as np

POINTS = Path(__file__).resolve().parent / "inputs" / "{segment}.npz"
TYPES = {{
{types}}}


def load_data():
    """Yield the inputs of every recorded point: name -> array."""
    with np.load(POINTS, allow_pickle=False) as file:
        stacked = {{name: file[name].astype(kind) for name, kind in TYPES.items()}}
    for point in range(min(map(len, stacked.values()))):
        yield {{name: values[point] for name, values in stacked.items()}}


def load_first():
    """Yield the first point alone, for commands that save every tensor."""
    yield next(load_data())
'''

README = """\
{title}

Made by `ditc export-polygraphy` from a bundle of {model}, which it left as it was. Segments: {names}.

| file | what it is |
|---|---|
| `inputs/SEGMENT.npz` | what the segment's engine was bound to at some of its calls, stacked over them |
| `loader_SEGMENT.py` | these inputs for `--data-loader-script`, in the types of the portable form |
{scripts}| `out/` | what the scripts write |

They need Polygraphy 0.53 or newer and `onnxruntime`; some also `onnx` and `onnx-graphsurgeon`:

    pip install polygraphy onnx onnxruntime onnx-graphsurgeon

The scripts work in this folder and look for the bundle where it was. `BUNDLE=PATH ./compare_onnxrt.sh` names another
place, seen from here; `./compare_onnxrt.sh full` takes one segment. They exit with 1 where something failed.

Start with `compare_onnxrt.sh`. What fails there is in the graph: `layers_onnxrt.sh` says where.

Tolerances are on the mean |difference| of an output, as a share of its RMS in the recorded run: 0.5 % where nothing is
quantized, 10 % between two forms of an INT8 graph, 20 % between INT8 and FP. Inner tensors need 15 dB of signal to
noise. They tell a wrong graph from rounding, not a good compile from a bad one: that is for `ditc verify`.

On an x86 CPU without VNNI, INT8 products of 8-bit weights saturate in ONNX Runtime, and Polygraphy can't switch that
off as ditc does: comparisons of INT8 forms in ONNX Runtime may fail there with nothing wrong in the graph.

{tensorrt}"""

TENSORRT_NOTES = """\
## TensorRT

Then `compare_tensorrt.sh`, where TensorRT is. If it fails: `layers_tensorrt.sh` for the first tensor that differs,
`reduce_tensorrt.sh` for the smallest graph that does. `loader_SEGMENT_trt.py` casts to the types of
`SEGMENT.trt.onnx`, the strongly typed form for TensorRT 10.3 to 11.4. It carries the INT8 scales: no calibration is
needed.

- 10.x only: `calibrate_tensorrt10.sh`; 11 has no calibrators.
- An engine is good for the TensorRT version, GPU and system that built it. Rebuilds are not bit-identical;
  `out/timing.cache` makes them quicker and more alike.
- Polygraphy lets an engine run host code while it loads it. Only give it plans that you built yourself.
"""

NO_TENSORRT_NOTES = """\
This bundle is {precision} and has no form for TensorRT (`SEGMENT.trt.onnx`), so everything for TensorRT is left out.
Compile it with `--precision w8a8` to have it.
"""
