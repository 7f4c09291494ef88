"""A bundle as text, for `ditc inspect` and `ditc compile`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from ditc.bundle import Bundle, Manifest
from ditc.checks import TextCheck, Watched
from ditc.errors import BundleError
from ditc.manifest import PROMPTS
from ditc.precision import quantized
from ditc.program import Program
from ditc.quantize.scale_table import ScaleTable
from ditc.report.wording import megabytes
from ditc.spec import ModelSpec, Record
from ditc.tables import SCALES_INPUT, step_inputs
from ditc.text_spec import TextSpec

__all__ = [
    "CalibrationComparison",
    "CompiledBundle",
    "Inspection",
    "StepRun",
    "bundle_facts",
    "inspected",
    "schedule_map",
    "step_runs",
]


LARGEST_HALF = 65504.0  # of FP16


class StepRun(Record):
    """Neighbouring steps that make the same call: numbers and timesteps as text, slots that each reads and writes."""

    steps: str
    t: str
    segment: str
    reads: int
    writes: int


class CalibrationComparison(Record):
    """A calibrator's scales over the bundle's own, by linear layer; `file` is its cache beside the engines."""

    file: str
    layers: int
    ratios: dict[str, float]


class CompiledBundle(Record):
    """A bundle that `ditc compile` made, and its place."""

    bundle: str
    manifest: Manifest


class Inspection(Manifest):
    """A bundle's manifest, and what calibrators of TensorRT 10 found beside its engines."""

    calibrations: tuple[CalibrationComparison, ...]


def inspected(bundle: Bundle) -> Inspection:
    """Return all that `ditc inspect` knows of a bundle."""
    return Inspection(**dict(bundle.manifest), calibrations=tuple(calibration_comparisons(bundle)))


def step_runs(program: Program) -> Iterator[StepRun]:
    """Yield the steps as rows of a table; neighbouring steps that make the same call are one row."""
    steps = list(program.steps)
    for (segment, reads, writes), group in groupby(steps, key=lambda s: (s.segment, len(s.reads), len(s.writes))):
        run = list(group)
        last = f"-{run[-1].index}" if len(run) > 1 else ""
        times = f"{run[0].t:g}" + (f" .. {run[-1].t:g}" if len(run) > 1 else "")
        yield StepRun(steps=f"{run[0].index}{last}", t=times, segment=segment, reads=reads, writes=writes)


def schedule_map(program: Program) -> list[str]:
    """Return one line per branch, one mark per step: # computed, f computed in floating point, . reused."""
    marks_of = {
        segment.name: ["." if not computes else "f" if segment.in_float else "#" for computes in segment.compute]
        for segment in program.segments
    }
    width = max((len(name) for name in program.branches), default=0)
    lines = []
    for number, branch in enumerate(program.branches):
        marks = "".join(marks_of[step.segment][number] for step in program.steps)
        lines.append(f"{branch:<{width}}  {marks}")
    return lines


def calibration_comparisons(bundle: Bundle) -> list[CalibrationComparison]:
    """Hold what each calibrator of TensorRT 10 found beside this bundle's engines against the bundle's own scales.

    Layers whose tensor a calibrator does not know are left out.
    """
    from ditc.engines.calibrator import calibration_caches, scales_from_cache

    table_file = bundle.path / "calib" / "scales.json"
    if not table_file.is_file():
        return []
    table = ScaleTable.model_validate_json(table_file.read_bytes())
    rows = []
    for cache in calibration_caches(bundle):
        scales = scales_from_cache(cache.read_bytes())
        ratios = {
            path: scales[name] / table.scales[path]
            for path, name in table.tensors.items()
            if name in scales and path in table.scales
        }
        rows.append(CalibrationComparison(file=cache.name, layers=len(ratios), ratios=ratios))
    return rows


def activation_scales(bundle: Bundle) -> str:
    """Return the binding of activation scales, and the distance between those of one activation."""
    binding = bundle.manifest.scales
    magnitudes = step_inputs(bundle.tables()).get(SCALES_INPUT)
    if magnitudes is None:
        return f"{binding} scales"
    different = len(np.unique(magnitudes, axis=0))
    spread = float((magnitudes.max(axis=0) / magnitudes.min(axis=0)).max())
    return f"{binding} scales, {different} for each of {magnitudes.shape[1]} tensors, up to {spread:.2f} x apart"


