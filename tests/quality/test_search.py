"""The search of tune: which candidates are measured in which order, what is chosen, and when it says no."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import SmallPoolError
from ditc.errors import CheckError, InputError
from ditc.passes import NoSumsError, NothingQuantizedError
from ditc.quality.options import TuneOptions
from ditc.quality.search import Search, Trial, pareto_front
from tests.other_settings import another

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


@pytest.mark.parametrize("name", [name for name in CompileOptions.model_fields if name != "watch_images"])
def test_every_candidate_agrees_with_every_setting_of_the_base(name: str) -> None:
    base = BASE.model_copy(update=another(BASE, name) or {})

    def judge(stage: str, changes: dict[str, str]) -> Trial:
        base.model_copy(update=changes)
        return trial(changes, 1 / interval_of(changes), 40, stage)

    Search(base, OPTIONS, judge, lambda _: 0).explore()


@pytest.mark.parametrize("settings", [{"correct": "dec-quant"}, {"precision": "w8a6"}])
def test_a_quantizer_that_the_base_does_not_take_is_left_out_and_the_reason_given(settings: dict[str, str]) -> None:
    search = searched(lambda _: 40, base=BASE.model_copy(update=settings))
    assert {t.changes["scales"] for t in search.measured} == {"static"}
    assert [note for note in search.notes if "a quantizer is not tried: --" in note and "per-step" in note]


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
