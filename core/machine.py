"""The machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ditc
from ditc.cpu_features import cpu_features
from ditc.spec import Record

__all__ = ["Machine", "machine", "package_versions", "processor"]

# diffusers decides the numbers of samplers that are read off it
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "scikit-learn", "numpy", "scipy", "diffusers")


class Machine(Record):
    """Processor, cores and the versions that decide speed; `features` are the instructions that matter here."""

    processor: str
    cores: int | None
    features: tuple[str, ...]
    python: str
    versions: dict[str, str]


def machine() -> Machine:
    """Return what this process runs on."""
    return Machine(
        processor=processor(),
        cores=os.cpu_count(),
        features=tuple(cpu_features()),
        python=platform.python_version(),
        versions=package_versions(),
    )


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
    versions = {"ditc": ditc.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
