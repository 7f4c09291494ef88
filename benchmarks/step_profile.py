"""The time of a computing step, operator by operator, and the distance of its INT8 products from the machine's.

    python benchmarks/step_profile.py BUNDLE [--out FILE.json]

ONNX Runtime's profiler on the `full` segment of a bundle, at the inputs of a real request. In the same run every shape
of its linear layers is timed by itself, best of several calls: the rate that the machine gives to such a product.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ditc.bundle import Bundle, open_bundle
from ditc.cli.output import print_table
from ditc.engines.onnxrt import INTEGER_KERNELS
from ditc.exporter.onnx_files import load_graph
from ditc.machine import machine
from ditc.quantize.linears import linears_of
from ditc.runtime.options import HERE as THIS_MACHINE
from ditc.speed.ceilings import WIDEST, product_seconds
from ditc.speed.roofline import footprints_here
from ditc.speed.tracing import trace_bundle

HERE = Path(__file__).parent
Shape = tuple[int, int, int]


def shapes_of(bundle: Bundle) -> dict[Shape, int]:
    """Return (rows, in, out) -> number of linear layers, of the FP `full` segment."""
    manifest = bundle.manifest
    counts: dict[Shape, int] = defaultdict(int)
    rows = manifest.batch * manifest.halves * manifest.model.branch_shape[0]
    for linear in linears_of(load_graph(bundle.reference_path("full"))):
        inside, outside = linear.weight_array().shape
        counts[rows, inside, outside] += 1
    return dict(counts)


def kinds_of(folder: Path) -> dict[str, float]:
    """Return the milliseconds of one call by operator, median of each, from a trace of `full`."""
    layers = {
        layer["Name"]: layer["LayerType"] for layer in json.loads((folder / "layers_full.json").read_text())["Layers"]
    }
    kinds: dict[str, float] = defaultdict(float)
    for row in json.loads((folder / "profile_full.json").read_text())[1:]:
        kinds[layers[row["name"]]] += row["medianMs"]
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def profiled(path: Path) -> dict[str, Any]:
    bundle = open_bundle(path)
    with TemporaryDirectory() as folder:
        trace_bundle(path, Path(folder), THIS_MACHINE)
        kinds = kinds_of(Path(folder))
    shapes = shapes_of(bundle)
    alone = {shape: product_seconds(shape, quantized=True) for shape in shapes}
    operations = sum(count * 2 * rows * inside * outside for (rows, inside, outside), count in shapes.items())
    products = sum(kinds.get(kind, 0.0) for kind in INTEGER_KERNELS) / 1e3
    fastest = sum(count * alone[shape] for shape, count in shapes.items())
    floats = footprints_here(bundle)["full"].float_operations
    float_rate = 2 * prod(WIDEST) / product_seconds(WIDEST, quantized=False)
    step = sum(kinds.values()) / 1e3
    return {
        "machine": machine().model_dump(),
        "model": bundle.manifest.model.name,
        "milliseconds": kinds,
        "step_milliseconds": step * 1e3,
        "float_products": {  # those of attention, of the patches and of the head, at the rate of a large one by itself
            "operations": floats,
            "alone_operations_per_second": float_rate,
            "alone_seconds": floats / float_rate,
        },
        "share_without_products": 1 - (products + floats / float_rate) / step,
        "int8_products": {
            "operations": operations,
            "seconds": products,
            "operations_per_second": operations / products,
            "alone_seconds": fastest,
            "alone_operations_per_second": operations / fastest,
            "share_of_alone": fastest / products,
            "share_of_step": products / step,
            "shapes": [{"shape": shape, "layers": n, "alone_seconds": alone[shape]} for shape, n in shapes.items()],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "step_profile.json")
    options = parser.parse_args()
    profile = profiled(options.bundle)
    options.out.write_text(json.dumps(profile, indent=1) + "\n")
    total = profile["step_milliseconds"]
    print_table(
        ("operator", "ms", "share"),
        [(k, f"{ms:.1f}", f"{ms / total:.1%}") for k, ms in profile["milliseconds"].items()],
    )
    products = profile["int8_products"]
    print(
        f"INT8 products {products['operations_per_second'] / 1e9:.0f} GOP/s, by themselves "
        f"{products['alone_operations_per_second'] / 1e9:.0f}; {products['share_of_step']:.0%} of the step"
    )


if __name__ == "__main__":
    main()
