"""The shell scripts of `ditc export-polygraphy`: a script is a row of `SCRIPTS`.

A row is a name, what the script is for, and a function from the facts of a segment to the commands for it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditc.diagnosis.polygraphy_commands import (
    SegmentFacts,
    calibrate_tensorrt10,
    compare_onnxrt,
    compare_tensorrt,
    extract,
    inspect,
    layers_onnxrt,
    layers_tensorrt,
    reduce_onnxrt,
    reduce_tensorrt,
    shapes_array,
)

__all__ = ["SCRIPTS", "Script", "script_text"]

Body = Callable[[SegmentFacts], Sequence[str]]  # commands and comments, none where the script isn't for that segment


@dataclass(frozen=True)
class Script:
    """A shell script: its file name, the comment at its head, and what it does with a segment."""

    name: str
    head: str
    body: Body


def script_text(script: Script, segments: Sequence[SegmentFacts], bundle: str) -> str | None:
    """Return the whole script; `bundle` is the default path to it. None where no segment has anything to do in it."""
    bodies = {facts.name: script.body(facts) for facts in segments}
    names = [name for name, lines in bodies.items() if lines]
    if not names:
        return None
    cases = "\n".join(_case(facts, bodies[facts.name]) for facts in segments if facts.name in names)
    head = "\n".join(f"# {line}" for line in script.head.splitlines())
    return FRAME.format(head=head, script=script.name, names=" ".join(names), bundle=shlex.quote(bundle), cases=cases)


def _case(facts: SegmentFacts, lines: Sequence[str]) -> str:
    """Return the branch of a script for one segment."""
    needs_shapes = any("${shapes[@]}" in line for line in lines)
    body = [shapes_array(facts.shapes), *lines] if needs_shapes else lines
    return "\n    ".join([f"{facts.name})", *body, ";;"])


FRAME = """\
#!/usr/bin/env bash
{head}
#
# ./{script} [SEGMENT...]     default: {names}
bundle_here={bundle}
BUNDLE="${{BUNDLE:-$bundle_here}}"  # where the bundle lies, seen from this folder

cd "$(dirname "$0")" || exit 2
[ -f "$BUNDLE/manifest.json" ] || {{ echo "$0: no bundle at $BUNDLE; set BUNDLE to its path" >&2; exit 2; }}
[ "$#" -gt 0 ] || set -- {names}
mkdir -p out
failed=0
for segment in "$@"; do
case "$segment" in
{cases}
*) echo "$0: unknown segment $segment; choose from: {names}" >&2; exit 2 ;;
esac
done
exit "$failed"
"""


SCRIPTS: tuple[Script, ...] = (
    Script(
        "inspect.sh",
        "Print the layers of every form of a segment, and of its engine where there is one.\n"
        "compare_tensorrt.sh saves the engine. Polygraphy lets an engine run host code while it loads it: only ever\n"
        "give it a plan that you built yourself.",
        inspect,
    ),
    Script(
        "compare_onnxrt.sh",
        "Compare every form of a segment with its FP graph, in ONNX Runtime; needs no GPU.\n"
        "Where the bundle has no FP graph, with the portable one. What fails here is in the graph, not in TensorRT.",
        compare_onnxrt,
    ),
    Script(
        "layers_onnxrt.sh",
        "Compare every tensor of the typed form with the portable form's, in ONNX Runtime; needs no GPU.\n"
        "On the first recorded point; tensors are matched by name. The first that fails is where FP16 goes wrong.\n"
        "SNR=DECIBELS sets the least signal to noise. Writes all tensors as JSON: gigabytes for a large model.",
        layers_onnxrt,
    ),
    Script(
        "reduce_onnxrt.sh",
        "Shrink a form to the part that ONNX Runtime's optimizer changes; needs no GPU.\n"
        "The typed form where there is one. The steps are those of reduce_tensorrt.sh. SNR=DECIBELS sets the least\n"
        "signal to noise. Writes the values of all tensors at one point as JSON: gigabytes for a large model.",
        reduce_onnxrt,
    ),
    Script(
        "extract.sh",
        "Cut a segment behind one of its tensors, and save the first part as a model.\n"
        "TENSOR=NAME cuts behind NAME; inspect.sh prints the names.",
        extract,
    ),
    Script(
        "compare_tensorrt.sh",
        "Compare TensorRT with ONNX Runtime on the typed form.\nSaves the engine, inputs and outputs in out/.",
        compare_tensorrt,
    ),
    Script(
        "layers_tensorrt.sh",
        "Compare every tensor of the typed form, TensorRT with ONNX Runtime.\n"
        "On the first recorded point. A tensor that is an output can't be fused away, so this engine is not the one\n"
        "that compare_tensorrt.sh builds: where all tensors pass here and an output fails there, suspect a fusion,\n"
        "and go on with reduce_tensorrt.sh. SNR=DECIBELS sets the least signal to noise.",
        layers_tensorrt,
    ),
    Script(
        "reduce_tensorrt.sh",
        "Shrink the typed form to the part that TensorRT computes differently, or can't build.\n"
        "Ends with out/SEGMENT.bisected.onnx. SNR=DECIBELS sets the least signal to noise. Writes the values of all\n"
        "tensors at one point as JSON: gigabytes for a large model.",
        reduce_tensorrt,
    ),
    Script(
        "calibrate_tensorrt10.sh",
        "TensorRT 10.x only, 11 has no calibrators: let it calibrate the FP graph on the recorded inputs.\n"
        "A few points make poor scales: export with --points 50 or more first. The scales that ditc made are in the\n"
        "typed form already, for every version.",
        calibrate_tensorrt10,
    ),
)
