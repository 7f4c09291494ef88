"""A CPU without integer dot products, emulated: products saturate there, and what ditc opens is exact all the same.

QEMU's user mode runs this interpreter as on a Haswell (AVX2, no VNNI), which saturates as the real one does. It takes
seconds for products as small as these.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from ditc.bundle import Bundle
from ditc.compiler.options import CompileOptions
from ditc.exporter.onnx_files import save_graph
from ditc.lowering.backend_forms import lower
from ditc.precision import Bits
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.qdq import insert_qdq, quantize_weight
from ditc.quantize.scale_table import ScaleTable

QEMU = shutil.which("qemu-x86_64")
pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not here: apt-get install qemu-user"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="this interpreter is not one for x86-64"),
]

INSIDE, OUTSIDE, SCALE = 96, 40, 0.05

# what every child begins with: the segments, and a place for its findings
PROLOGUE = """
import json, sys, warnings
from pathlib import Path
import numpy as np
folder, findings = Path(sys.argv[1]), {}
x = np.load(folder / "x.npy")
"""
ON_ONNXRUNTIME = """
from ditc.engines import onnxrt
from ditc.engines.onnxrt import OnnxRuntimeBackend, exact_entries, onnxruntime_exactness
backend = OnnxRuntimeBackend()
findings["exactness"] = list(onnxruntime_exactness())
for bits in (8, 7):
    segment = folder / f"full-{bits}.onnx"
    findings[f"entries-{bits}"] = dict(exact_entries(segment))
    onnxrt.exact_entries = lambda segment: {}
    findings[f"plain-{bits}"] = backend.session(segment).run(None, {"x": x})[0].tolist()
    onnxrt.exact_entries = exact_entries
    y = np.empty_like(np.array(findings[f"plain-{bits}"], np.float32))
    with warnings.catch_warnings(record=True) as caught, backend.open(segment) as engine:
        binding = engine.binding()
        binding.bind("x", x)
        binding.bind("y", y)
        binding.run()
    findings[f"opened-{bits}"] = y.tolist()
    findings[f"advice-{bits}"] = [str(each.message) for each in caught]
"""
ON_OPENVINO = """
from ditc.engines.openvino_host import OpenVinoBackend
from ditc.errors import InputError
for rest in ("f32", "bf16"):
    backend = OpenVinoBackend(rest=rest)
    findings[f"arithmetic-{rest}"] = backend.arithmetic(8).model_dump()
    with warnings.catch_warnings(record=True) as caught, backend.open(folder / "full-7.onnx") as engine:
        y = np.empty((len(x), engine.outputs["y"].shape[-1]), np.float32)
        binding = engine.binding()
        binding.bind("x", x)
        binding.bind("y", y)
        binding.run()
    findings[f"opened-{rest}"] = y.tolist()
    findings[f"advice-{rest}"] = [str(each.message) for each in caught]
try:
    OpenVinoBackend().open(folder / "full-8.onnx")
except InputError as e:
    findings["refused"] = str(e)
"""

ON_A_BUNDLE = """
import ditc.engines.onnxrt as onnxrt
from ditc.runtime.pipeline import load
for form, entries in (("opened", onnxrt.exact_entries), ("plain", lambda segment: {})):
    onnxrt.exact_entries = entries
    with load(bundle) as pipe:
        findings[form] = [[each.segment, each.error, each.tolerance] for each in pipe.differences()]
