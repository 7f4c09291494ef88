"""Tuning: what is searched in which order, what is chosen, and when it says no."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditc.bundle import open_bundle
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import SmallPoolError
from ditc.engines import onnxrt
from ditc.engines.integer_form import Exactness
from ditc.errors import CheckError, InputError
from ditc.passes import NoSumsError, NothingQuantizedError
from ditc.progress import Progress
from ditc.quality import tuning
from ditc.quality.options import TuneOptions
from ditc.quality.search import Search, Trial, pareto_front
from ditc.quality.tuning import Tuning, tune_model

OPTIONS = TuneOptions(least_psnr_db=30.0, intervals=(2, 3, 4, 5, 6))
BASE = CompileOptions()


def trial(changes: dict[str, str], seconds: float, psnr: float, stage: str = "schedule") -> Trial:
    return Trial(
        stage=stage,
        changes=changes,
        seconds=seconds,
        psnr_db=psnr,
        psnr_low=psnr,
        worse_by=None,
        worse_high=None,
        size_bytes=1,
        within=psnr >= 30,
    )


def interval_of(changes: dict[str, str]) -> int:
    return 1 if changes["policy"] == "none" else int(changes["policy"].split(":")[1])


def played(psnr_of: Callable[[dict[str, str]], float]) -> Callable[[str, dict[str, str]], Trial]:
    """A judge whose candidates take 1 / N seconds, and 4 more steps' time in a window."""

    def judge(stage: str, changes: dict[str, str]) -> Trial:
        seconds = 1 / interval_of(changes) + 0.01 * changes["policy"].count(":")
        return trial(changes, seconds, psnr_of(changes), stage)

    return judge


def searched(
    psnr_of: Callable[[dict[str, str]], float],
    base: CompileOptions = BASE,
    vetoed: float = 0.2,
    options: TuneOptions = OPTIONS,
) -> Search:
    search = Search(base, options, played(psnr_of), lambda _: vetoed)
    search.explore()
    return search


def falling(changes: dict[str, str]) -> float:
    """Quality falls with the interval, rises with smoothing, with `lsq`, and in a window."""
    better = (changes.get("smooth") == "smooth") + (changes["vc"] == "lsq") + 2 * changes["policy"].startswith("window")
    return 34 - 1.5 * interval_of(changes) + better


def test_each_stage_starts_from_the_best_of_the_one_before() -> None:
    search = searched(falling)
    quantizers = [t for t in search.measured if t.stage == "quantizer"]
    assert len(quantizers) == 8
    assert all(t.changes["policy"] == "none" and t.changes["vc"] == "none" for t in quantizers)
    assert all(t.changes["smooth"] == "smooth" for t in search.measured if t.stage != "quantizer")


def test_the_fastest_within_the_budget_is_chosen() -> None:
    search = searched(falling)
    chosen = search.choose()
    assert chosen.changes["policy"].startswith("window:5")  # 34 - 7.5 + 4 = 30.5, where fora:5 has 28.5
    assert chosen.changes["vc"] == "lsq"
    assert all(t.seconds >= chosen.seconds for t in search.measured if t.within)


def test_longer_intervals_are_given_up_after_two_beyond_the_budget() -> None:
    search = searched(lambda changes: 34 - 2 * interval_of(changes))
    tried = {interval_of(t.changes) for t in search.measured if t.stage == "schedule"}
    assert tried == {2, 3, 4}  # 30 is within, 28 and 26 are not
    assert "none beyond 4" in search.notes[0]


def test_windows_are_tried_at_the_shortest_interval_beyond_the_budget_only() -> None:
    search = searched(lambda changes: 34 - 2 * interval_of(changes))
    windows = [t.changes["policy"] for t in search.measured if t.stage == "window"]
    assert set(windows) == {"window:3:2:2", "window:3:4:4", "window:3:8:8"}
    assert not [t for t in searched(lambda _: 40).measured if t.stage == "window"]


def test_a_budget_of_distance_asks_for_features_before_images_are_made() -> None:
    needing = TuneOptions(worse_by=0.1)
    assert [options.evaluation.needs_features for options in (needing, OPTIONS)] == [True, False]


def test_a_correction_that_a_schedule_refuses_is_left_out_and_the_reason_given() -> None:
    def judge(stage: str, changes: dict[str, str]) -> Trial:
        if changes.get("reuse") == "taylor":
            raise NoSumsError("not here")
        return trial(changes, 1 / interval_of(changes), 40, stage)

    search = Search(CompileOptions(precision="fp32"), OPTIONS, judge, lambda _: 0)
    search.explore()
    at_two = [t.changes["vc"] for t in search.measured if t.changes["policy"] == "fora:2"]
    assert at_two == ["none", "std", "lsq"]
    assert [note for note in search.notes if "--reuse taylor is not tried" in note] == search.notes[:1]


def test_a_short_trajectory_gets_no_window_and_no_interval_beyond_it() -> None:
    search = searched(lambda _: 0, CompileOptions(steps=4))
    assert {t.changes["policy"] for t in search.measured} == {"none", "fora:2", "fora:3"}
    assert not [note for note in search.notes if "none beyond" not in note]


def test_without_integers_there_is_no_quantizer_to_choose() -> None:
    search = searched(lambda _: 40, CompileOptions(precision="fp32"))
    assert len([t for t in search.measured if t.stage == "quantizer"]) == 1


def test_where_noise_exceeds_what_changes_no_cache_is_tried_and_the_reason_given() -> None:
    search = searched(falling, vetoed=0.6)
    assert {t.changes["policy"] for t in search.measured} == {"none"}
    assert "in 60% of branches and steps" in search.notes[0]
    assert search.choose().changes["policy"] == "none"


