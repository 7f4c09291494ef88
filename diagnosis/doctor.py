"""Checks of what works on this machine, with the reason where something doesn't: `ditc doctor`."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, RootModel

from ditc.errors import DitcError
from ditc.precision import INT8
from ditc.program import UPDATE
from ditc.spec import Record

if TYPE_CHECKING:
    from ditc.engines.integer_form import SaysArithmetic

__all__ = ["Finding", "Findings", "compared", "examine"]


class Finding(Record):
    """One thing that works or doesn't, and what was seen."""

    name: str
    works: bool
    detail: str


class Findings(RootModel[tuple[Finding, ...]]):
    """The findings of `ditc doctor`; as JSON they are a list."""

    model_config = ConfigDict(frozen=True)


def _finding(name: str, works: bool, detail: str) -> Finding:
    return Finding(name=name, works=works, detail=detail)


def examine() -> list[Finding]:
    """Run every check, in the order a user needs them."""
    return [finding for check in CHECKS if (finding := check()) is not None]


def compared(bundle: Path, target: str | None = None, engines: Path | None = None) -> list[Finding]:
    """Return a finding for each segment of a bundle: whether it gives here what it gave where it was compiled.

    In the order of their first call, but that `update` is the last: what it takes comes from the others. Raises
    BundleError for a bundle without a fingerprint.
    """
    from ditc.runtime.pipeline import load

    with load(bundle, target=target, engines=engines) as pipe:
        differences = pipe.differences()
    findings = []
    for segment in sorted(dict.fromkeys(difference.segment for difference in differences), key=UPDATE.__eq__):
        worst = max(
            (difference for difference in differences if difference.segment == segment), key=attrgetter("excess")
        )
        findings.append(_finding(f"segment {segment}", worst.is_rounding, worst.told))
    return findings


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def python_runtime() -> Finding:
    import ditc

    return _finding(
        "runtime", True, f"ditc {ditc.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )


# (system, processor) -> how ditc was tried there; docs/verified.md
TRIED = {("Linux", "x86_64"): "the tests run on it", ("Linux", "aarch64"): "tried emulated, on no real processor"}
NEVER_TRIED = "GPUs (cuda, tensorrt, ort-tensorrt), Jetson, macOS, Windows, musl"


def tried_platform() -> Finding:
    """Say whether ditc was ever tried on a platform like this one."""
    system, processor = platform.system(), platform.machine()
    how = TRIED.get((system, processor)) if platform.libc_ver()[0] == "glibc" else None
    seen = f"{system} on {processor}: {how or 'never tried'}"
    return _finding("platform", how is not None, f"{seen}; never tried at all: {NEVER_TRIED}")


def compile_stages() -> Finding:
    needed = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "scikit-learn")
    missing = [name for name in needed if installed(name) is None]
    if missing:
        return _finding("compile", False, f"missing {', '.join(missing)}; install with: pip install 'ditc[export]'")
    return _finding("compile", True, ", ".join(f"{name} {installed(name)}" for name in needed))


def onnxruntime_cpu() -> Finding:
    """Run integer products, and hold them to the exact ones."""
    release = installed("onnxruntime") or installed("onnxruntime-gpu")
    if release is None:
        return _finding("target cpu", False, "not installed; install with: pip install 'ditc[cpu]'")
    from ditc.engines.onnxrt import OnnxRuntimeBackend

    return _integers("target cpu", f"onnxruntime {release}", OnnxRuntimeBackend())


def openvino_cpu() -> Finding:
    """Run integer products in OpenVINO; what it leaves to ONNX Runtime is the target cpu's matter."""
    return _openvino("openvino", "f32")


def openvino_bf16() -> Finding:
    """Run the same with bfloat16 around the integers, where the processor has it."""
    return _openvino("openvino-bf16", "bf16")


def _openvino(target: str, rest: str) -> Finding:
    release = installed("openvino")
    if release is None:
        return _finding(f"target {target}", False, "not installed; install with: pip install 'ditc[openvino]'")
    from ditc.engines.openvino_host import OpenVinoBackend

    return _integers(f"target {target}", f"openvino {release}", OpenVinoBackend(rest=rest))


