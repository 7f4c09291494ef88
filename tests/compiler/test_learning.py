"""A reuse that learns its numbers: from Gram matrices, on noise of its own, in the open and in the closed loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.approximators import APPROXIMATORS, canonical
from ditc.bundle import read_tables
from ditc.cli.main import run
from ditc.compiler import driver, learning, ridge
from ditc.compiler.driver import compile_model
from ditc.compiler.exporting import export
from ditc.compiler.learning import LEARNED_ON, close_loop, learn, learned_plan, rollout_error, watch_sums
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan
from ditc.compiler.ridge import squared_error
from ditc.compiler.trajectories import FIT_NOISE, POOL_NOISE, VERIFY_NOISE, WATCH_NOISE, exact_trajectory
from ditc.compiler.watching import STATISTICS
from ditc.errors import InputError
from ditc.exporter.dit import DiT
from ditc.program import REUSE_ROWS, Step
from ditc.runtime.approximation import first_rows, makers_of
from ditc.step_statistics import StepStatistics, SumStatistics

SETTINGS: dict[str, Any] = {"policy": "fora:2", "precision": "fp32", "vc": "none", "steps": 8, "vc_images": 6}


@pytest.fixture(scope="module")
def small_plan(make_small_model: Callable[[], DiT], quick_options: CompileOptions) -> Callable[..., Plan]:
    def planned(**changes: Any) -> Plan:
        settings = {**SETTINGS, "reuse": "learned", "watch_images": 4, **changes}
        return replace(make_plan(make_small_model(), quick_options.model_copy(update=settings)), threads=1)

    return planned


def combining(plan: Plan) -> list[Step]:
    return [step for step in plan.program.steps if step.segment == "extrapolate"]


def rows_in(folder: Path) -> np.ndarray:
    return read_tables(folder / "approximate.safetensors")[REUSE_ROWS]


def along(plan: Plan, degree: int, seed: int) -> StepStatistics:
    """Statistics of sums that lie on polynomials in t, whatever the gates."""
    steps, window = plan.program.steps, learning.sums_to_watch(plan).sums
    channels = plan.spec.branch_shape[-1]
    coefficients = np.random.default_rng(seed).standard_normal((degree + 1, 50, channels))
    places = np.array([step.t for step in steps]) / 500 - 1
    sums = np.tensordot(np.vander(places, degree + 1), coefficients, 1)  # (steps, samples, channels)
    gram = np.full((len(steps), window + 1, window + 1, channels), np.nan)
    for t in range(len(steps)):
        own = sums[[t - k for k in range(min(t, window) + 1)]]
        gram[t, : len(own), : len(own)] = np.einsum("inc,jnc->ijc", own, own) / own.shape[1]
    shape = (len(steps), 0, len(plan.spec.branches))
    exists = np.where(np.isnan(gram[:, :, 0, 0]), np.nan, 0.0)
    moments = SumStatistics(exists[..., None] + np.zeros(channels), gram, exists)
    return StepStatistics(plan.spec.branches, 4, np.zeros(shape), np.zeros(shape), moments)


def learned_from(plan: Plan, folder: Path, *statistics: StepStatistics) -> np.ndarray:
    """The table that is learned from two statistics: what is fitted, and what is held out."""
    places = [folder / str(place) for place in range(2)]
    for place, own in zip(places, statistics, strict=True):
        place.mkdir(parents=True)
        own.save(place / STATISTICS)
    learn(plan, places, folder)
    return rows_in(folder)


def test_an_infinite_ridge_is_taylor_bit_for_bit(
    small_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge, "STRENGTHS", (inf,))
    plan, taylor = small_plan(), small_plan(reuse="taylor", watch_images=None)
    rows = learned_from(plan, tmp_path, along(plan, 2, 0), along(plan, 2, 1))
    expected = first_rows(taylor.program, rows.shape[-1])
    assert expected is not None
    assert rows[:, :2].tobytes() == expected.tobytes()
    assert not rows[:, 2].any()
    assert json.loads((tmp_path / "approximation.json").read_text())["ridge"] == {"inf": 3}


def test_on_parabolas_the_weights_of_order_two_are_recovered(small_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan, order2 = small_plan(), APPROXIMATORS["taylor:2"].weights
    assert order2 is not None
    rows, t = learned_from(plan, tmp_path, along(plan, 2, 0), along(plan, 2, 1)), [s.t for s in plan.program.steps]
    whole = [step for step in combining(plan) if len(step.reads) == 3]
    assert len(whole) == 2
    for step in whole:
        exact = np.array(order2(step.t, [t[maker] for maker in makers_of(step)]))
        np.testing.assert_allclose(rows[step.index], np.repeat(exact[:, None], rows.shape[-1], axis=1), atol=1e-3)


def test_the_first_of_two_statistics_is_fitted_and_the_second_held_out(
    small_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    """Lines are what taylor forecasts exactly: held out, they leave nothing of a fit to what bends."""
    plan = small_plan()
    bent, line = along(plan, 3, 0), along(plan, 1, 1)
    learned_from(plan, tmp_path / "a", bent, line)
    learned_from(plan, tmp_path / "b", bent, bent)
    strengths = [json.loads((tmp_path / name / "approximation.json").read_text())["ridge"] for name in ("a", "b")]
    assert strengths[0] == {"inf": 3}
    assert "inf" not in strengths[1]


def test_what_is_learned_on_has_noise_of_its_own() -> None:
    purposes = [*LEARNED_ON.values(), POOL_NOISE, FIT_NOISE, VERIFY_NOISE, WATCH_NOISE]
    assert len(set(purposes)) == len(purposes)


def test_a_compile_fits_to_one_noise_and_chooses_on_the_other(
    make_small_model: Callable[[], DiT], quick_options: CompileOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are watched with noise of their own, and stay for another compile in `exports`."""
    seen: list[list[Path]] = []
    watches: list[int] = []
    monkeypatch.setattr(driver, "watch_sums", lambda *given: (watches.append(given[2]), watch_sums(*given)))
    monkeypatch.setattr(driver, "learn", lambda plan, given, to: (seen.append(given), learn(plan, given, to)))
    options = quick_options.model_copy(update={**SETTINGS, "reuse": "learned", "watch_images": 4})
    bundle = compile_model(make_small_model(), tmp_path / "b", options, exports=tmp_path / "exports")
    assert watches == [*LEARNED_ON.values()]
    [folders] = seen
    assert [folder.name.split("-")[0] for folder in folders] == [*LEARNED_ON] == ["sums", "held"]
    assert bundle.manifest.settings["watch_images"] == 4
    compile_model(make_small_model(), tmp_path / "c", options, exports=tmp_path / "exports")
    assert len(watches) == 2
    other = options.model_copy(update={"watch_images": 3})
    compile_model(make_small_model(), tmp_path / "d", other, exports=tmp_path / "exports")
    assert len(watches) == 4


