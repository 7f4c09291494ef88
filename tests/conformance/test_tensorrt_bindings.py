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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.models import with_vae

HERE = Path(__file__).parent
STORE = Path(sys.prefix) / "tensorrt-bindings"
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")
Started = tuple["subprocess.Popen[bytes]", Path]
QUICK = CompileOptions(
    steps=6,
    points=24,
    pool_images=24,
    vc_images=8,
    verify_images=4,
    batch=4,
    policy="fora:2",
    reuse="hold",
    smooth="none",
    vc="std",
)
SMALL = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=5)
NARROW = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=72, depth=2, num_heads=4, num_classes=5)


def small_model(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    model = DiT(config, name="small").eval()
    model.cfg_channels = 2
    return model


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles: the reference model, and small ones that differ in what a device has to do."""
    folder, exports = tmp_path_factory.mktemp("compiled"), tmp_path_factory.mktemp("exports")
    schedule = partial_schedule(tmp_path_factory.mktemp("schedule") / "schedule.json")
    digits = QUICK.model_copy(update={"steps": 50, "points": 64, "pool_images": 8, "policy": "fora:3", "batch": 3})
    compile_model("digits", folder / "digits", digits)
    for name, config, changes in (
        ("small", SMALL, {"ranges": "max"}),
        ("learned-noise", SMALL, {"sampler": "ddpm", "variance": "learned", "clip": 1.0}),
        ("fixed-noise", SMALL, {"eta": 0.5, "vc": "none"}),
        ("unguided", SMALL, {"cfg": 1.0}),
        ("fp16", SMALL, {"precision": "fp16", "target": "tensorrt"}),
        ("fp32", SMALL, {"precision": "fp32"}),
        ("odd-addresses", NARROW, {"batch": 1}),  # a step's row of the table is no multiple of 256 bytes
        ("partial-rows", SMALL, {"policy": str(schedule)}),
        ("affine", SMALL, {"reuse": "affine"}),
        ("taylor", SMALL, {"reuse": "taylor", "policy": "fora:2"}),
        ("per-step", SMALL, {"policy": str(schedule), "scales": "per-step", "midpoint": "bounded"}),
    ):
        compile_model(small_model(config), folder / name, QUICK.model_copy(update=changes), exports=exports)
    latent = with_vae(small_model(replace(SMALL, in_channels=4)), tiny_vae(tmp_path_factory.mktemp("vae")))
    compile_model(latent, folder / "decoded", QUICK)
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
