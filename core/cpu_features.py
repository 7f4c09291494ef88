"""Features of this processor as the system lists them; `integer_probes` tries what its instructions really give."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["cpu_features", "integer_features"]

# dot products of integers that are added in 32 bits, by architecture
INTEGERS = {"x86_64": ("avx512_vnni", "avx_vnni", "amx_int8"), "aarch64": ("asimddp", "i8mm")}
HALVES = ("avx512_bf16",)


def cpu_features() -> list[str]:
    """Integer and half-precision instructions that matter here, as Linux names them."""
    return _listed((*INTEGERS.get(platform.machine(), ()), *HALVES))


def integer_features() -> list[str]:
    """Those of them for integers."""
    return _listed(INTEGERS.get(platform.machine(), ()))


def _listed(names: tuple[str, ...]) -> list[str]:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in names if name in flags]