@pytest.fixture(scope="module")
def opened_loop(
    small_plan: Callable[..., Plan], make_small_model: Callable[[], DiT], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Segments]:
    """The small model's segments, and its plan with what the open loop has learned on FP images."""
    plan, folder = small_plan(reuse="learned:closed"), tmp_path_factory.mktemp("learning")
    for name in ("export", "learn", *LEARNED_ON):
        (folder / name).mkdir()
    export(plan, make_small_model(), folder / "export")
    for name, purpose in LEARNED_ON.items():
        watch_sums(plan, make_small_model(), purpose, folder / name)
    learn(plan, [folder / name for name in LEARNED_ON], folder / "learn")
    segments = {call: folder / "export" / f"{call}.onnx" for call in plan.cached_program.calls}
    return learned_plan(plan, folder / "learn"), segments


def calibration_error(opened_loop: tuple[Plan, Segments], rows: np.ndarray) -> float:
    """The error of trajectories under some numbers, on the noise that the closed loop is fitted to and chosen on."""
    plan, segments = opened_loop
    exact = {p: exact_trajectory(plan, segments, plan.options.vc_images, p, "test") for p in LEARNED_ON.values()}
    return rollout_error(plan, segments, {REUSE_ROWS: rows}, exact)


def test_on_held_out_trajectories_a_learned_step_errs_less_than_taylor(opened_loop: tuple[Plan, Segments]) -> None:
    plan, segments = opened_loop
    held_out = StepStatistics.load(segments["full"].parents[1] / "held" / STATISTICS).sums
    before = first_rows(plan.program, plan.spec.branch_shape[-1])
    assert held_out is not None
    assert before is not None
    for step in combining(plan):
        gram, count = learning.gram_of(held_out, step), len(step.reads)
        learned, taylor = (rows[step.index, :count] for rows in (plan.reuse_tables[REUSE_ROWS], before))
        assert squared_error(gram, np.float64(learned)) < squared_error(gram, np.float64(taylor))


