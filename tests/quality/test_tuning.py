"""Tuning: what is refused before anything is measured, what is said on the way, and a search on a real model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditc.bundle import open_bundle
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.engines import onnxrt
from ditc.engines.integer_form import Exactness
from ditc.errors import CheckError, InputError
from ditc.progress import Progress
from ditc.quality import tuning
from ditc.quality.options import TuneOptions
from ditc.quality.search import Trial
from ditc.quality.tuning import Tuning, tune_model

OPTIONS = TuneOptions(least_psnr_db=30.0, intervals=(2, 3, 4, 5, 6))
UNCACHED = Trial(
    stage="quantizer",
    changes={"policy": "none"},
    seconds=1.0,
    psnr_db=40,
    psnr_low=40,
    worse_by=None,
    worse_high=None,
    size_bytes=1,
    within=True,
)


@pytest.mark.parametrize(
    ("exactness", "changes", "expected"),
    [
        (Exactness(8), {}, False),
        (Exactness(7, 8), {}, True),
        (Exactness(7, 8), {"precision": "w7a8"}, False),
        (Exactness(7, 8), {"precision": "fp32"}, False),
        (Exactness(7, 8), {"target": "tensorrt"}, False),
    ],
)
def test_seven_bits_may_pay_where_the_probe_found_a_slower_form(
    exactness: Exactness, changes: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxrt, "onnxruntime_exactness", lambda: exactness)
    assert tuning.seven_bits_may_pay(CompileOptions(**changes)) == expected


def test_a_target_that_refuses_the_precision_is_refused_before_anything_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxrt, "onnxruntime_exactness", lambda: Exactness(7))
    assert run(["tune", "digits", "-o", str(tmp_path / "b"), "--least-psnr", "30"]) == 2
    assert "--target cpu does not run w8a8 exactly on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_budget_of_distance_asks_for_features_before_images_are_made() -> None:
    needing = TuneOptions(worse_by=0.1)
    assert [options.evaluation.needs_features for options in (needing, OPTIONS)] == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least_psnr_db": None}, "--worse-by DISTANCE or --least-psnr DB"),
        ({"worse_by": 0.1, "seconds": 0.0}, "--seconds must be above 0"),
        ({"worse_by": float("nan")}, "--worse-by must be a finite number, found nan"),
        ({"least_psnr_db": float("inf")}, "--least-psnr must be a finite number, found inf"),
        ({"intervals": (1, 2)}, "growing numbers from 2 on"),
        ({"intervals": (3, 2)}, "growing numbers from 2 on"),
        ({"requests": 0}, "requests must be at least 1"),
        ({"images": 3}, "--images must be at least 4"),
        ({"features": "vgg"}, "unknown --features 'vgg'"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OPTIONS.model_copy(update=changes)


def test_real_images_that_are_not_there_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--real takes fp, digits, .* found 'nowhere'"):
        tune_model("digits", tmp_path / "o", CompileOptions(), OPTIONS.model_copy(update={"real": "nowhere"}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("digits --policy fora:3", "--policy is what tune searches"),
        ("digits --real nowhere", "--real takes fp, digits"),
        ("digits --target tpu", "unknown --target 'tpu'"),
        ("nowhere.pt", "nowhere.pt"),
    ],
)
def test_what_is_refused_leaves_nothing(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", *arguments.split(), "-o", str(tmp_path / "b"), "--least-psnr", "30"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("kept")
    assert run(["tune", "digits", "-o", str(tmp_path / "b"), "--least-psnr", "30", "--force"]) == 2
    assert "exists and is not a bundle" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "mine"]


def test_away_from_a_terminal_stages_of_candidates_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def searching(*_: Any, progress: Progress, on_trial: Callable[[Trial], None], **options: Any) -> None:
        progress("export", 1, 1)
        on_trial(UNCACHED)
        raise CheckError("nothing found")

    monkeypatch.setattr(tuning, "tune_model", searching)
    assert run(["tune", "digits", "-o", str(tmp_path / "b"), "--least-psnr", "30"]) == 1
    said = capsys.readouterr().err
    assert "export" not in said
    assert "policy none" in said


def test_a_search_on_a_real_model_writes_the_bundle_it_chose_and_goes_on_where_it_was(
    tmp_path: Path, make_small_model: Callable[[], Any], quick_options: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = quick_options.model_copy(
        update={"precision": "fp32", "batch": 1, "steps": 4, "vc_images": 2, "verify_images": 1}
    )
    options = TuneOptions(least_psnr_db=-100.0, images=4, intervals=(2,), requests=1)
    model, out = make_small_model(), tmp_path / "tuned"
    seen: list[Trial] = []
    stopped = tuning.bench_bundle

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if len(seen) == 3:
            raise KeyboardInterrupt
        return stopped(*arguments, **more)

    monkeypatch.setattr(tuning, "bench_bundle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_model(model, out, base, options, on_trial=seen.append)
    assert not out.exists()
    monkeypatch.setattr(tuning, "bench_bundle", stopped)
    again: list[Trial] = []
    result = tune_model(model, out, base, options, on_trial=again.append)
    assert again[:3] == seen
    assert [trial.changes["policy"] for trial in result.trials] == ["none", *["fora:2"] * 4]
    manifest = open_bundle(out).manifest
    chosen = result.chosen.changes
    assert {name: manifest.settings[name] for name in chosen} == chosen
    assert result == Tuning.model_validate_json(result.model_dump_json())
    assert not out.with_name(".tuned.tune").exists()
