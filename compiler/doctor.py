"""What works on this machine and what doesn't, with the reason: `ditc doctor`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from ditc.errors import DitcError

__all__ = ["Finding", "examine"]


class Finding(NamedTuple):
    """One thing that works or doesn't, and what was seen."""

    name: str
    works: bool
    detail: str


def examine() -> list[Finding]:
    """Every check, in the order a user needs them."""
    return [check() for check in CHECKS]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def python_runtime() -> Finding:
    import ditc

    return Finding(
        "runtime", True, f"ditc {ditc.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )


def compile_stages() -> Finding:
    needed = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "scikit-learn")
    missing = [name for name in needed if installed(name) is None]
    if missing:
        return Finding("compile", False, f"missing {', '.join(missing)}; install with: pip install 'ditc[export]'")
    return Finding("compile", True, ", ".join(f"{name} {installed(name)}" for name in needed))


def onnxruntime_cpu() -> Finding:
    """Opens a real integer kernel where onnx is there to build the graph."""
    found = installed("onnxruntime") or installed("onnxruntime-gpu")
    if found is None:
        return Finding("onnxruntime cpu", False, "not installed; install with: pip install 'ditc[cpu]'")
    features = ", ".join(cpu_features()) or "no integer dot products found: INT8 will be slow"
    try:
        kernel = integer_kernel()
    except ImportError:  # a deployment has no onnx to build the probe with
        return Finding("onnxruntime cpu", True, f"{found}; integer kernels not probed, that needs onnx; {features}")
    except DitcError as e:
        return Finding("onnxruntime cpu", False, str(e))
    return Finding("onnxruntime cpu", bool(kernel), f"{found}; INT8 linear layer runs as {kernel}; {features}")


def integer_kernel() -> str:
    """The kernel that ONNX Runtime picks for one quantized linear layer."""
    import numpy as np
    import onnx_ir as ir

    from ditc.engines.onnxrt import INTEGER_KERNELS, OnnxRuntimeBackend, kernel_census
    from ditc.engines.qdq import insert_qdq
    from ditc.engines.scales import ScaleTable
    from ditc.exporter.onnx_files import save_model
    from ditc.program import BRANCH_KEY, PATH_KEY

    weight = ir.tensor(np.eye(16, dtype=np.float32), name="weight")
    value = ir.Value(name="weight", shape=ir.Shape((16, 16)), type=ir.TensorType(ir.DataType.FLOAT), const_value=weight)
    x = ir.Value(name="x", shape=ir.Shape((4, 16)), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [x, value], name="probe")
    node.metadata_props.update({BRANCH_KEY: "probe", PATH_KEY: "probe"})
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, x.shape
    model = ir.Model(
        ir.Graph([x], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 20}), ir_version=10
    )
    insert_qdq(model, ScaleTable(method="max", segment_sha256="", calibration_digest="", scales={"probe": 0.1}))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        save_model(model, path)
        census = kernel_census(OnnxRuntimeBackend(), path)
    return next((kind for kind in INTEGER_KERNELS if census[kind]), "")


def cpu_features() -> list[str]:
    """Integer and half-precision instructions that matter here, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    wanted = ("avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimddp", "i8mm")
    flags = set(text.split())
    return [name for name in wanted if name in flags]


def onnxruntime_cuda() -> Finding:
    if find_spec("onnxruntime") is None:
        return Finding(
            "onnxruntime cuda", False, "onnxruntime is not installed; install with: pip install 'ditc[cuda]'"
        )
    import onnxruntime

    available = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    reason = "present; ditc has no CUDA target yet" if available else "this onnxruntime has no CUDA provider"
    return Finding("onnxruntime cuda", False, reason)


def tensorrt() -> Finding:
    if find_spec("tensorrt") is None:
        return Finding("tensorrt", False, "not installed; install with: pip install 'ditc[tensorrt]'")
    return Finding("tensorrt", False, f"{installed('tensorrt') or 'present'}; ditc has no TensorRT target yet")


CHECKS: tuple[Callable[[], Finding], ...] = (
    python_runtime,
    compile_stages,
    onnxruntime_cpu,
    onnxruntime_cuda,
    tensorrt,
)
