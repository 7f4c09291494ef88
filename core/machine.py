"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ditc
from ditc.cpu_features import cpu_features

__all__ = ["machine", "package_versions", "processor"]

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
