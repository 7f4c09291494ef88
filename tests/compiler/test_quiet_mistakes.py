"""Ways in which a compile could quietly do the wrong thing, each found once and kept from coming back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

import ditc
from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler import stages
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines.backend import lowered_path
from ditc.errors import BundleError, InputError
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


def test_another_number_of_heads_does_not_resume_the_old_export(
    latent_checkpoint: Path,
    tmp_path: Path,
    quick_options: CompileOptions,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stages, "record_pool", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compile_model(str(latent_checkpoint), tmp_path / "b", quick_options, num_heads=4, exports=exports)
    made = []
    export = stages.export
    monkeypatch.setattr(stages, "export", lambda *a: (made.append("export"), export(*a)))
    compile_model(str(latent_checkpoint), tmp_path / "b", quick_options, num_heads=8)
    assert made == ["export"]


class Flattening(nn.Module):
    """An MLP layer that sees tokens as rows, as some code bases have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, x.shape[-1])).reshape(-1, *x.shape[1:])  # type: ignore[no-any-return]


def test_linear_layers_on_flattened_tokens_are_quantized_too(
    tmp_path: Path, make_small_model: Callable[[], DiT], quick_options: CompileOptions
) -> None:
    model = make_small_model()
    for block in model.blocks:
        block.mlp = Flattening(block.mlp)
    bundle = compile_model(model, tmp_path / "b", quick_options)
    assert bundle.manifest.checks["kernels"] == {"full": {"linears": 8, "integer": 8}}


def test_a_layer_shared_by_two_blocks_compiles(
    tmp_path: Path, make_small_model: Callable[[], DiT], quick_options: CompileOptions
) -> None:
    model = make_small_model()
    model.blocks[1].mlp = model.blocks[0].mlp
    bundle = compile_model(model, tmp_path / "b", quick_options)
    assert bundle.manifest.checks["kernels"] == {"full": {"linears": 8, "integer": 8}}


def test_a_file_that_the_manifest_does_not_list_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    shutil.copytree(bundles["fp32-none"].path, tmp_path / "b")
    shutil.copy(bundles["cached"].segment_path("full"), tmp_path / "b" / "segments" / "full.onnxrt.onnx")
    with pytest.raises(BundleError, match=r"segments/full\.onnxrt\.onnx, which its manifest doesn't list"):
        ditc.load(tmp_path / "b")


def test_the_time_per_image_is_the_whole_request(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    from ditc.runtime.running import run_bundle

    found = run_bundle(bundles["cached"].path, [0, 1, 2], tmp_path / "i", seed=0, watch=lambda _: None)
    steps = sum(times["total_seconds"] for times in found["segments"].values()) / 3
    assert found["seconds_per_image"] > steps
    assert found["seconds_per_image_outside_steps"] == pytest.approx(found["seconds_per_image"] - steps)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed -1", "--seed must be 0 to"),
        ("--seed 5000000000", "--seed must be 0 to"),
        ("--tap-tau nan", "TAP needs tau > 0"),
        ("--pool 0", "--pool must be at least 1, found 0"),
        ("--cfg 2000", "--cfg must be above 0 and below 1000"),
        ("--pool 1 --points 800", "the pool will have 17 points, fewer than the 800"),
    ],
)
def test_odd_settings_are_one_line(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", "digits", "-o", str(tmp_path / "b"), *flags.split()]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_odd_requests_are_one_line(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no bundle")
    bundle = str(bundles["cached"].path)
    odd: list[tuple[list[str], int, str]] = [
        (["run", bundle, "--labels", "1", "--seed", "-1", "-o", str(tmp_path / "i")], 2, "seed must not be negative"),
        (["verify", bundle, "--images", "1", "--min-psnr", "nan"], 1, "check failed"),
        (
            ["run", str(tmp_path / "file"), "--labels", "1", "-o", str(tmp_path / "i")],
            2,
            "is a file, expected the folder",
        ),
    ]
    for arguments, code, message in odd:
        assert run(arguments) == code
        assert message in capsys.readouterr().err


def test_more_noise_than_labels_is_refused(bundles: dict[str, Bundle]) -> None:
    noise = np.zeros((3, 3, 8, 8), np.float32)
    with ditc.load(bundles["cached"].path) as pipe, pytest.raises(InputError, match="2 labels, found 3"):
        pipe.images([0, 1], noise=noise)


def test_a_relative_output_folder_is_the_one_meant(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {"policy": "none", "precision": "fp32", "vc": "none"}
    compile_model(make_small_model(), "inner/../b", quick_options.model_copy(update=changes), exports=exports)
    assert (tmp_path / "b" / "manifest.json").is_file()
