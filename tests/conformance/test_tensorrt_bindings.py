"""Everything of ditc that calls TensorRT, against the real bindings of every supported line, each in its own process.

The classes with native parts are played by tests/simulated, which holds every call to the real interface.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from ditc.bundle import Bundle
from ditc.compiler.options import CompileOptions
from ditc.exporter.dit import DiT
from ditc.exporter.models import with_vae
from ditc.files import atomic_folder, in_turn
from tests.models import pixart
from tests.models.token_mixer import MODELS
from tests.models.two_streams import dual

HERE = Path(__file__).parent
STORE = Path(sys.prefix) / "tensorrt-bindings"
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.0.106")
NARROW = 72  # hidden size, with which a step's row of the table is no multiple of 256 bytes
# what a device has to do differently, by the settings of a small bundle
SETTINGS = {
    "small": {"ranges": "max"},
    "learned-noise": {"sampler": "ddpm", "variance": "learned", "clip": 1.0},
    "fixed-noise": {"eta": 0.5, "vc": "none"},
    "unguided": {"cfg": 1.0},
    "fp16": {"precision": "fp16", "target": "tensorrt"},
    "fp32": {"precision": "fp32"},
    "partial-rows": {"policy": "partial"},
    "affine": {"reuse": "affine"},
    "taylor": {"reuse": "taylor", "smooth": "smooth", "vc": "none"},
    "taylor-3": {"reuse": "taylor:3", "vc": "none", "steps": 8},
    "float-ends": {"float_steps": "1:2"},
    "per-step": {"policy": "partial", "scales": "per-step", "midpoint": "bounded"},
}
# models of a user's own, for what is asked for with more than a class, or passes on more than the image
OWN_MODELS: dict[str, Callable[[], Any]] = {
    "text": MODELS["prompted"],
    "fresh-condition": MODELS["iterated"],
    "video": MODELS["video"],
    "two-streams": dual,
    "pixart": lambda: pixart.model("sigma"),  # tables of timesteps alone
}


@pytest.fixture(scope="module")
def compiled(
    run_folder: Path,
    compiled_once: Callable[..., Bundle],
    make_small_model: Callable[..., DiT],
    quick_options: CompileOptions,
    partial_schedule: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder of bundles: the reference model, and small ones that differ in what a device has to do."""
    folder, quick = run_folder / "conformance", quick_options.model_copy(update={"policy": "fora:2"})

    def bundles() -> Iterator[tuple[str, Bundle]]:
        digits = {"steps": 50, "points": 64, "pool_images": 8, "policy": "fora:3", "batch": 3}
        yield "digits", compiled_once("digits", quick.model_copy(update=digits))
        for name, changes in SETTINGS.items():
            policy = {"policy": str(partial_schedule)} if changes.get("policy") == "partial" else {}
            yield name, compiled_once(make_small_model(), quick.model_copy(update=changes | policy))
        narrow = make_small_model(hidden_size=NARROW)
        yield "odd-addresses", compiled_once(narrow, quick.model_copy(update={"batch": 1}))
        for name, own in OWN_MODELS.items():
            guided = {"cfg": 1.5 if own().spec.can_be_guided else 1.0}
            yield name, compiled_once(own(), quick.model_copy(update={**guided, "ranges": "max"}))
        latent = with_vae(make_small_model(in_channels=4), tiny_vae(tmp_path_factory.mktemp("vae")))
        yield "decoded", compiled_once(latent, quick)

    with in_turn(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with atomic_folder(folder) as fresh:
                for name, bundle in bundles():
                    shutil.copytree(bundle.path, fresh / name)
    return folder


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
    with in_turn(STORE / f"{version}.lock"):
        bindings.install(STORE, version)
    return STORE / version


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in libraries need a C compiler (gcc)")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", VERSIONS)
def test_everything_that_calls_tensorrt_holds_with_the_real_bindings(
    version: str, compiled: Path, tmp_path: Path
) -> None:
    folder = install(version)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "simulated"), str(folder), os.environ.get("PYTHONPATH", "")]),
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "DITC_REAL_BINDINGS": version,
        "DITC_BUNDLES": str(compiled),
    }
    tests = [str(path) for path in sorted(HERE.glob("test_simulated_*.py"))]
    options = ["-q", "-p", "no:cacheprovider", "--durations", "5", "--basetemp", str(tmp_path / "base")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