def test_the_closed_loop_is_no_worse_than_the_open_one_on_its_noise(
    opened_loop: tuple[Plan, Segments], tmp_path: Path
) -> None:
    plan, segments = opened_loop
    close_loop(plan, segments, segments, {}, tmp_path)
    report = json.loads((tmp_path / "approximation.json").read_text())
    own, open_loop = (
        calibration_error(opened_loop, rows) for rows in (rows_in(tmp_path), plan.reuse_tables[REUSE_ROWS])
    )
    assert own <= open_loop
    assert report["rollout"]["open"] == pytest.approx(open_loop)
    assert own == pytest.approx(min(report["rollout"].values()))
    assert sum(report["ridge"].values()) == len(combining(plan))
    assert report["images"] == plan.options.vc_images


def test_of_the_two_loops_the_better_stays(
    opened_loop: tuple[Plan, Segments], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against an open loop that has learned nothing the closed one stays, and one that is spoilt does not."""
    plan, segments = opened_loop
    poor = np.zeros_like(plan.reuse_tables[REUSE_ROWS])
    poor[:, 0] = 0.5
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    close_loop(replace(plan, learned_rows=poor), segments, segments, {}, tmp_path / "a")
    assert calibration_error(opened_loop, rows_in(tmp_path / "a")) < calibration_error(opened_loop, poor)
    monkeypatch.setattr(learning, "fill_in", lambda rows, step, *_: rows[step.index].fill(0) or inf)
    close_loop(plan, segments, segments, {}, tmp_path / "b")
    assert np.array_equal(rows_in(tmp_path / "b"), plan.reuse_tables[REUSE_ROWS])


def test_the_closed_loop_sees_what_its_own_forecasts_lead_to(
    opened_loop: tuple[Plan, Segments], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first forecast is spoilt, later steps see other sums; FP's exact ones are the same."""
    plan, segments = opened_loop
    fill_in, first = learning.fill_in, combining(plan)[0].index
    grams: dict[float, list[np.ndarray]] = {}
    for factor in (1.0, 0.5):

        def spoilt(rows: np.ndarray, step: Step, fitted: np.ndarray, held: np.ndarray, factor: float = factor) -> float:
            grams.setdefault(factor, []).append(fitted)
            strength = fill_in(rows, step, fitted, held)
            rows[step.index] *= factor if step.index == first else 1
            return strength

        monkeypatch.setattr(learning, "fill_in", spoilt)
        (tmp_path / str(factor)).mkdir()
        close_loop(plan, segments, segments, {}, tmp_path / str(factor))
    same = [np.allclose(a, b, rtol=1e-6) for a, b in zip(grams[1.0], grams[0.5], strict=True)]
    exact = [np.allclose(a[0, 0], b[0, 0], rtol=1e-6) for a, b in zip(grams[1.0], grams[0.5], strict=True)]
    assert same == [True, *[False] * (len(same) - 1)]
    assert all(exact)


@pytest.mark.parametrize("name", ["learned", "learned:closed"])
def test_a_bundle_runs_what_was_learned_and_says_so(
    compiled_once: Callable[..., Any], make_small_model: Callable[[], DiT], quick_options: CompileOptions, name: str
) -> None:
    changes = {**SETTINGS, "precision": "w8a8", "reuse": name, "watch_images": 4}
    bundle = compiled_once(make_small_model(), quick_options.model_copy(update=changes))
    rows, program = bundle.tables()[REUSE_ROWS], bundle.manifest.program
    learned = [len(np.unique(row, axis=1).T) > 1 for row in rows]
    assert learned == [step.segment == "extrapolate" for step in program.steps]
    report = bundle.manifest.measured("approximation").approximation
    assert report is not None
    assert sum(report.ridge.values()) == 3
    assert set(report.rollout) == ({"open", "closed"} if name == "learned:closed" else set())
    assert report.images == (6 if name == "learned:closed" else 4)
    assert bundle.manifest.program.reuse == name


def test_the_open_loop_has_two_spellings_and_one_name() -> None:
    assert canonical("learned:open") == "learned"
    assert CompileOptions(reuse="learned:open", watch_images=3) == CompileOptions(reuse="learned", watch_images=3)


def test_a_schedule_with_nothing_to_combine_learns_nothing(small_plan: Callable[..., Plan]) -> None:
    assert learning.learns(small_plan())
    assert not learning.learns(small_plan(policy="fora:4", steps=4))
    assert not learning.learns(small_plan(reuse="taylor", watch_images=None))


def test_images_to_watch_are_for_a_reuse_that_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="--watch-images 3 is for a policy that looks at FP images first"):
        CompileOptions(reuse="taylor", watch_images=3)
    given = ["--reuse", "learned", "--policy", "none"]
    assert run(["compile", "digits", "-o", str(tmp_path / "b"), *given]) == 2
    error = capsys.readouterr().err
    assert "--reuse learned works on sums made ahead: it needs a policy that reuses" in error
    assert error.count("\n") == 1
