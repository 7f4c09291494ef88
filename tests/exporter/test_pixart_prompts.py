"""PixArt from prompts to pictures: the numbers of diffusers' pipelines with text encoder, VAE and their defaults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from text_folders import t5_folder

import ditc
from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.errors import CheckpointError, InputError
from ditc.exporter.models import load_model
from ditc.runtime.closeness import relative_error
from tests.models import pixart

# diffusers' schedulers make NumPy warn, and its saving torch
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

KINDS = {"alpha": "PixArtAlphaPipeline", "sigma": "PixArtSigmaPipeline"}
STEPS, CFG = 5, 4.5
PROMPTS, NEGATIVE = ["A Fox in the Snow ", "", "two dogs on a windy beach"], "blurry, Low quality"


@pytest.fixture(scope="session")
def folders(run_folder: Path) -> Callable[[str], Path]:
    """A whole folder of each kind: transformer, scheduler, VAE, T5 and its tokenizer."""

    def folder_of(kind: str) -> Path:
        folder = run_folder / "prompted-pixarts" / kind
        if not (folder / "whole").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            pixart.saved(kind, folder)
            index = json.loads((folder / "model_index.json").read_text())
            t5_folder(folder, KINDS[kind], d_model=pixart.CAPTION)
            index |= json.loads((folder / "model_index.json").read_text())
            (folder / "model_index.json").write_text(json.dumps(index))
            (folder / "whole").touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def compiled(
    compiled_once: Callable[..., Bundle], quick_options: CompileOptions, folders: Callable[[str], Path]
) -> Callable[[str], Bundle]:
    settings = {"policy": "none", "precision": "fp32", "vc": "none", "cfg": CFG, "steps": STEPS, "verify_images": 2}
    return lambda kind: compiled_once(str(folders(kind)), quick_options.model_copy(update=settings))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_bundle_makes_the_pictures_that_diffusers_makes_of_prompts(
    kind: str, folders: Callable[[str], Path], compiled: Callable[[str], Bundle]
) -> None:
    theirs = pixart.PIPELINES[kind].from_pretrained(folders(kind))
    theirs.set_progress_bar_config(disable=True)
    bundle = compiled(kind)
    noise = torch.randn(3, *bundle.manifest.model.latent_shape, generator=torch.Generator().manual_seed(4))
    expected = theirs(
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=CFG,
        height=noise.shape[-2] * theirs.vae_scale_factor,
        width=noise.shape[-1] * theirs.vae_scale_factor,
        latents=noise.clone(),
        output_type="pt",
        use_resolution_binning=False,
    ).images
    with ditc.load(bundle.path) as pipe:
        ours = pipe.images(prompt=PROMPTS, negative_prompt=NEGATIVE, latents=noise.numpy())
        others = pipe.images(prompt=PROMPTS, latents=noise.numpy())
    error = relative_error(ours, np.clip(2 * expected.numpy() - 1, -1, 1))
    assert error < 1e-3
    assert relative_error(others, ours) > 2 * error  # prompts matter by more than that
    assert bundle.manifest.measured("text").text["t5"].parity < 1e-4  # type: ignore[index]


def test_a_text_is_as_long_as_asked_for(folders: Callable[[str], Path]) -> None:
    model = load_model(str(folders("sigma")), facts=ditc.ModelFacts(text_tokens=9))
    (encoder,) = model.text
    assert (encoder.length, model.spec.conditions[0].shape) == (9, (9, pixart.CAPTION))


def test_an_encoder_of_another_width_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("sigma"), tmp_path / "f"))
    t5_folder(tmp_path / "other", KINDS["sigma"])
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(tmp_path / "other" / "text_encoder", folder / "text_encoder")
    with pytest.raises(CheckpointError, match=r"gives 'text' of float32 \(1, 300, 16\), expected float32 \(1, 300, 32"):
        ditc.compile_model(str(folder), tmp_path / "b")


def test_a_folder_is_compiled_and_run_from_the_command_line(
    folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its text encoder too: then its bundle takes embeddings, and nothing looks for the encoder."""
    folder = Path(shutil.copytree(folders("sigma"), tmp_path / "f"))
    (tmp_path / "p.txt").write_text("a cat\n\ntwo dogs\n")
    quick = "--steps 4 --policy none --precision fp32 --vc none --verify-images 1 --cfg 2 --text-tokens 9".split()
    assert run(["compile", str(folder), "-o", str(tmp_path / "b"), *quick, "--prompts", str(tmp_path / "p.txt")]) == 0
    assert "prompts are lower-cased and stripped" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "b")]) == 0
    told = capsys.readouterr().out
    assert "prompts          3 of p.txt, in prompts.txt" in told
    assert "text t5          T5EncoderModel, " in told
    assert "9 tokens to text, text_mask; activations up to" in told
    asked = ["--prompt", "a cat", "-n", "2", "-o", str(tmp_path / "o")]
    assert run(["run", str(tmp_path / "b"), *asked]) == 0
    assert Image.open(tmp_path / "o" / "0001.png").text["ditc.prompt"] == "a cat"  # type: ignore[attr-defined]
    shutil.rmtree(folder / "text_encoder")
    assert run(["compile", str(folder), "-o", str(tmp_path / "c"), *quick]) == 2
    assert "copy it, or compile with --no-text and give embeddings" in capsys.readouterr().err
    assert run(["compile", str(folder), "-o", str(tmp_path / "c"), *quick, "--no-text"]) == 0
    assert "typically hold is unknown" in capsys.readouterr().err
    assert not (tmp_path / "c" / "text").exists()
    assert not (tmp_path / "c" / "prompts.txt").exists()
    assert run(["run", str(tmp_path / "c"), *asked]) == 2
    assert "takes no prompts, it is asked for with 'text' and" in capsys.readouterr().err
    embeddings = {name: array.numpy() for name, array in pixart.texts(2, tokens=9).items()}
    with ditc.load(tmp_path / "c") as pipe:
        assert len(pipe.images(conditions=embeddings)) == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompts": "nowhere.txt"}, "can't read prompts from nowhere.txt"),
        ({"prompts": []}, "prompts is an empty list"),
        ({"prompts": ["a", 3]}, "prompts must be a text or a list of texts, found 3 in it"),
        ({"prompts": ["a\nb"]}, "a prompt to compile with is one line"),
        ({"prompts": ["a"], "text": False}, "--no-text leaves out what would read --prompts"),
        (
            {"prompts": ["a"], "conditions": {"text": np.zeros((1, 300, 32))}},
            "--prompts and --conditions both give 'text'",
        ),
        (
            {"conditions": {"text": np.zeros((1, 300, 32))}},
            "needs examples of 'text' and 'null_text' and .* found text of 1 rows",
        ),
    ],
)
def test_prompts_of_a_compile_that_make_no_sense_are_one_line(
    given: dict[str, Any], told: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told) as refused:
        ditc.compile_model(str(folders("sigma")), tmp_path / "b", **given)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "told"),
    [({"prompts": ["a"]}, "has no text encoders, so --prompts would do nothing"), ({"text": False}, "leave out --no-")],
)
def test_a_model_of_classes_has_no_use_for_options_of_prompts(
    given: dict[str, Any], told: str, tmp_path: Path, make_small_model: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match=told):
        ditc.compile_model(make_small_model(), tmp_path / "b", **given)