def short_of(missing: float) -> Callable[[dict[str, str]], float]:
    """INT8 misses the budget by `missing` dB, whatever the cache; a step in floating point at both ends gives one."""

    def psnr_of(changes: dict[str, str]) -> float:
        steps = int(changes.get("float_steps", "0:0").split(":")[0])
        return 30 - missing + steps - 0.1 * interval_of(changes)

    return psnr_of


def test_where_int8_misses_the_budget_as_few_steps_as_it_takes_stay_in_floating_point() -> None:
    search = searched(short_of(2.5))
    tried = [t.changes["float_steps"] for t in search.measured if t.stage == "precision"]
    assert tried == ["2:2", "4:4"]
    assert all(t.changes["float_steps"] == "4:4" for t in search.measured if t.stage in ("schedule", "window"))


@pytest.mark.parametrize(("missing", "tried"), [(-1.0, []), (9.0, ["2:2", "4:4", "8:8"])])
def test_floating_point_is_kept_only_where_it_is_needed_and_enough(missing: float, tried: list[str]) -> None:
    search = searched(short_of(missing))
    assert [t.changes["float_steps"] for t in search.measured if t.stage == "precision"] == tried
    assert not [t for t in search.measured if t.stage == "schedule" and "float_steps" in t.changes]


@pytest.mark.parametrize("error", [NothingQuantizedError, SmallPoolError])
def test_an_interval_that_can_not_be_calibrated_is_left_out_and_the_reason_given(error: type[InputError]) -> None:
    def judge(stage: str, changes: dict[str, str]) -> Trial:
        if changes["policy"] == "fora:3":
            raise error("too little here")
        return trial(changes, 1 / interval_of(changes), 40, stage)

    search = Search(BASE, OPTIONS, judge, lambda _: 0)
    search.explore()
    assert {t.changes["policy"] for t in search.measured} == {"none", "fora:2", "fora:4", "fora:5", "fora:6"}
    assert search.notes == ["--policy fora:3 is not tried: too little here"]


def with_seven_bits(seconds: float, psnr: float, seven_bits: bool = True) -> Search:
    """A search in which 7-bit weights take so much of the time of 8-bit ones, and have so much PSNR everywhere."""

    def judge(stage: str, changes: dict[str, str]) -> Trial:
        seven = changes.get("precision") == "w7a8"
        return trial(changes, (seconds if seven else 1) / interval_of(changes), psnr if seven else 40, stage)

    search = Search(BASE, OPTIONS, judge, lambda _: 0, seven_bits)
    search.explore()
    return search


def test_seven_bits_of_weights_are_tried_where_eight_run_in_a_slower_form_and_kept_where_they_pay() -> None:
    search = with_seven_bits(0.8, 39)
    assert [t.changes["precision"] for t in search.measured if t.stage == "weights"] == ["w7a8"]
    schedules = [t for t in search.measured if t.stage == "schedule"]
    assert schedules
    assert all(t.changes["precision"] == "w7a8" for t in schedules)
    assert search.choose().changes["precision"] == "w7a8"


@pytest.mark.parametrize(("seconds", "psnr"), [(1.1, 39), (0.8, 29)])
def test_seven_bits_that_are_slower_or_beyond_the_budget_are_not_kept(seconds: float, psnr: float) -> None:
    search = with_seven_bits(seconds, psnr)
    assert not [t for t in search.measured if t.stage == "schedule" and "precision" in t.changes]
    assert [note for note in search.notes if "7-bit weights" in note]


def test_elsewhere_seven_bits_are_not_tried() -> None:
    assert not [t for t in with_seven_bits(0.8, 39, seven_bits=False).measured if "precision" in t.changes]


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


def test_without_integers_there_is_no_noise_to_look_at() -> None:
    assert searched(falling, CompileOptions(precision="fp32"), vetoed=1.0).vetoed is None


def test_a_cache_that_hardly_pays_is_left_out_and_the_reason_given() -> None:
    measured = [trial({"policy": "none"}, 1.0, 40), trial({"policy": "fora:2"}, 0.95, 35)]
    search = Search(BASE, OPTIONS, played(falling), lambda _: 0, measured=measured)
    assert search.choose().changes == {"policy": "none"}
    assert "1.05 times as fast as no cache" in search.notes[-1]


def test_nothing_within_the_budget_names_the_nearest() -> None:
    search = searched(lambda changes: 20 + interval_of(changes))
    with pytest.raises(CheckError, match=r"no candidate is within the budget; the nearest is .*fora:3.*23\.0 dB"):
        search.choose()


def test_a_time_that_cannot_be_met_names_the_fastest() -> None:
    search = searched(falling, options=OPTIONS.model_copy(update={"seconds": 0.01}))
    with pytest.raises(CheckError, match=r"takes at most 0\.01 s per image; the fastest is .*window:5"):
        search.choose()


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    a, b, c, d = (trial({"policy": n}, s, q) for n, s, q in (("a", 1, 30), ("b", 2, 29), ("c", 3, 35), ("d", 1, 20)))
    assert pareto_front([d, c, b, a]) == [a, c]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least_psnr_db": None}, "--worse-by DISTANCE or --least-psnr DB"),
        ({"worse_by": 0.1, "seconds": 0.0}, "--seconds must be above 0"),
        ({"worse_by": float("nan")}, "--worse-by must be a number, found nan"),
        ({"least_psnr_db": float("inf")}, "--least-psnr must be a number, found inf"),
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
        on_trial(trial({"policy": "none"}, 1.0, 40))
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
