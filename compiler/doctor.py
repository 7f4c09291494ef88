"""What works on this machine and what doesn't, with the reason: `ditc doctor`."""

from __future__ import annotations

import platform
import re
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
    return [finding for check in CHECKS if (finding := check()) is not None]


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
        return Finding("target cpu", False, "not installed; install with: pip install 'ditc[cpu]'")
    features = ", ".join(cpu_features()) or "no integer dot products found: INT8 will be slow"
    try:
        kernel = integer_kernel()
    except ImportError:  # a deployment has no onnx to build the probe with
        return Finding("target cpu", True, f"{found}; integer kernels not probed, that needs onnx; {features}")
    except DitcError as e:
        return Finding("target cpu", False, str(e))
    return Finding("target cpu", bool(kernel), f"{found}; INT8 linear layer runs as {kernel}; {features}")


def openvino_cpu() -> Finding:
    """What is left to ONNX Runtime is the target cpu's matter."""
    found = installed("openvino")
    if found is None:
        return Finding("target openvino", False, "not installed; install with: pip install 'ditc[openvino]'")
    return Finding("target openvino", True, found)


def integer_kernel() -> str:
    """The kernel that ONNX Runtime picks for one quantized linear layer."""
    import numpy as np
    import onnx_ir as ir

    from ditc.engines.onnxrt import INTEGER_KERNELS, OnnxRuntimeBackend, kernel_census
    from ditc.engines.qdq import insert_qdq
    from ditc.engines.scale_table import ScaleTable
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


def onnxruntime_provider(target: str, provider: str) -> Finding:
    """Is a provider in this onnxruntime? Whether its libraries load shows when a session opens."""
    name = f"target {target}"
    if find_spec("onnxruntime") is None:
        return Finding(name, False, "onnxruntime is not installed; install with: pip install 'ditc[cuda]'")
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return Finding(name, False, f"this onnxruntime has no {provider}; it needs onnxruntime-gpu")
    return Finding(name, True, f"{provider} of onnxruntime {onnxruntime.__version__}")


def onnxruntime_cuda() -> Finding:
    return onnxruntime_provider("cuda", "CUDAExecutionProvider")


def onnxruntime_tensorrt() -> Finding:
    return onnxruntime_provider("ort-tensorrt", "TensorrtExecutionProvider")


def gpu() -> Finding:
    """The GPU through cuda-core, with its memory."""
    from ditc.engines.device import open_device

    try:
        device = open_device()
        free, total = device.memory_bytes()
    except DitcError as e:
        return Finding("gpu", False, str(e))
    memory = f"{free / 1e9:,.1f} of {total / 1e9:,.1f} GB free"
    return Finding("gpu", True, f"{device.name}, SM {device.compute_capability}, {memory}")


def tensorrt() -> Finding:
    """The bindings, the library behind them, and what this version can do."""
    from ditc.engines.trt import import_tensorrt, open_builder

    name = "target tensorrt"
    try:
        trt = import_tensorrt()
        open_builder(trt)
    except DitcError as e:
        return Finding(name, False, str(e))
    calibrators = hasattr(trt, "IInt8EntropyCalibrator2")
    forms = "explicit Q/DQ and calibrators" if calibrators else "explicit Q/DQ (no calibrators since 11)"
    return Finding(name, True, f"TensorRT {trt.__version__}; {forms}")


# L4T release -> JetPack and its TensorRT; the newest that is not later counts
JETPACKS = (
    ((35, 0), "5", "8.5"),
    ((36, 3), "6.0", "8.6"),
    ((36, 4, 0), "6.1", "10.3"),
    ((36, 4, 3), "6.2", "10.3"),
    ((38, 2), "7", "10.13"),
)


def jetpack(root: Path = Path("/")) -> Finding | None:
    """The JetPack of a Jetson, read from its L4T release; None on other machines."""
    try:
        text = (root / "etc" / "nv_tegra_release").read_text()
    except OSError:
        return None
    found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", text)
    if found is None:
        return Finding("jetpack", False, f"a Jetson whose release is not understood: {text.splitlines()[0]!r}")
    release = (int(found[1]), *(int(part) for part in found[2].split(".") if part))
    known = [row for row in JETPACKS if row[0] <= release]
    shown = ".".join(str(part) for part in release)
    if not known or release < (36, 4):
        older = f"JetPack {known[-1][1]} with TensorRT {known[-1][2]}" if known else "an early JetPack"
        return Finding("jetpack", False, f"L4T {shown}, {older}; ditc needs TensorRT 10.3, which JetPack 6.1 brings")
    return Finding("jetpack", True, f"L4T {shown}, JetPack {known[-1][1]} (brings TensorRT {known[-1][2]} or later)")


CHECKS: tuple[Callable[[], Finding | None], ...] = (
    python_runtime,
    jetpack,
    compile_stages,
    onnxruntime_cpu,
    openvino_cpu,
    gpu,
    tensorrt,
    onnxruntime_cuda,
    onnxruntime_tensorrt,
)
