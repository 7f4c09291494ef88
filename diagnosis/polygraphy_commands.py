"""Polygraphy commands for one segment of a bundle: a function for each purpose, with forms and tolerances.

Every option here is one of Polygraphy 0.53; the tests hand each command line to its own parser.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "SegmentFacts",
    "calibrate_tensorrt10",
    "compare_onnxrt",
    "compare_tensorrt",
    "extract",
    "inspect",
    "layers_onnxrt",
    "layers_tensorrt",
    "loader_name",
    "reduce_onnxrt",
    "reduce_tensorrt",
    "shapes_array",
]

# Mean |difference| that passes, as a share of an output's RMS. Measured on `digits` and a random DiT-S/2, worst output
# of 8 points: 0.0004 where nothing is quantized, 0.05 between two forms of one INT8 graph (FP16 moves values across
# rounding steps), 0.08 between INT8 and FP. A wrong scale or a lost branch is near 1.
HALF_SHARE, ROUNDING_SHARE, INT8_SHARE = 0.005, 0.1, 0.2
LEAST_TOLERANCE = 1e-6  # of an output that is zero
# the same for one tensor inside: signal to noise in dB, because it needs no tolerance per tensor
LEAST_SNR_DB = 15
WORKSPACE = "1G"  # TensorRT's scratch memory, as engines.trt.BuildSettings has it


@dataclass(frozen=True)
class SegmentFacts:
    """The facts of a segment that its commands are written from. Paths are relative to the bundle.

    `shapes` are those of one recorded point, `rms` the size of each output there; `typed` is the form for TensorRT,
    None where the bundle has none, and `cut` a tensor half-way through the graph. `quantized_inputs` are those that
    the FP graph lacks, `typed_only` tensors of the typed form that the portable one lacks: Polygraphy would hold each
    against whichever tensor comes at its place.
    """

    name: str
    reference: str
    portable: str
    onnxrt: str | None
    typed: str | None
    quantized: bool
    shapes: Mapping[str, Sequence[int]]
    rms: Mapping[str, float]
    cut: str
    quantized_inputs: Collection[str] = ()
    typed_only: Sequence[str] = ()

    @property
    def forms(self) -> tuple[str, ...]:
        """Every deployed form of the graph."""
        return tuple(form for form in (self.portable, self.onnxrt, self.typed) if form is not None)

    @property
    def form_share(self) -> float:
        """The tolerance between two forms of the deployed graph."""
        return ROUNDING_SHARE if self.quantized else HALF_SHARE

    @property
    def reference_share(self) -> float:
        """The tolerance between the deployed graph and the FP one."""
        return INT8_SHARE if self.has_fp_reference else self.form_share

    @property
    def has_fp_reference(self) -> bool:
        return self.quantized and self.reference != self.portable


def loader_name(segment: str, form: str) -> str:
    """Return the data loader that feeds a form: those for TensorRT take other types."""
    return f"loader_{segment}_trt.py" if form.endswith(".trt.onnx") else f"loader_{segment}.py"


def shapes_array(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the `shapes` array of a case: bundles are built for one size, so least, best and largest are the same."""
    words = (f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items())
    return f"shapes=({' '.join(map(shlex.quote, words))})"


def _command(*lines: str) -> str:
    return " \\\n        ".join(lines)


def _checked(*lines: str) -> str:
    """Return a command whose failure is the script's, without keeping the next one from running."""
    return _command(*lines) + " || failed=1"


def _tolerances(facts: SegmentFacts, share: float) -> tuple[str, str]:
    words = (f"{name}:{max(share * rms, LEAST_TOLERANCE):.3g}" for name, rms in facts.rms.items())
    return "--check-error-stat mean --rtol 0", f"--atol {' '.join(map(shlex.quote, words))}"


