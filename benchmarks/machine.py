"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from ditc.compiler.doctor import cpu_features
from ditc.compiler.driver import package_versions


def machine() -> dict[str, Any]:
    """Processor, cores and the versions that decide speed."""
    text = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "features": cpu_features(),
        "python": platform.python_version(),
        "versions": package_versions(),
    }
