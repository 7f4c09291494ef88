"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ditc
from ditc.engines.backend import Backend, DeviceBackend
from ditc.engines.cpu_features import cpu_features
from ditc.engines.integer_form import Arithmetic, SaysArithmetic
from ditc.precision import PRECISIONS

__all__ = ["arithmetic_of", "machine", "package_versions"]

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "scikit-learn", "numpy", "scipy")


def machine() -> dict[str, Any]:
    """Processor, cores and the versions that decide speed."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "features": cpu_features(),
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def arithmetic_of(backend: Backend | DeviceBackend, precision: str) -> Arithmetic | None:
    """What a bundle of some precision is computed in here; None for one without integers, and on a GPU."""
    bits = PRECISIONS.get(precision)
    return backend.arithmetic(bits.weights) if bits is not None and isinstance(backend, SaysArithmetic) else None


def processor() -> str:
    """The processor's name, as Linux has it where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def package_versions() -> dict[str, str]:
    """Versions of what decides the bytes of a bundle."""
    found = {"ditc": ditc.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