def _integers(name: str, library: str, backend: SaysArithmetic) -> Finding:
    """Hold a library's integer products to the exact ones; it works where those of w8a8 are exact."""
    try:
        arithmetic = backend.arithmetic(INT8.weights)
    except DitcError as e:
        return _finding(name, False, str(e))
    return _finding(name, arithmetic.integers is not None, f"{library}; INT8 {arithmetic.text}")


def onnxruntime_provider(target: str, provider: str) -> Finding:
    """Say whether this onnxruntime has a provider; whether its libraries load shows when a session opens."""
    name = f"target {target}"
    if find_spec("onnxruntime") is None:
        return _finding(name, False, "onnxruntime is not installed; install with: pip install 'ditc[cuda]'")
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return _finding(name, False, f"this onnxruntime has no {provider}; it needs onnxruntime-gpu")
    return _finding(name, True, f"{provider} of onnxruntime {onnxruntime.__version__}")


def onnxruntime_cuda() -> Finding:
    return onnxruntime_provider("cuda", "CUDAExecutionProvider")


def onnxruntime_tensorrt() -> Finding:
    return onnxruntime_provider("ort-tensorrt", "TensorrtExecutionProvider")


def gpu() -> Finding:
    """Look for the GPU through cuda-core, with its memory."""
    from ditc.engines.device import open_device

    try:
        device = open_device()
        free, total = device.memory_bytes()
    except DitcError as e:
        return _finding("gpu", False, str(e))
    memory = f"{free / 1e9:,.1f} of {total / 1e9:,.1f} GB free"
    return _finding("gpu", True, f"{device.name}, SM {device.compute_capability}, {memory}")


def tensorrt() -> Finding:
    """Look for the bindings, the library behind them, and what this version can do."""
    from ditc.engines.trt import import_tensorrt, open_builder

    name = "target tensorrt"
    try:
        trt = import_tensorrt()
        open_builder(trt)
    except DitcError as e:
        return _finding(name, False, str(e))
    calibrators = hasattr(trt, "IInt8EntropyCalibrator2")
    forms = "explicit Q/DQ and calibrators" if calibrators else "explicit Q/DQ (no calibrators since 11)"
    return _finding(name, True, f"TensorRT {trt.__version__}; {forms}")


# L4T release -> JetPack and its TensorRT; the newest that is not later counts
JETPACKS = (
    ((35, 0), "5", "8.5"),
    ((36, 3), "6.0", "8.6"),
    ((36, 4, 0), "6.1", "10.3"),
    ((36, 4, 3), "6.2", "10.3"),
    ((38, 2), "7", "10.13"),
)


def jetpack(root: Path = Path("/")) -> Finding | None:
    """Return the JetPack of a Jetson, read from its L4T release; None on other machines."""
    try:
        text = (root / "etc" / "nv_tegra_release").read_text()
    except OSError:
        return None
    stated = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", text)
    if stated is None:
        return _finding("jetpack", False, f"a Jetson whose release is not understood: {text.splitlines()[0]!r}")
    release = (int(stated[1]), *(int(part) for part in stated[2].split(".") if part))
    known = [row for row in JETPACKS if row[0] <= release]
    shown = ".".join(str(part) for part in release)
    if not known or release < (36, 4):
        older = f"JetPack {known[-1][1]} with TensorRT {known[-1][2]}" if known else "an early JetPack"
        return _finding("jetpack", False, f"L4T {shown}, {older}; ditc needs TensorRT 10.3, which JetPack 6.1 brings")
    return _finding("jetpack", True, f"L4T {shown}, JetPack {known[-1][1]} (brings TensorRT {known[-1][2]} or later)")


CHECKS: tuple[Callable[[], Finding | None], ...] = (
    python_runtime,
    tried_platform,
    jetpack,
    compile_stages,
    onnxruntime_cpu,
    openvino_cpu,
    openvino_bf16,
    gpu,
    tensorrt,
    onnxruntime_cuda,
    onnxruntime_tensorrt,
)
