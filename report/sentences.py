"""The sentences of a report and its key figures, as plain text."""

from __future__ import annotations

from collections.abc import Iterator

from ditc.approximators import APPROXIMATORS
from ditc.bundle import Manifest
from ditc.checks import Verification
from ditc.errors import BundleError
from ditc.precision import INT8, PRECISIONS
from ditc.report.facts import Drift, Fidelity, Report, Speed
from ditc.report.wording import megabytes
from ditc.tables import DYNAMIC

__all__ = [
    "SCALES_IN_WORDS",
    "integers_sentence",
    "key_figures",
    "machine_sentence",
    "program_sentence",
    "proper_name",
    "trajectory_sentence",
]

FLOAT32_BYTES = 4
SCALES_IN_WORDS = {
    "static": "one scale for all steps",
    "time-groups": "scales of their own in each group of steps",
    "per-step": "scales of their own at each step",
    DYNAMIC: "scales of the tensor as it comes",
}

Figure = tuple[str, str, str]  # a number, its unit, what it is


def key_figures(report: Report) -> Iterator[Figure]:
    """Yield speed, closeness, size and what is left to compute, as far as they are known."""
    manifest = report.manifest
    if isinstance(report.speed, Speed):
        for name, peer in list(report.speed.peers.items())[:1]:
            yield f"{peer.ratio_run:.2f}\N{MULTIPLICATION SIGN}", "", f"the speed of {name}, whole runs in turn"
        each = report.speed.seconds_per_image * 1e3
        yield f"{each:,.3g}", "ms", f"per image, {report.speed.batch} at a time"
    yield from _closeness_figure(report)
    size, floats = manifest.size_bytes(reference=False), manifest.model.parameters * FLOAT32_BYTES
    yield f"{size / 1e6:,.3g}", "MB", f"deployed; its parameters in float32 take {megabytes(floats)}"
    rows = [manifest.program.segment(step.segment).compute for step in manifest.program.steps]
    computed = sum(map(sum, rows)) / (len(rows) * len(rows[0]))
    yield f"{computed:.0%}", "", "of all branches in all steps are computed"


def _closeness_figure(report: Report) -> Iterator[Figure]:
    if isinstance(report.fidelity, Fidelity):
        psnr = report.fidelity.measures["psnr_db"]
        about = f"PSNR against FP over {report.fidelity.images} {report.fidelity.of}, worst {psnr.worst:.1f}"
        yield f"{psnr.mean:.1f}", "dB", about
    elif (verified := _verified(report.manifest)) is not None:
        about = f"PSNR against FP, measured at the compile over {verified.images} latents"
        yield f"{verified.psnr_db_mean:.1f}", "dB", about


def _verified(manifest: Manifest) -> Verification | None:
    """Return the compile's own check of its result, where it can be read."""
    try:
        return manifest.measured("verify").verify
    except BundleError:
        return None


def program_sentence(report: Report) -> str:
    """Return the whole program in one sentence."""
    manifest = report.manifest
    program, sampler = manifest.program, manifest.asked.sampler
    branches, rows = len(program.branches), [program.segment(step.segment).compute for step in program.steps]
    whole, none = sum(all(row) for row in rows), sum(not any(row) for row in rows)
    some = len(rows) - whole - none
    name = "" if sampler is None else sampler.told
    guided = f" with guidance {manifest.guidance:g}" if manifest.halves == 2 else ""
    in_float = sum(program.segment(step.segment).in_float for step in program.steps)
    unquantized = f", {in_float} of them in floating point" if in_float else ""
    work = [f"{whole} compute all {branches} branches{unquantized}"]
    work += [f"{some} compute some of them"] if some else []
    does = "extrapolate from" if APPROXIMATORS[program.reuse].looks_back > 1 else "reuse"
    work += [f"{none} {does} what those left"] if none else []
    return (
        f"{len(rows)} {name} steps{guided}, of which {_and(work)}; {_arithmetic(report)}"
        f"{', variance compensated after each step' if report.compensation is not None else ''}."
    ).replace("  ", " ")


def integers_sentence(report: Report) -> str:
    """Return a sentence on the integer products, where there were any."""
    return "" if report.arithmetic is None else f" INT8 there: {report.arithmetic.text}."


def _arithmetic(report: Report) -> str:
    precision, scales, asked = report.manifest.precision, report.manifest.scales, report.manifest.asked
    bits = PRECISIONS.get(precision)
    if bits is None:
        return {"fp32": "everything in float32", "fp16": "float16 where the target has it"}.get(precision, precision)
    linear = "linear layers in INT8" if bits == INT8 else f"linear layers in INT8 of fewer bits ({precision})"
    binding = SCALES_IN_WORDS.get(scales, f"{scales} scales")
    if scales == DYNAMIC:
        return f"{linear} with {binding}"
    ranges, select = proper_name(asked.ranges), proper_name(asked.select)
    points = f"{asked.points} points that {select} chose"
    return f"{linear} with {binding}, {ranges} ranges over {points}"


def proper_name(setting: object) -> str:
    """Return a setting as it is written in a sentence."""
    return {"tap": "TAP", "mse": "MSE", "kmeans": "k-means"}.get(str(setting), str(setting))


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def trajectory_sentence(report: Report) -> str:
    """Return a sentence on the ends of the curves."""
    if not isinstance(report.drift, Drift):
        return "The charts share their steps: what stands under one another happens in the same step."
    drift, bare = report.drift.bundle, report.drift.uncompensated
    variance = max(drift.variance_drift[-1], key=abs)
    text = (
        f"After the last step the samples of {drift.images} images lie {drift.relative_error[-1]:.2%} from FP's, and "
        f"their variance {abs(variance):.2%} {'below' if variance < 0 else 'above'} it"
    )
    if bare is None:
        return f"{text}."
    without = max(bare.variance_drift[-1], key=abs)
    return (
        f"{text}. Without the compensation it would be {bare.relative_error[-1]:.2%} and {abs(without):.2%} "
        f"{'below' if without < 0 else 'above'}."
    )


def machine_sentence(report: Report) -> str:
    """Return the processor that the report was made on, with its cores and INT8 features."""
    machine = report.machine
    return f"{machine.processor}, {machine.cores} cores ({', '.join(machine.features) or 'no INT8 features'})."
