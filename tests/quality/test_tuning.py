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
from ditc.quality import candidates, search, tuning
from ditc.quality.options import TuneOptions
from ditc.quality.search import Trial
from ditc.quality.tuning import Tuning, tune_model

BY_DISTANCE = {"least_psnr_db": None, "worse_by": 0.1}
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
        ({"less_recall": 0.1}, "give --worse-by DISTANCE too"),
        ({"samplers": ("unipc",)}, "--samplers would do nothing beside --least-psnr"),
        ({"spacings": "leading", "step_counts": (10,)}, "--spacings and --step-counts would do nothing"),
        ({**BY_DISTANCE, "samplers": "unipc,dpm"}, "unknown --samplers 'dpm'; choose one of: ddim, "),
        ({**BY_DISTANCE, "spacings": ("log",)}, "unknown --spacings 'log'; choose one of: leading"),
        (
            {**BY_DISTANCE, "step_counts": (20, 0)},
            r"--step-counts must be different numbers from 2 on, found \(20, 0\)",
        ),
        ({**BY_DISTANCE, "step_counts": ()}, "--step-counts must be different numbers from 2 on"),
        ({**BY_DISTANCE, "step_counts": (10, 10)}, "--step-counts must be different numbers from 2 on"),
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
        ("digits --samplers unipc", "--samplers would do nothing beside --least-psnr"),
    ],
)
def test_what_is_refused_leaves_nothing(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", *arguments.split(), "-o", str(tmp_path / "b"), "--least-psnr", "30"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


FLOW = """
import torch
from ditc.exporter.dit import DiT, DiTConfig
from ditc.spec import DiffusionSpec, SamplerSpec

def make():
    config = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=1, num_heads=4, num_classes=5)
    model = DiT(config, name="flow").eval()
    model.diffusion = DiffusionSpec(prediction="flow", learned_sigma=model.diffusion.learned_sigma)
    model.sampler = SamplerSpec(name="euler")
    return model
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("digits --samplers lcm", "unknown --samplers 'lcm'"),
        ("digits --step-counts 20,0", "--step-counts must be different numbers from 2 on"),
        ("digits --step-counts 20,x", "--step-counts must be whole numbers with commas between, like 0,1,2"),
        ("digits --step-counts 2000", "--step-counts 2000 can't be taken: steps must be 2 to 1000"),
        ("own_flow:make --samplers lms", "--samplers lms can't be tried: "),
        ("own_flow:make --samplers ddim", "--samplers ddim can't be tried: "),
        ("own_flow:make --spacings leading", "--spacings leading can't be tried: "),
    ],
)
def test_a_solver_that_can_not_be_tried_is_refused_before_anything_is_compiled(
    arguments: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_flow.py").write_text(FLOW)
    assert run(["tune", *arguments.split(), "-o", str(tmp_path / "b"), "--worse-by", "0.1"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"own_flow.py", "__pycache__"}


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
    stopped = candidates.bench_bundle

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if len(seen) == 3:
            raise KeyboardInterrupt
        return stopped(*arguments, **more)

    monkeypatch.setattr(candidates, "bench_bundle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_model(model, out, base, options, on_trial=seen.append)
    assert not out.exists()
    monkeypatch.setattr(candidates, "bench_bundle", stopped)
    again: list[Trial] = []
    result = tune_model(model, out, base, options, on_trial=again.append)
    assert again[:3] == seen
    assert [trial.changes["policy"] for trial in result.trials] == ["none", *["fora:2"] * 4]
    manifest = open_bundle(out).manifest
    chosen = result.chosen.changes
    assert {name: manifest.settings[name] for name in chosen} == chosen
    assert result == Tuning.model_validate_json(result.model_dump_json())
    assert not out.with_name(".tuned.tune").exists()


def test_psnr_keeps_sampler_and_steps_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_small_model: Callable[[], Any]
) -> None:
    monkeypatch.setattr(candidates, "trial_of", lambda *_: UNCACHED)
    monkeypatch.setattr(candidates, "compile_model", lambda *_, **__: None)
    options = OPTIONS.model_copy(update={"intervals": (2,), "worse_by": 0.1})
    result = tune_model(make_small_model(), tmp_path / "b", CompileOptions(precision="fp32"), options)
    assert not [trial for trial in result.trials if {"sampler", "spacing", "steps"} & trial.changes.keys()]
    assert "sampler and steps stay as they are: PSNR" in result.notes[0]
    assert (result.anchor, result.rival, result.confirmed) == (None, None, ())


def test_a_search_over_samplers_and_steps_goes_on_where_it_was_and_finds_the_same(
    tmp_path: Path, make_small_model: Callable[[], Any], quick_options: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model with random weights, whose images say nothing: every distance is within the budget."""
    changes = {"precision": "fp32", "batch": 1, "steps": 6, "vc_images": 2, "verify_images": 1}
    base = quick_options.model_copy(update={**changes, "vc": "auto", "reuse": "auto"})
    options = TuneOptions(
        worse_by=1e9, images=8, intervals=(2,), samplers=("unipc",), spacings=(), step_counts=(4, 3), requests=1
    )
    model, out = make_small_model(), tmp_path / "tuned"
    seen: list[Trial] = []
    times = candidates.bench_bundle
    monkeypatch.setattr(search, "CORRECTIONS", search.CORRECTIONS[:1])

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        return times(*arguments, **more)

    monkeypatch.setattr(candidates, "bench_bundle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_model(model, out, base, options, on_trial=seen.append)
    monkeypatch.setattr(candidates, "bench_bundle", times)
    again: list[Trial] = []
    result = tune_model(model, out, base, options, on_trial=again.append)
    assert again[:2] == seen
    assert [trial.changes.get("steps", 6) for trial in again if trial.stage == "solver"] == [6, 4, 3]
    first, last = again[0], again[2]
    assert (first.worse_by, first.recall_by) == (0, 0)  # the anchor itself
    assert last.worse_by != 0  # FP of its own 3 steps it would be
    assert result.anchor is not None
    assert result.anchor.steps == 6
    assert result.fresh_seeds == (1,)
    assert {trial.stage for trial in result.confirmed} == {"confirm"}
    manifest = open_bundle(out).manifest
    assert len(manifest.program.steps) == result.chosen.changes.get("steps", 6)
    assert result == Tuning.model_validate_json(result.model_dump_json())
    assert not out.with_name(".tuned.tune").exists()
