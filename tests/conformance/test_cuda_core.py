"""The simulated cuda-core has nothing that the real one lacks: names, arguments, keywords."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

SIMULATED = Path(__file__).parents[1] / "simulated"
STORE = Path(sys.prefix) / "tensorrt-bindings" / "cuda-core"
VERSION = "1.2.2"

CHECK = """
import sys, json
from cuda.core import Buffer, Device, Stream
from cuda.core.graph import Graph, GraphBuilder
from cuda.bindings import driver
import cuda.core
classes = {c.__name__: c for c in (Buffer, Device, Stream, Graph, GraphBuilder)}
assert driver.cuMemGetInfo
print(json.dumps({n: {m: (getattr(c, m).__doc__ or "") for m in dir(c) if m[0] != "_"} for n, c in classes.items()}))
"""


@pytest.fixture(scope="module")
def real() -> dict[str, dict[str, str]]:
    """Class -> member -> documentation, whose first line is the signature, of the real cuda-core."""
    import json

    if not (STORE / "complete").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(STORE)]
        wheels = [f"cuda-core=={VERSION}", "cuda-bindings>=13,<14", "cuda-pathfinder>=1.4"]
        subprocess.run([*pip, *wheels], check=True)
        (STORE / "complete").touch()
    done = subprocess.run(
        [sys.executable, "-c", CHECK], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(STORE)}
    )
    return dict(json.loads(done.stdout))


def simulated() -> dict[str, type]:
    sys.path.insert(0, str(SIMULATED))
    try:
        spec = importlib.util.spec_from_file_location("simulated_core", SIMULATED / "cuda" / "core.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SIMULATED))
    return {name: getattr(module, name) for name in ("Buffer", "Device", "Stream", "Graph", "GraphBuilder")}


@pytest.mark.parametrize("name", ["Buffer", "Device", "Stream", "Graph", "GraphBuilder"])
def test_what_is_simulated_exists_in_the_real_cuda_core(name: str, real: dict[str, dict[str, str]]) -> None:
    played = {"queue", "waiting", "recording", "numbers"}  # the simulation's own
    for member, value in vars(simulated()[name]).items():
        if member.startswith("_") or member in played:
            continue
        assert member in real[name], f"{name}.{member}"
        function = value.__func__ if isinstance(value, staticmethod) else value
        if callable(function):
            signature = real[name][member].splitlines()[0]
            for parameter in list(inspect.signature(function).parameters)[
                0 if isinstance(value, staticmethod) else 1 :
            ]:
                assert parameter in signature, f"{name}.{member}({parameter}): {signature}"
