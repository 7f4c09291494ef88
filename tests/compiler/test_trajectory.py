"""Whole trajectories against independent implementations: diffusers' pipeline, plain torch, a VAE behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

import ditc
from ditc.bundle import Bundle
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.exporter.dit import DiT
from ditc.exporter.models import builtin_digits, load_model
from ditc.requests import Request
from ditc.runtime.closeness import psnr_db, relative_error
from ditc.runtime.executor import seeded_noise
from ditc.runtime.samplers import sampler_table
from ditc.speed.eager import eager_images

LABELS = [3, 999, 207]


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline on disk as diffusers writes it: transformer, scheduler and VAE, random weights."""
    folder = tmp_path_factory.mktemp("diffusers") / "dit"
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=3, sample_size=8, out_channels=8
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def test_fifty_ddim_steps_equal_the_diffusers_pipeline(diffusers_folder: Path, tmp_path: Path) -> None:
    options = CompileOptions(policy="none", precision="fp32", vc="none", cfg=1.5, steps=50, batch=3, verify_images=1)
    bundle = compile_model(str(diffusers_folder), tmp_path / "b", options)
    noise = np.random.default_rng(0).standard_normal((3, 4, 8, 8), dtype=np.float32)
    with ditc.load(bundle.path) as pipe:
        ours = pipe.images(LABELS, noise=noise)
        latents = pipe.latents(LABELS, noise=noise)
    expected = theirs(diffusers_folder, noise)
    assert relative_error(latents, expected["latents"]) < 1e-3
    assert relative_error(ours, expected["images"]) < 1e-3
    assert ours.shape == (3, 3, 16, 16)


def theirs(folder: Path, noise: np.ndarray) -> dict[str, np.ndarray]:
    """Latents and images of diffusers' own pipeline from the same noise."""
    from unittest.mock import patch

    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    decoded: list[torch.Tensor] = []
    decode = pipeline.vae.decode

    def remember(latents: torch.Tensor, *rest: object, **named: object) -> object:
        decoded.append(latents * pipeline.vae.config.scaling_factor)
        return decode(latents, *rest, **named)

    with (
        patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: torch.from_numpy(noise)),
        patch.object(pipeline.vae, "decode", remember),
    ):
        images = pipeline(LABELS, guidance_scale=1.5, num_inference_steps=50, output_type="np").images
    return {"latents": decoded[0].numpy(), "images": np.moveaxis(images, -1, 1) * 2 - 1}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_bundle_equals_plain_torch_on_the_same_noise(tmp_path: Path, sampler: str, exports: Path) -> None:
    model = builtin_digits()
    options = CompileOptions(policy="none", precision="fp32", vc="none", sampler=sampler, batch=4, verify_images=1)
    bundle = compile_model("digits", tmp_path / "b", options, exports=exports)
    table = sampler_table(model.diffusion, options.sampler_spec(model.sampler), options.steps)
    noise, fresh = seeded_noise(5, 0, 4, (1, 8, 8))
    expected = eager_images(model, table, Request.of(model.spec, [0, 1, 2, 3]), noise, fresh, options.cfg)
    with ditc.load(bundle.path) as pipe:
        assert relative_error(pipe.latents([0, 1, 2, 3], seed=5), expected) < 1e-3


def test_int8_without_cache_stays_above_30_db(tmp_path: Path, exports: Path) -> None:
    options = CompileOptions(policy="none", precision="w8a8", vc="none", batch=64, points=400, verify_images=1)
    bundle = compile_model("digits", tmp_path / "b", options, exports=exports)
    labels = [number % 10 for number in range(64)]
    with ditc.load(bundle.path) as pipe, ditc.load(bundle.path, reference=True) as exact:
        psnr = psnr_db(pipe.images(labels, seed=11), exact.images(labels, seed=11))
    assert psnr.mean() > 30


def test_a_model_written_differently_compiles_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_options: CompileOptions
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1] / "models")
    model = load_model("separate_qkv:build")
    options = quick_options.model_copy(update={"cfg": 1.5 if model.spec.null_label is not None else 1.0})
    bundle = compile_model(model, tmp_path / "b", options)
    kernels = bundle.manifest.checks["kernels"]
    assert isinstance(kernels, dict)
    assert kernels["full"]["linears"] == kernels["full"]["integer"] > 0  # type: ignore[index, call-overload, operator]
    with ditc.load(bundle.path) as pipe:
        assert np.isfinite(pipe.images([0, 1])).all()


def test_a_schedule_from_a_file_skips_single_branches(
    partial_schedule: Path,
    quick_options: CompileOptions,
    make_small_model: Callable[..., DiT],
    compiled_once: Callable[..., Bundle],
) -> None:
    options = quick_options.model_copy(update={"policy": str(partial_schedule)})
    bundle = compiled_once(make_small_model(), options)
    names = {plan.name for plan in bundle.manifest.program.segments}
    assert {"full", "reuse"} < names
    assert len(names) == 3
    with ditc.load(bundle.path) as pipe:
        assert np.isfinite(pipe.images([0, 1])).all()