SNR = f'--compare snr --snr-threshold "${{SNR:-{LEAST_SNR_DB}}}"'
PROFILE = '--trt-min-shapes "${shapes[@]}" --trt-opt-shapes "${shapes[@]}" --trt-max-shapes "${shapes[@]}"'
TIMING_CACHE = "--load-timing-cache out/timing.cache --save-timing-cache out/timing.cache"
BUILD = f"--strongly-typed --pool-limit workspace:{WORKSPACE}"
AS_WRITTEN = "--graph-optimization-level ORT_DISABLE_ALL"


def compare_onnxrt(facts: SegmentFacts) -> list[str]:
    """Hold every deployed form against the FP graph (the portable one, where there is no other) as it is written."""
    golden = f"out/{facts.name}.reference.json"
    lines = [
        _checked(
            f'polygraphy run "$BUNDLE/{facts.reference}" --onnxrt {AS_WRITTEN}',
            f"--data-loader-script {loader_name(facts.name, facts.reference)}",
            f"--save-outputs {golden}",
        )
    ]
    lines += [
        _checked(
            f'polygraphy run "$BUNDLE/{form}" --onnxrt',
            f"--data-loader-script {loader_name(facts.name, form)}",
            f"--load-outputs {golden}",
            *_tolerances(facts, facts.reference_share),
        )
        for form in facts.forms
    ]
    return lines


def layers_onnxrt(facts: SegmentFacts) -> list[str]:
    """Hold every tensor of the typed form against the tensor of that name in the portable one."""
    if facts.typed is None:
        return []
    return [
        _checked(
            f"polygraphy run \"$BUNDLE/{facts.portable}\" --onnxrt {AS_WRITTEN} --onnx-outputs '*'",
            f"--data-loader-script {loader_name(facts.name, facts.portable)}:load_first",
            f"--save-outputs out/{facts.name}.layers.json",
        ),
        _checked(
            f"polygraphy run \"$BUNDLE/{facts.typed}\" --onnxrt {AS_WRITTEN} --onnx-outputs '*'",
            *([f"--onnx-exclude-outputs {' '.join(map(shlex.quote, facts.typed_only))}"] if facts.typed_only else []),
            f"--data-loader-script {loader_name(facts.name, facts.typed)}:load_first",
            f"--load-outputs out/{facts.name}.layers.json {SNR}",
        ),
    ]


def _reduce(facts: SegmentFacts, form: str, runner: str) -> list[str]:
    """Shrink a form to the part whose outputs `runner` computes differently from the graph as it is written."""
    out = f"out/{facts.name}"
    # a smaller graph starts at inner tensors: `feeds` has their values, `golden` what its outputs should be
    values = f"--load-inputs {out}.feeds.json --load-outputs {out}.golden.json {SNR}"
    common = (
        f"--load-inputs {out}.feeds.json",
        f"--iter-artifact {out}.candidate.onnx --save-debug-replay {out}.replay.json",
        f"--check polygraphy run {out}.candidate.onnx {runner}",
        f"    {values}",
    )
    return [
        _checked(
            f'polygraphy run "$BUNDLE/{form}" --onnxrt {AS_WRITTEN}',
            f"--onnx-outputs '*' --data-loader-script {loader_name(facts.name, form)}:load_first",
            f"--save-inputs {out}.first.json --save-outputs {out}.golden.json",
        ),
        _checked(f"polygraphy data merge {out}.first.json {out}.golden.json -o {out}.feeds.json"),
        "# fixed shapes, and what computes with shapes folded away: a part of the graph can't do either",
        _checked(
            f'polygraphy surgeon sanitize "$BUNDLE/{form}" -o {out}.static.onnx',
            '--override-input-shapes "${shapes[@]}" --fold-constants',
        ),
        "# a reduction takes for granted that the whole fails",
        _command(f"polygraphy run {out}.static.onnx {runner}", values)
        + f' && {{ echo "{facts.name}: nothing to reduce"; continue; }}',
        "failed=1",
        _command(f"polygraphy debug reduce {out}.static.onnx --mode bisect -o {out}.bisected.onnx", *common),
        "# one node at a time, slower and often smaller: LINEAR=1",
        f'[ -z "${{LINEAR:-}}" ] || [ ! -f {out}.bisected.onnx ] ||',
        _command(f"    polygraphy debug reduce {out}.bisected.onnx --mode linear -o {out}.reduced.onnx", *common),
    ]


