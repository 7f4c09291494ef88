"""The task of a bundle and its peers: the same network, samples, timesteps, labels and guidance.

They are compared at one step that computes, in the middle of the bundle's own run; the bundle's samples at its other
computing steps calibrate the peers that quantize.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle, Manifest
from ditc.choices import BuiltIn, names_of
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.recording import RecordingBackend
from ditc.errors import InputError
from ditc.loras import Lora
from ditc.program import CONDITION, FULL
from ditc.requests import Request
from ditc.runtime.closeness import relative_error
from ditc.runtime.conditioning import condition_tables, of_step
from ditc.runtime.executor import Samples, seeded_request
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.reference_run import GuidedRun
from ditc.tables import tables_of_steps

if TYPE_CHECKING:
    from ditc.exporter.model_facts import ModelFacts

__all__ = ["ModelChoice", "PeerTask", "bench_request", "peer_task_of"]

CALIBRATION_POINTS = 16  # at most, of the bundle's own run, for peers that quantize
# relative error of a torch model's output against the bundle's FP reference, whose conditioning may be stored as FP16
SAME_MODEL = 3e-3


@dataclass(frozen=True)
class ModelChoice:
    """The torch model that a user names, as `compile` takes it; without a name, the one that the manifest tells."""

    name: str | None = None
    heads: int | None = None
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True)
class PeerTask:
    """The run that a bundle and its peers are all measured on.

    `reference` is the FP segment of a computing step, with nothing but the prediction as output. `expected` is what it
    gives for the samples `x` at step `index`, (rows, channels, *space), `bundle_output` what the bundle gives.
    `conditions` are those of all rows, `tables` the bundle's conditioning, each (steps, rows, ...), and its
    tables of timesteps alone, (steps, ...). `points` are (step,
    samples) to calibrate with. Peers write files to `scratch`.
    """

    bundle: Bundle
    reference: Path
    run: GuidedRun
    conditions: Mapping[str, NDArray[Any]]
    tables: Mapping[str, NDArray[Any]]
    index: int
    x: Samples
    expected: Samples
    bundle_output: Samples
    points: tuple[tuple[int, Samples], ...]
    scratch: Path
    choice: ModelChoice

    def feeds(self, index: int, rows: Samples) -> dict[str, NDArray[Any]]:
        """Return the inputs of the FP segment at a step, for all rows of the network."""
        return _feeds(self.tables, index, rows)

    def calibration(self) -> list[dict[str, NDArray[Any]]]:
        """Return the same at every calibration point."""
        return [self.feeds(index, self.run.guidance.rows(x)) for index, x in self.points]

    def error(self, out: Samples) -> float:
        """Return the relative error of an output against the FP one at the step that is compared."""
        return relative_error(out, self.expected)

    @cached_property
    def model(self) -> Any:
        """The torch model, held to the FP reference with one forward pass. Raises InputError for another one."""
        return _checked_model(self)


def bench_request(bundle: Bundle) -> Request:
    """Return the request of a full batch: its classes and other conditions in turn."""
    return bundle.examples().in_turn(0, bundle.manifest.batch)


def peer_task_of(bundle: Bundle, choice: ModelChoice, scratch: Path) -> PeerTask:
    """Return the task of a bundle that has its FP reference. Raises InputError where a named model is another one."""
    run = GuidedRun.of(bundle)
    request, _, _ = seeded_request(run.spec, bench_request(bundle), 0, 0, run.steps)
    conditions = run.guidance.row_conditions(request)
    before, bundle_output = _own_run(bundle)
    computing = sorted(before)
    index = computing[len(computing) // 2]
    condition = OnnxRuntimeBackend().session(bundle.reference_path(CONDITION))
    reference = _bare_reference(bundle, scratch)
    session = OnnxRuntimeBackend().session(reference)
    ports = {port.name for port in session.get_inputs()}
    tables = condition_tables(condition, run.columns["t"], conditions) | tables_of_steps(bundle.tables())
    tables = {name: table for name, table in tables.items() if name in ports}
    feeds = _feeds(tables, index, run.guidance.rows(before[index]))
    expected = session.run(["out"], feeds)[0]
    task = PeerTask(
        bundle=bundle,
        reference=reference,
        run=run,
        conditions=conditions,
        tables=tables,
        index=index,
        x=before[index],
        expected=np.asarray(expected),
        bundle_output=bundle_output,
        points=tuple((i, before[i]) for i in computing[:: -(-len(computing) // CALIBRATION_POINTS)]),
        scratch=scratch,
        choice=choice,
    )
    if choice.name is not None or choice.loras:
        _ = task.model  # a wrong one is refused before anything is measured
    return task


def _own_run(bundle: Bundle) -> tuple[dict[int, Samples], Samples]:
    """Return (samples before every call of `full`, what the bundle's network gave at the middle one of them)."""
    program = bundle.manifest.program
    calls = sum(step.segment == FULL for step in program.steps)
    recorder = RecordingBackend(OnnxRuntimeBackend(), {FULL: {calls // 2}})
    with Pipeline(bundle, backend=recorder) as pipe:
        events = pipe.generate(bench_request(bundle), seed=0)
        before = {event.index: event.before for event in events if event.segment == FULL}
    return before, np.asarray(recorder.runs[FULL][0].outputs["out"])


def _feeds(tables: Mapping[str, NDArray[Any]], index: int, rows: Samples) -> dict[str, NDArray[Any]]:
    return {"x": rows, **of_step(tables, index)}


def _bare_reference(bundle: Bundle, scratch: Path) -> Path:
    """Write the FP segment of a computing step with its prediction as only output: a peer leaves nothing for later."""
    from ditc.exporter.onnx_files import load_graph, save_graph
    from ditc.quantize.segment_outputs import keep_outputs

    path = scratch / "reference.onnx"
    model = load_graph(bundle.reference_path(bundle.manifest.program.steps[0].segment))
    keep_outputs(model, [value for value in model.graph.outputs if value.name == "out"])
    save_graph(model, path)
    return path


def known_model(manifest: Manifest) -> str:
    """Return the model that a bundle was compiled from, by its manifest. Raises InputError where that doesn't tell."""
    name = manifest.model.name
    if name in names_of(BuiltIn):
        return name
    if random := re.fullmatch(r"(dit-\w+-\d+-\d+)-random", name):
        return f"random:{random[1]}:{manifest.asked.seed or 0}"
    raise InputError(f"a torch model is needed, and the bundle tells only its name, {name}; give it with --model")


def _known_facts(manifest: Manifest, name: str) -> ModelFacts | None:
    """Return the facts that a bundle's file or folder was read with, as far as they change a forward pass."""
    from ditc.exporter.model_facts import ModelFacts

    spec = manifest.model
    if Path(name).is_file():
        return ModelFacts(classes=spec.num_classes, null_class=spec.null_label is not None)
    texts = [condition.shape[0] for condition in spec.conditions if condition.name == "text"]
    return ModelFacts(text_tokens=texts[0]) if texts and Path(name).is_dir() else None


def _checked_model(task: PeerTask) -> Any:
    from ditc.exporter.models import load_model
    from ditc.speed.eager import eager_forward

    manifest, choice = task.bundle.manifest, task.choice
    name = choice.name or known_model(manifest)
    model = load_model(name, num_heads=choice.heads, facts=_known_facts(manifest, name), loras=choice.loras)
    if model.spec.space != manifest.model.space and hasattr(model, "take_space"):
        model.take_space(manifest.model.space)
    advice = f"name the one that {task.bundle.path} was compiled from with --model"
    if manifest.model.loras and not choice.loras:
        advice += f", and with --lora {', '.join(lora.file for lora in manifest.model.loras)}"
    for kind in ("latent_shape", "out_channels", "num_classes", "conditions", "branches"):
        own, wanted = getattr(model.spec, kind), getattr(manifest.model, kind)
        if own != wanted:
            raise InputError(f"{name} is another model: its {kind} is {own}, expected {wanted}; {advice}")
    forward = eager_forward(model, task.run.columns["t"], task.conditions, next(model.parameters()).dtype)
    error = task.error(forward(task.index, task.run.guidance.rows(task.x)))
    if not error < SAME_MODEL:
        raise InputError(
            f"{name} is another model: its output is {error:.2g} from the bundle's FP reference (relative), "
            f"expected below {SAME_MODEL:g}; {advice}"
        )
    return model
