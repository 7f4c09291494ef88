"""A bundle as text: what `ditc inspect` prints."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from ditc.bundle import Bundle
from ditc.errors import BundleError
from ditc.precision import quantized
from ditc.program import Program
from ditc.quantize.scale_table import ScaleTable
from ditc.report.wording import megabytes
from ditc.tables import SCALES_INPUT, step_inputs

__all__ = ["bundle_facts", "schedule_map", "step_runs"]


def step_runs(program: Program) -> Iterator[dict[str, Any]]:
    """The steps as rows of a table; neighbouring steps that make the same call are one row."""
    steps = list(program.steps)
    for (segment, reads, writes), group in groupby(steps, key=lambda s: (s.segment, len(s.reads), len(s.writes))):
        run = list(group)
        last = f"-{run[-1].index}" if len(run) > 1 else ""
        times = f"{run[0].t:g}" + (f" .. {run[-1].t:g}" if len(run) > 1 else "")
        yield {"steps": f"{run[0].index}{last}", "t": times, "segment": segment, "reads": reads, "writes": writes}


def schedule_map(program: Program) -> list[str]:
    """One line per branch, one mark per step: # computed, f computed in floating point, . reused."""
    marks_of = {
        plan.name: ["." if not computes else "f" if plan.in_float else "#" for computes in plan.compute]
        for plan in program.segments
    }
    width = max(len(name) for name in program.branches)
    lines = []
    for number, branch in enumerate(program.branches):
        marks = "".join(marks_of[step.segment][number] for step in program.steps)
        lines.append(f"{branch:<{width}}  {marks}")
    return lines


def calibration_comparisons(bundle: Bundle) -> list[dict[str, Any]]:
    """What each calibrator of TensorRT 10 found beside this bundle's engines, against the bundle's own scales.

    `ratios` are the calibrator's scale over ours by linear layer; layers whose tensor it does not know are left out.
    """
    from ditc.engines.calibrator import calibration_caches, scales_from_cache

    table_file = bundle.path / "calib" / "scales.json"
    if not table_file.is_file():
        return []
    table = ScaleTable.model_validate_json(table_file.read_bytes())
    rows = []
    for cache in calibration_caches(bundle):
        found = scales_from_cache(cache.read_bytes())
        ratios = {
            path: found[name] / table.scales[path]
            for path, name in table.tensors.items()
            if name in found and path in table.scales
        }
        rows.append({"file": cache.name, "layers": len(ratios), "ratios": ratios})
    return rows


def activation_scales(bundle: Bundle) -> str:
    """How the activation scales are bound, and how far those of one activation lie apart."""
    binding = str(bundle.manifest.settings.get("scales", "static"))
    magnitudes = step_inputs(bundle.tables()).get(SCALES_INPUT)
    if magnitudes is None:
        return f"{binding} scales"
    different = len(np.unique(magnitudes, axis=0))
    spread = float((magnitudes.max(axis=0) / magnitudes.min(axis=0)).max())
    return f"{binding} scales, {different} for each of {magnitudes.shape[1]} tensors, up to {spread:.2f} x apart"


def bundle_facts(bundle: Bundle) -> dict[str, str]:
    """The headline facts of a bundle, name -> text. Raises BundleError where they aren't there to be told."""
    try:
        return _facts(bundle)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise BundleError(
            f"the `checks` in the manifest of {bundle.path} are not those of a compile ({e!r}); compile it again"
        ) from e


def _facts(bundle: Bundle) -> dict[str, str]:
    m = bundle.manifest
    called = [m.program.segment(step.segment) for step in m.program.steps]
    computed, in_float = sum(any(plan.compute) for plan in called), sum(plan.in_float for plan in called)
    unquantized = f" ({in_float} of them in floating point)" if in_float else ""
    facts = {
        "model": f"{m.model.name} ({m.model.family}, {m.model.parameters / 1e6:,.2f} M parameters)",
        "latent": " x ".join(str(size) for size in m.model.latent_shape),
        "precision": m.precision,
        "trajectory": f"{len(m.program.steps)} steps, {computed} computed{unquantized}, guidance {m.guidance:g}",
        "cache": f"{m.program.slots} slots for {len(m.program.branches)} branches, reuse {m.program.reuse}",
        "size": f"{megabytes(m.size_bytes(reference=False))} deployed, "
        f"{megabytes(m.size_bytes(reference=True))} FP reference",
    }
    smoothed = m.checks.get("smooth")
    if isinstance(smoothed, dict):
        facts["smoothing"] = "{method}: {smoothed} of {linears} linear layers".format(**smoothed)
    kernels = m.checks.get("kernels")
    if isinstance(kernels, dict):
        facts["integer kernels"] = ", ".join(
            f"{name}: {found['integer']} of {found['linears']} linear layers"
            for name, found in kernels.items()
            if isinstance(found, dict)
        )
    if quantized(m.precision):
        facts["activations"] = activation_scales(bundle)
    rules = m.checks.get("tensorrt")
    if isinstance(rules, dict):
        broken = [text for found in rules.values() if isinstance(found, list) for text in found]
        verdict = f"{len(broken)} rules broken: {broken[0]}" if broken else "no rule broken"
        facts["TensorRT form"] = f"{len(rules)} segments, {verdict}"
    verified = m.checks.get("verify")
    if isinstance(verified, dict):
        facts["against FP"] = f"PSNR {verified['psnr_db_mean']:.1f} dB mean over {verified['images']} images"
    compensation = m.checks.get("compensation")
    if isinstance(compensation, dict):
        least, mean, most = (compensation[name] for name in ("k_min", "k_mean", "k_max"))
        facts["compensation"] = f"K {least:.4f} to {most:.4f}, mean {mean:.4f}"
    return facts
