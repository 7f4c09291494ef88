"""The texts of a folder of `ditc export-polygraphy`: its README and its data loaders."""

from __future__ import annotations

from collections.abc import Sequence

from ditc.bundle import Bundle
from ditc.diagnosis.polygraphy_commands import SegmentFacts
from ditc.diagnosis.polygraphy_scripts import SCRIPTS, script_text

__all__ = ["LOADER", "TITLE", "readme"]

TITLE = "# Polygraphy on the segments of a bundle"


def readme(bundle: Bundle, facts: Sequence[SegmentFacts]) -> str:
    """Return the page that goes with the folder."""
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