"""


def emulated(code: str, folder: Path) -> Any:
    """Return the findings of some code on a Haswell."""
    assert QEMU is not None
    script = PROLOGUE + code + '\n(folder / "findings.json").write_text(json.dumps(findings))\n'
    command = [QEMU, "-cpu", "Haswell", sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "findings.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One linear layer as a compile quantizes it, with 8 and with 7 bits of weights, and an input near its range."""
    path, rng = tmp_path_factory.mktemp("emulated"), np.random.default_rng(0)
    np.save(path / "x.npy", rng.uniform(4, 6.3, (5, INSIDE)).astype(np.float32))
    np.save(path / "w.npy", np.abs(rng.standard_normal((INSIDE, OUTSIDE))).astype(np.float32))
    for bits in (8, 7):
        model = ir.from_onnx_text(
            f"""
            <ir_version: 10, opset_import: ["" : 20]>
            g (float[batch, {INSIDE}] x, float[{INSIDE}, {OUTSIDE}] w) => (float[batch, {OUTSIDE}] y) {{
                y = MatMul (x, w)
            }}
            """
        )
        weight = model.graph.inputs.pop()
        weight.const_value = ir.tensor(np.load(path / "w.npy"), name="w")
        model.graph.register_initializer(weight)
        model.graph[0].metadata_props.update({BRANCH_KEY: "a", PATH_KEY: "a"})
        ShapeInferencePass()(model)
        origin = {"method": "max", "segment_sha256": "", "calibration_digest": ""}
        insert_qdq(model, ScaleTable(**origin, scales={"a": SCALE}, bits=Bits(weights=bits)))
        lower(model, "onnxrt")
        save_graph(model, path / f"full-{bits}.onnx")
    return path


def error(output: Any, folder: Path, bits: int) -> float:
    """Return a product's distance from the exact integers."""
    weight = quantize_weight(np.load(folder / "w.npy"), bits)
    integers = np.round(np.load(folder / "x.npy") / np.float32(SCALE)).astype(np.int64)
    exact = (integers @ weight.values.astype(np.int64)) * (SCALE * weight.scale.astype(np.float64))
    return float(np.abs(np.array(output) - exact).max() / np.abs(exact).max())


@pytest.fixture(scope="module")
def findings(folder: Path) -> Any:
    return emulated(ON_ONNXRUNTIME, folder)


def test_there_plain_products_are_exact_with_seven_bits_and_switched_ones_with_eight(findings: Any) -> None:
    assert findings["exactness"] == [7, 8]
    assert findings["entries-8"] == {"session.x64quantprecision": "1"}
    assert findings["entries-7"] == {}


def test_there_a_segment_saturates_as_it_is_and_is_exact_as_ditc_opens_it(findings: Any, folder: Path) -> None:
    assert error(findings["plain-8"], folder, 8) > 0.05
    assert error(findings["opened-8"], folder, 8) < 1e-6
    assert error(findings["opened-7"], folder, 7) < 1e-6


def test_there_eight_bits_are_advised_of_seven(findings: Any) -> None:
    (advice,) = findings["advice-8"]
    assert "--precision w7a8" in advice
    assert findings["advice-7"] == []


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
def test_there_openvino_runs_seven_bits_refuses_eight_and_says_what_it_computes_in(folder: Path) -> None:
    findings = emulated(ON_OPENVINO, folder)
    assert "--target cpu, or compile with --precision w7a8" in findings["refused"]
    for rest in ("f32", "bf16"):
        assert findings[f"arithmetic-{rest}"]["integers"] is None
        assert error(findings[f"opened-{rest}"], folder, 7) < 1e-6
    assert findings["arithmetic-bf16"]["rest"] == "f32"
    assert "since this CPU has no bf16" in findings["arithmetic-bf16"]["text"]
    assert findings["advice-f32"] == []
    (advice,) = findings["advice-bf16"]
    assert "this CPU has no bf16" in advice


def test_there_a_fingerprint_passes_what_ditc_opens_and_names_what_saturates(
    folder: Path, compiled_once: Callable[..., Bundle]
) -> None:
    options = CompileOptions(steps=4, policy="fora:2", points=16, pool_images=8, vc_images=8, verify_images=1)
    bundle = compiled_once("digits", options)
    findings = emulated(f"bundle = {str(bundle.path)!r}\n{ON_A_BUNDLE}", folder)
    assert {segment for segment, _, _ in findings["opened"]} == {*bundle.manifest.program.calls, "update"}
    assert [segment for segment, error, tolerance in findings["opened"] if error > tolerance] == []
    assert next(segment for segment, error, tolerance in findings["plain"] if error > tolerance) == "full"