def reduce_onnxrt(facts: SegmentFacts) -> list[str]:
    """Shrink the typed form, or the portable one, to the part that ONNX Runtime's optimizer changes."""
    return _reduce(facts, facts.typed or facts.portable, "--onnxrt")


def reduce_tensorrt(facts: SegmentFacts) -> list[str]:
    """Shrink the typed form to the part that TensorRT computes differently."""
    return [] if facts.typed is None else _reduce(facts, facts.typed, f"--trt {BUILD}")


def extract(facts: SegmentFacts) -> list[str]:
    """Cut off the first half of the graph as a model of its own."""
    form = facts.typed or facts.portable
    return [
        f"half_way={shlex.quote(facts.cut)}",
        _checked(
            f'polygraphy surgeon extract "$BUNDLE/{form}" -o out/{facts.name}.part.onnx',
            '--outputs "${TENSOR:-$half_way}:auto"',
        ),
    ]


def inspect(facts: SegmentFacts) -> list[str]:
    """Print the layers of every form, and of the engine where there is one."""
    lines = [_checked(f'polygraphy inspect model "$BUNDLE/{form}" --show layers') for form in facts.forms]
    if facts.typed is not None:
        plan = f"out/{facts.name}.plan"
        command = _checked(f"polygraphy inspect model {plan} --model-type engine --show layers attrs")
        lines.append(f"[ ! -f {plan} ] || {command}")
    return lines


def compare_tensorrt(facts: SegmentFacts) -> list[str]:
    """Hold TensorRT against ONNX Runtime on the typed form, which both run in the types that it says."""
    if facts.typed is None:
        return []
    return [
        _checked(
            f'polygraphy run "$BUNDLE/{facts.typed}" --onnxrt --trt {BUILD}',
            f"--data-loader-script {loader_name(facts.name, facts.typed)}",
            PROFILE,
            TIMING_CACHE,
            f"--save-engine out/{facts.name}.plan",
            f"--save-inputs out/{facts.name}.inputs.json --save-outputs out/{facts.name}.outputs.json",
            *_tolerances(facts, facts.form_share),
        )
    ]


def layers_tensorrt(facts: SegmentFacts) -> list[str]:
    """Compare every tensor of the typed form in both."""
    if facts.typed is None:
        return []
    return [
        _checked(
            f'polygraphy run "$BUNDLE/{facts.typed}" --onnxrt --trt {BUILD}',
            "--onnx-outputs '*' --trt-outputs '*'",
            f"--data-loader-script {loader_name(facts.name, facts.typed)}:load_first",
            PROFILE,
            TIMING_CACHE,
            SNR,
        )
    ]


def calibrate_tensorrt10(facts: SegmentFacts) -> list[str]:
    """Run TensorRT's own calibration of the FP graph."""
    if facts.typed is None or not facts.has_fp_reference:
        return []
    shapes = {name: shape for name, shape in facts.shapes.items() if name not in facts.quantized_inputs}
    return [
        *([shapes_array(shapes)] if facts.quantized_inputs else []),
        _checked(
            f'polygraphy convert "$BUNDLE/{facts.reference}" --convert-to trt --int8 --fp16',
            f"--data-loader-script {loader_name(facts.name, facts.reference)}",
            f"--calibration-cache out/{facts.name}.calibration.cache",
            PROFILE,
            f"--pool-limit workspace:{WORKSPACE}",
            f"-o out/{facts.name}.calibrated.plan",
        ),
    ]
