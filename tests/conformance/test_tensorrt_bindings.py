"""The TensorRT calls of ditc against the real bindings of every supported line, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STORE = Path(sys.prefix) / "tensorrt-bindings"
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")


def install(version: str) -> Path:
    """The folder with a version's bindings, fetched at the first use."""
    spec = importlib.util.spec_from_file_location("bindings", HERE / "bindings.py")
    assert spec is not None
    assert spec.loader is not None
    bindings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bindings)
    bindings.install(STORE, version)
    return STORE / version


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in libraries need a C compiler (gcc)")
@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensorrt_call_exists_in_the_real_bindings(version: str) -> None:
    folder = install(version)
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "DITC_REAL_BINDINGS": version,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_trt_api.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
