"""`ditc evaluate` on real bundles: none differs from itself, a known damage is found by its size, the gate shuts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ditc.spec as spec
from ditc.bundle import Bundle, open_bundle, seal_bundle, write_tables
from ditc.cli.judging import print_evaluation
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.errors import CheckError, InputError
from ditc.quality.bootstrap import Estimate
from ditc.quality.evaluating import check_not_worse, evaluate_bundle
from ditc.quality.evaluation import Distributions, Evaluation
from ditc.quality.generating import fp_digest
from ditc.quality.options import EvaluateOptions
from ditc.runtime.options import Place
from ditc.spec import Skipped

STEPS = 4
K = 0.6
QUICK = "--images 20 --seeds 0,1 --rounds 50 --step-images 10"
QUICK_OPTIONS = EvaluateOptions(images=20, seeds=(0, 1), rounds=50, step_images=10)


@pytest.fixture(scope="module")
def exact(compiled_once: Callable[..., Bundle]) -> Path:
    """The reference model uncached in FP32: its own reference."""
    options = CompileOptions(policy="none", precision="fp32", vc="none", steps=STEPS, verify_images=1)
    return compiled_once("digits", options).path


@pytest.fixture(scope="module")
def damaged(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with its last sample drawn together by K."""
    return with_compensation(exact, tmp_path_factory.mktemp("evaluate") / "damaged", K)


def with_compensation(bundle: Path, path: Path, k: float) -> Path:
    shutil.copytree(bundle, path)
    opened = open_bundle(path)
    table = np.ones((STEPS, 1))
    table[-1] = k
    added = {"compensation.k": table, "compensation.mu": 0 * table}
    write_tables(path / "tables.safetensors", opened.tables() | added)
    seal_bundle(path, opened.manifest.model_copy(update={"settings": opened.manifest.settings | {"vc": "auto"}}))
    return path


@pytest.fixture(scope="module")
def damage(damaged: Path) -> Evaluation:
    return evaluate_bundle(damaged, QUICK_OPTIONS)