def conditions_sentence(spec: ModelSpec) -> str:
    """Return what an image of a model is asked for with, beside the sample: "y of 10 classes, style (4)"."""
    told = []
    for each in spec.inputs:
        shape = f" ({', '.join(map(str, each.shape))})" if each.shape else ""
        kind = "" if each.classes is None else f" of {each.classes} classes"
        null = {"same": ""}.get(str(each.null), f", null {each.null}")
        told.append(f"{each.name}{shape}{kind}{', fresh at every step' if each.fresh else null}")
    return "; ".join(told) or "none"


def encoder_sentence(encoder: TextSpec, check: TextCheck | None) -> str:
    """Return what a text encoder reads and gives, and whether its activations fit FP16."""
    given = ", ".join(encoder.conditions)
    told = f"{encoder.kind}, {encoder.parameters / 1e6:,.2f} M parameters, {encoder.length} tokens to {given}"
    if check is None:
        return told
    fits = "within" if check.largest_activation <= LARGEST_HALF else "beyond"
    return f"{told}; activations up to {check.largest_activation:.3g}, {fits} FP16"


def _changes(watched: Watched) -> str:
    """Return the mean change from each step to the next of each kind of branch, where it was looked at."""
    means = {kind: np.mean([row[0] for row in rows if row]) for kind, rows in watched.changes.items()}
    each = ", ".join(f"{kind} {mean:.3g}" for kind, mean in means.items())
    return f"; change from step to step: {each}" if each else ""


def bundle_facts(bundle: Bundle) -> dict[str, str]:
    """Return the headline facts of a bundle, name -> text. Raises BundleError where they aren't there to be told."""
    try:
        return _facts(bundle)
    except BundleError as e:
        raise BundleError(f"{bundle.path}: {e}") from e


def _facts(bundle: Bundle) -> dict[str, str]:
    m = bundle.manifest
    measured = m.measured("text", "watch", "smooth", "rotate", "kernels", "tensorrt", "verify", "compensation")
    called = [m.program.segment(step.segment) for step in m.program.steps]
    computed, in_float = sum(segment.computes for segment in called), sum(segment.in_float for segment in called)
    unquantized = f" ({in_float} of them in floating point)" if in_float else ""
    facts = {
        "model": f"{m.model.name} ({m.model.family}, {m.model.parameters / 1e6:,.2f} M parameters)",
        "latent": " x ".join(str(size) for size in m.model.latent_shape),
        **({"conditions": conditions_sentence(m.model)} if m.model.conditions or not m.model.inputs else {}),
        "precision": m.precision,
        "trajectory": f"{len(m.program.steps)} steps, {computed} computed{unquantized}, guidance {m.guidance:g}",
        "cache": f"{m.program.slots} slots for {len(m.program.branches)} branches, reuse {m.program.reuse}",
        "size": f"{megabytes(m.size_bytes(reference=False))} deployed, "
        f"{megabytes(m.size_bytes(reference=True))} FP reference",
    }
    for encoder in m.text or ():
        facts[f"text {encoder.name}"] = encoder_sentence(encoder, (measured.text or {}).get(encoder.name))
    if m.prompts is not None:
        facts["prompts"] = f"{m.prompts.count} of {m.prompts.source}, in {PROMPTS}"
    if (watched := measured.watch) is not None:
        facts["watched"] = f"{watched.images} FP images{_changes(watched)}"
    if (smooth := measured.smooth) is not None:
        facts["smoothing"] = f"{smooth.method}: {smooth.smoothed} of {smooth.linears} linear layers"
    if (rotated := measured.rotate) is not None:
        facts["rotation"] = (
            f"groups of {rotated.size} channels: {len(rotated.folded)} of {rotated.linears} linear layers read it for "
            f"nothing, {rotated.products} products in front of the others"
        )
    if measured.kernels is not None:
        facts["integer kernels"] = ", ".join(
            f"{name}: {kernels.integer} of {kernels.linears} linear layers"
            for name, kernels in measured.kernels.items()
        )
    if quantized(m.precision):
        facts["activations"] = activation_scales(bundle)
    if measured.tensorrt is not None:
        broken = [sentence for sentences in measured.tensorrt.values() for sentence in sentences]
        verdict = f"{len(broken)} rules broken: {broken[0]}" if broken else "no rule broken"
        facts["TensorRT form"] = f"{len(measured.tensorrt)} segments, {verdict}"
    if (verified := measured.verify) is not None:
        facts["against FP"] = f"PSNR {verified.psnr_db_mean:.1f} dB mean over {verified.images} images"
    if (k := measured.compensation) is not None:
        facts["compensation"] = f"K {k.k_min:.4f} to {k.k_max:.4f}, mean {k.k_mean:.4f}"
    return facts
