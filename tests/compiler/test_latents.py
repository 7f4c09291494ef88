"""Models of latents: images through a VAE of their own, and none without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from diffusers import AutoencoderKL

import ditc
from ditc.cli.main import run
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines.backend import lowered_path
from ditc.errors import InputError
from ditc.exporter.dit import DiT, DiTConfig
from ditc.runtime.closeness import relative_error

LATENT = DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=1, num_heads=4, num_classes=5)


@pytest.fixture
def latent_checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(DiT(LATENT).state_dict(), tmp_path / "latent.pt")
    return tmp_path / "latent.pt"


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=8)
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_a_checkpoint_of_latents_gives_images_through_a_vae_of_its_own(
    latent_checkpoint: Path, vae: Path, tmp_path: Path, quick_options: CompileOptions, exports: Path
) -> None:
    bundle = compile_model(str(latent_checkpoint), tmp_path / "b", quick_options, num_heads=4, vae=vae, exports=exports)
    with ditc.load(bundle.path) as pipe:
        images, latents = pipe.images([0, 1]), pipe.latents([0, 1])
    decoder = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        expected = decoder.decode(torch.from_numpy(latents) / decoder.config.scaling_factor).sample.clamp(-1, 1)
    assert images.shape == (2, 3, 8, 8)
    assert relative_error(images, expected.numpy()) < 1e-4
    assert bundle.manifest.checks["tensorrt"] == {
        name: [] for name in ("condition", "full", "reuse", "decode", "update")
    }
    onnx.checker.check_model(str(lowered_path(bundle.segment_path("decode"), "trt")), full_check=True)


def test_a_vae_of_other_latents_is_refused(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(DiT(replace(LATENT, in_channels=3)).state_dict(), tmp_path / "rgb.pt")
    arguments = ["compile", str(tmp_path / "rgb.pt"), "--heads", "4", "--vae", str(vae), "-o", str(tmp_path / "b")]
    assert run(arguments) == 2
    assert "decodes 4 channels, rgb makes 3" in capsys.readouterr().err


def test_latents_are_not_shown_as_images(
    latent_checkpoint: Path,
    tmp_path: Path,
    quick_options: CompileOptions,
    exports: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = compile_model(str(latent_checkpoint), tmp_path / "b", quick_options, num_heads=4, exports=exports)
    with ditc.load(bundle.path) as pipe:
        assert pipe.latents([0, 1]).shape == (2, 4, 8, 8)
        with pytest.raises(InputError, match="latents of 4 channels and has no decoder"):
            pipe.images([0, 1])
    assert run(["run", str(bundle.path), "--labels", "1", "-o", str(tmp_path / "i")]) == 2
    assert "--vae FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "i").exists()