def evaluated(bundle: Path, capsys: pytest.CaptureFixture[str], more: str = "") -> dict[str, Any]:
    assert run(f"evaluate {bundle} {QUICK} --json {more}".split()) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_a_bundle_equal_to_its_reference_differs_in_nothing(exact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluated(exact, capsys, "--fail-if-worse 0")
    assert report["n"] == 40
    assert report["paired"]["psnr_db"]["worst"] > 200
    assert report["paired"]["ssim"] == {"mean": 1, "low": 1, "high": 1, "worst": 1, "window": 7}
    assert report["paired"]["cosine"]["worst"] == pytest.approx(1)
    assert "too small for it" in report["paired"]["lpips"]["skipped"]
    assert set(report["steps"]) == {"bundle"}
    assert report["steps"]["bundle"]["images"] == 10
    assert report["steps"]["bundle"]["relative_error"] == [0] * STEPS
    assert report["steps"]["bundle"]["variance_drift"] == [[0]] * STEPS
    distribution = report["distribution"]
    assert (distribution["features"]["name"], distribution["real"]["n"]) == ("digits", 1797)
    assert distribution["bundle"] == distribution["fp"]
    assert {row["value"] for row in distribution["difference"].values()} == {0}
    assert distribution["difference"]["frechet_distance"]["high"] == 0
    assert distribution["fp"]["class_consistency"]["value"] > 0.8
    assert [(row["seed"], row["n"]) for row in distribution["per_seed"]] == [(0, 20), (1, 20)]


def test_a_damage_is_found_at_its_step_with_its_size(damage: Evaluation) -> None:
    with_it, without = damage.steps.bundle, damage.steps.uncompensated
    assert with_it.relative_error[:-1] == (0,) * (STEPS - 1)
    assert with_it.relative_error[-1] == pytest.approx(1 - K, rel=1e-5)
    assert with_it.variance_drift[-1] == pytest.approx([K**2 - 1], abs=1e-5)
    assert without is not None
    assert without.relative_error == (0,) * STEPS
    assert damage.measured_pairs["psnr_db"].high < 25
    assert damage.measured_pairs["ssim"].high < 1
    distance = frechet_difference(damage)
    assert 0 < distance.low < distance.value < distance.high


def frechet_difference(evaluation: Evaluation) -> Estimate:
    assert isinstance(evaluation.distribution, Distributions)
    return evaluation.distribution.difference.frechet_distance


def test_the_gate_shuts_where_the_whole_interval_is_above_it(damage: Evaluation) -> None:
    low = frechet_difference(damage).low
    check_not_worse(damage, low)
    with pytest.raises(CheckError, match="the Frechet distance is worse than FP's by"):
        check_not_worse(damage, low - 1e-9)


def test_the_gate_shuts_where_nothing_was_measured(damage: Evaluation) -> None:
    nothing = damage.model_copy(update={"distribution": Skipped(skipped="no features")})
    with pytest.raises(CheckError, match="no Frechet distance was measured: no features"):
        check_not_worse(nothing, 1e9)


def test_a_report_is_printed_before_the_gate_shuts(
    damaged: Path, damage: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"evaluate {damaged} {QUICK} --fail-if-worse 0 --json".split()) == 1
    printed = capsys.readouterr()
    assert "check failed: the Frechet distance is worse" in printed.err
    assert Evaluation.model_validate_json(printed.out) == damage  # and the same settings find the same


def test_a_terminal_shows_pairs_distributions_and_steps(damage: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(damage)
    text = capsys.readouterr().out
    for part in ("40 images, seeds 0, 1", "ssim, window 7", "frechet distance", "without compensation"):
        assert part in text
    assert "lpips                     not measured: images of 8 x 8 pixels" in text
    assert f"{K**2 - 1:+.5f}" in text


def test_fp_images_that_lie_in_the_folder_are_not_made_again(exact: Path, damaged: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    options = EvaluateOptions(images=8, seeds=(3,), rounds=5, step_images=2)

    def evaluate(bundle: Path) -> Evaluation:
        stages.clear()
        return evaluate_bundle(bundle, options, save=tmp_path, progress=lambda stage, *_: stages.append(stage))

    first = evaluate(exact)
    assert "fp-3" in stages
    assert Evaluation.model_validate_json((tmp_path / "evaluate.json").read_text()) == first
    second = evaluate(damaged)
    assert "fp-3" not in stages
    sides = [evaluation.distribution for evaluation in (first, second)]
    assert isinstance(sides[0], Distributions)
    assert isinstance(sides[1], Distributions)
    assert sides[0].fp == sides[1].fp
    with np.load(tmp_path / "pairs.npz") as pairs:
        assert pairs["bundle"].shape == pairs["fp"].shape == (8, 64)
        assert pairs["psnr_db"].mean() == pytest.approx(second.measured_pairs["psnr_db"].mean)
    real = str(tmp_path / "real.npz")
    third = evaluate_bundle(damaged, options.model_copy(update={"real": real}), save=tmp_path)
    assert isinstance(third.distribution, Distributions)
    assert third.distribution.bundle == sides[1].bundle
    (stored,) = tmp_path.glob("fp-*/seed3-*.npy")
    stored.write_bytes(stored.read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged"):
        evaluate(exact)


def test_bundles_that_differ_in_their_cache_share_fp_images_and_others_do_not(bundles: dict[str, Bundle]) -> None:
    uncached, cached = fp_digest(bundles["fp32-none"]), fp_digest(bundles["fp32-cached"])
    assert uncached == cached
    manifest = bundles["fp32-none"].manifest
    for changes in ({"guidance": 3.0}, {"model": manifest.model.model_copy(update={"num_classes": 4})}):
        assert fp_digest(Bundle(bundles["fp32-none"].path, manifest.model_copy(update=changes))) != uncached


def test_images_do_not_depend_on_the_size_of_a_request(exact: Path) -> None:
    distances = []
    for batch in (3, 10):
        options = EvaluateOptions(images=10, seeds=(0,), rounds=5, real="fp")
        distributions = evaluate_bundle(exact, options, place=Place(batch=batch)).distribution
        assert isinstance(distributions, Distributions)
        assert distributions.real.about == "10 FP images of other noise"
        distances.append(distributions.bundle.frechet_distance.value)
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)
    assert distances[0] > 0  # the real ones are others


def test_a_model_without_a_training_set_is_held_against_fp_images_of_other_noise(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluated(bundles["cached"].path, capsys)
    assert report["distribution"]["features"] | {"about": ""} == {"name": "pixels", "about": "", "dimensions": 192}
    assert report["distribution"]["real"] == {"n": 40, "about": "40 FP images of other noise"}
    assert report["distribution"]["bundle"]["class_consistency"] is None
    assert set(report["steps"]) == {"bundle", "uncompensated"}
    assert report["steps"]["bundle"]["relative_error"] != report["steps"]["uncompensated"]["relative_error"]


def test_latents_without_a_decoder_have_pairs_and_no_distribution(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spec, "PIXEL_CHANNELS", (1,))
    report = evaluated(bundles["cached"].path, capsys)
    assert "compile it with --vae" in report["distribution"]["skipped"]
    assert report["paired"]["psnr_db"]["mean"] < 50
    assert run(f"evaluate {bundles['cached'].path} {QUICK}".split()) == 0
    assert "no distribution measures: the bundle makes latents" in capsys.readouterr().out
    for more in ("--features pixels", "--fail-if-worse 1"):
        assert run(f"evaluate {bundles['cached'].path} {QUICK} {more}".split()) == 2
        assert "features need images, but the bundle makes latents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--images 3", "--images must be at least 4, found 3"),
        ("--seeds a,b", "--seeds must be whole numbers"),
        ("--seeds 1,1", "--seeds must be different numbers"),
        ("--seeds -1", "--seeds must be different numbers from 0 on"),
        ("--rounds 1", "--rounds must be at least 2"),
        ("--batch 0", "--batch must be at least 1"),
        ("--step-images 0", "--step-images must be at least 1"),
        ("--fail-if-worse nan", "--fail-if-worse must be a finite number"),
        ("--features vgg", "unknown --features 'vgg'; choose one of"),
        ("--features digits", "take images of shape (1, 8, 8)"),
        ("--real {bad}/nowhere", "--real takes fp, digits"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    more: str, message: str, bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"evaluate {bundles['cached'].path} {QUICK} --json {more.format(bad=tmp_path)}"
    assert run(command.split()) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.endswith(": done")]
    assert len(lines) == 1
    assert message in lines[0]
    assert printed.out == ""


def test_a_bundle_without_its_reference_is_refused(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundles["cached"].path, tmp_path / "b", ignore=shutil.ignore_patterns("reference"))
    assert run(f"evaluate {tmp_path / 'b'} --images 8".split()) == 2
    assert "without its FP reference; compile it again" in capsys.readouterr().err
