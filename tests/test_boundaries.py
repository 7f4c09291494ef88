"""What may be loaded where: the runtime without torch, the command line at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = "torch", "onnx", "onnxscript", "sklearn", "scipy", "tensorrt", "diffusers"


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    report = "\nimport sys; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split())


def test_generating_from_a_bundle_loads_no_torch(cached_bundle_path: Path) -> None:
    code = f"import ditc\nwith ditc.load({str(cached_bundle_path)!r}) as pipe: pipe.images([1, 2])"
    loaded = modules_after(code)
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_importing_ditc_loads_nothing_heavy() -> None:
    assert modules_after("import ditc").isdisjoint({*HEAVY, "numpy", "onnxruntime", "pydantic"})


@pytest.mark.parametrize("arguments", ["--help", "compile --help", "run --help"])
def test_help_loads_nothing_heavy(arguments: str) -> None:
    code = f"from ditc.compiler.cli import run; assert run({arguments.split()!r}) == 0"
    assert modules_after(code).isdisjoint({*HEAVY, "numpy", "onnxruntime"})


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ditc.compiler", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    bare = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], capture_output=True, check=True)
        bare.append(time.perf_counter() - start)
    assert min(seconds) - min(bare) < 0.3
