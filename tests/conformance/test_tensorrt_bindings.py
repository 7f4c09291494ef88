"""Everything of ditc that calls TensorRT, against the real bindings of every supported line, each in its own process.

The classes with native parts are played by tests/simulated, which holds every call to the real interface.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.exporter.dit import DiT
from ditc.exporter.models import with_vae

HERE = Path(__file__).parent
STORE = Path(sys.prefix) / "tensorrt-bindings"
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")
Started = tuple["subprocess.Popen[bytes]", Path]
NARROW = 72  # hidden size, with which a step's row of the table is no multiple of 256 bytes


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, make_small_model: Callable[..., DiT], quick_options: CompileOptions
) -> Path:
    """A folder of bundles: the reference model, and small ones that differ in what a device has to do."""
    folder, exports = tmp_path_factory.mktemp("compiled"), tmp_path_factory.mktemp("exports")
    schedule = partial_schedule(tmp_path_factory.mktemp("schedule") / "schedule.json")
    quick = quick_options.model_copy(update={"policy": "fora:2"})
    digits = quick.model_copy(update={"steps": 50, "points": 64, "pool_images": 8, "policy": "fora:3", "batch": 3})
    compile_model("digits", folder / "digits", digits)
    for name, changes in (
        ("small", {"ranges": "max"}),
        ("learned-noise", {"sampler": "ddpm", "variance": "learned", "clip": 1.0}),
        ("fixed-noise", {"eta": 0.5, "vc": "none"}),
        ("unguided", {"cfg": 1.0}),
        ("fp16", {"precision": "fp16", "target": "tensorrt"}),
        ("fp32", {"precision": "fp32"}),
        ("partial-rows", {"policy": str(schedule)}),
        ("affine", {"reuse": "affine"}),
        ("taylor", {"reuse": "taylor", "smooth": "smooth", "vc": "none"}),
        ("float-ends", {"policy": "fora:2", "float_steps": "1:2"}),
        ("per-step", {"policy": str(schedule), "scales": "per-step", "midpoint": "bounded"}),
    ):
        compile_model(make_small_model(), folder / name, quick.model_copy(update=changes), exports=exports)
    narrow = make_small_model(hidden_size=NARROW)
    compile_model(narrow, folder / "odd-addresses", quick.model_copy(update={"batch": 1}), exports=exports)
    latent = with_vae(make_small_model(in_channels=4), tiny_vae(tmp_path_factory.mktemp("vae")))
    compile_model(latent, folder / "decoded", quick)
    return folder


def partial_schedule(path: Path) -> Path:
    """A schedule with full, empty and partial rows: attention reused while the MLPs compute."""
    rows = [[True] * 4, [False] * 4, [False, True, False, True], [False] * 4, [True] * 4, [False] * 4]
    path.write_text(json.dumps({"compute": rows}))
    return path


def tiny_vae(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=8).save_pretrained(folder)
    return folder


def install(version: str) -> Path:
    """The folder with a version's bindings, fetched at the first use."""
    spec = importlib.util.spec_from_file_location("bindings", HERE / "bindings.py")
    assert spec is not None
    assert spec.loader is not None
    bindings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bindings)
    bindings.install(STORE, version)
    return STORE / version


@pytest.fixture(scope="module")
def running(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """The tests of all versions, started at once: they spend their time starting processes."""
    folder = tmp_path_factory.mktemp("output")
    started = {version: start(version, compiled, folder / version) for version in VERSIONS}
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


def start(version: str, compiled: Path, output: Path) -> Started:
    folder = install(version)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "simulated"), str(folder), os.environ.get("PYTHONPATH", "")]),
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "DITC_REAL_BINDINGS": version,
        "DITC_BUNDLES": str(compiled),
    }
    tests = [str(path) for path in sorted(HERE.glob("test_simulated_*.py"))]
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", str(output.with_suffix(".tmp"))]
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    return process, output


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in libraries need a C compiler (gcc)")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", VERSIONS)
def test_everything_that_calls_tensorrt_holds_with_the_real_bindings(version: str, running: dict[str, Started]) -> None:
    process, output = running[version]
    code = process.wait()
    said = output.read_text()
    assert code == 0, said
    assert " passed" in said
