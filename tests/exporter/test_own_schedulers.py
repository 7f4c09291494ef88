"""Folders whose scheduler is read off: the bundle walks as diffusers does with it, and says with which class."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers_folders import pipeline

from ditc.bundle import Bundle, open_bundle
from ditc.cli.main import run
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.errors import BundleError
from ditc.report.sentences import program_sentence
from ditc.runtime.pipeline import load

# of NumPy, about how diffusers takes arrays from tensors
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KIND = "DPMSolverMultistepScheduler"
SETTINGS: dict[str, Any] = {"solver_order": 3, "use_karras_sigmas": True, "prediction_type": "v_prediction"}
PLAIN = {"steps": 6, "policy": "none", "precision": "fp32", "vc": "none", "cfg": 1.0}


def with_scheduler(folder: Path, kind: str, **settings: Any) -> Path:
    pipeline(folder)
    getattr(diffusers, kind)(**settings).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return with_scheduler(tmp_path_factory.mktemp("folders") / "small", KIND, **SETTINGS)


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_model(str(folder), tmp_path_factory.mktemp("bundles") / "b", CompileOptions(**PLAIN))


def test_a_bundle_walks_as_diffusers_does_with_the_folders_own_scheduler(folder: Path, bundle: Bundle) -> None:
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
    theirs = getattr(diffusers, KIND).from_pretrained(folder / "scheduler")
    theirs.set_timesteps(6)
    labels, noise = [1, 4], np.random.default_rng(2).standard_normal((2, 4, 8, 8), dtype=np.float32)
    sample = torch.from_numpy(noise)
    with torch.no_grad():
        for t in theirs.timesteps:
            out = model(sample, timestep=t.expand(2), class_labels=torch.tensor(labels)).sample[:, :4]
            sample = theirs.step(out, t, sample).prev_sample
    with load(bundle.path) as pipe:
        latents = pipe.latents(labels, noise=noise)
    assert np.abs(latents - sample.numpy()).max() < 1e-4 * np.abs(sample.numpy()).max()


def test_the_bundle_says_which_class_it_was_read_off(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"kind": KIND, "config": {"solver_order": 3, "use_karras_sigmas": True}}
    assert run(["inspect", str(bundle.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["sampler"]["scheduler"] == own
    assert run(["inspect", str(bundle.path)]) == 0
    assert KIND in capsys.readouterr().out
    report: Any = SimpleNamespace(manifest=bundle.manifest, arithmetic=None, compensation=None)
    assert f"6 {KIND}(solver_order=3, use_karras_sigmas=True) steps" in program_sentence(report)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"scheduler": None}, "the sampler 'scheduler' comes without a scheduler"),
        ({"name": "unipc"}, "the sampler 'unipc' comes with a scheduler"),
        ({"scheduler": {"kind": "os.system", "config": {}}}, "String should match pattern"),
        ({"scheduler": {"kind": "LMSDiscreteScheduler", "config": {}}}, "the model's own is DPMSolverMultistep"),
        ({"name": "ddim", "scheduler": "gone"}, "'sampler.x.1' is there, and the bundle was made with --sampler ddim"),
    ],
)
def test_a_bundle_that_was_sealed_again_with_another_scheduler_is_refused(
    sampler: dict[str, Any], message: str, bundle: Bundle, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    manifest = json.loads((copy / "manifest.json").read_bytes())
    changed = manifest["settings"]["sampler"] | sampler
    manifest["settings"]["sampler"] = {key: value for key, value in changed.items() if value != "gone"}
    text = json.dumps(manifest).encode()
    (copy / "manifest.json").write_bytes(text)
    (copy / "manifest.sha256").write_text(sha256(text).hexdigest() + "\n")
    with pytest.raises(BundleError, match=message) as refused:
        open_bundle(copy)
    assert "\n" not in str(refused.value)


def test_a_folder_whose_scheduler_can_not_be_read_off_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_scheduler(tmp_path / "heun", "HeunDiscreteScheduler")
    assert run(["compile", str(folder), "-o", str(tmp_path / "b")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "HeunDiscreteScheduler can't be taken: it calls the network 99 times in 50 steps" in message
    assert "--sampler dpm++2m or --sampler ddim" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_another_sampler_takes_the_place_of_a_folders_scheduler(kind: str, tmp_path: Path) -> None:
    folder = with_scheduler(tmp_path / "small", kind)
    bundle = compile_model(str(folder), tmp_path / "b", CompileOptions(**PLAIN, sampler="ddim"))
    asked = bundle.manifest.asked.sampler
    assert asked is not None
    assert (asked.name, asked.scheduler) == ("ddim", None)
