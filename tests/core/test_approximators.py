"""Ways to fill a reuse: weights are those of a polynomial, whatever the distances, and a row is all a way needs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc import approximators
from ditc.approximators import APPROXIMATORS, Approximator, canonical
from ditc.compiler.options import CompileOptions
from ditc.passes import program_from_schedule
from ditc.policies import schedule_for
from ditc.program_checks import contradictions
from ditc.schedule import CacheSchedule
from ditc.spec import ModelSpec

EXTRAPOLATING = sorted(name for name, row in APPROXIMATORS.items() if row.weights is not None)
LATER = [(name, APPROXIMATORS[name]) for name in ("taylor:2", "taylor:3", "chebyshev")]
# distances to a step from the one that computed last, and between those before it
DISTANCES = st.lists(st.floats(1, 60), min_size=2, max_size=5)


def times_of(distances: list[float], t: float = 10.0) -> list[float]:
    """Return the timesteps of steps that computed, the latest first."""
    return [t + float(total) for total in np.cumsum(distances)]


def weights_of(name: str, t: float, times: list[float]) -> np.ndarray:
    weights = APPROXIMATORS[name].weights
    assert weights is not None
    return np.array(weights(t, times))


@given(DISTANCES, st.integers(0, 2**32))
def test_a_polynomial_through_the_last_sums_is_forecast_exactly(distances: list[float], seed: int) -> None:
    times = times_of(distances)
    polynomial = np.polynomial.Polynomial(np.random.default_rng(seed).standard_normal(len(times)), domain=[0, 100])
    weights = weights_of("taylor", 10.0, times)
    size = np.abs(weights) @ np.abs(polynomial(np.array(times))) + 1
    assert abs(weights @ polynomial(np.array(times)) - polynomial(10.0)) < 1e-9 * size


@given(DISTANCES)
def test_the_weights_of_a_step_sum_to_one(distances: list[float]) -> None:
    for name in EXTRAPOLATING:
        weights = weights_of(name, 10.0, times_of(distances))
        assert abs(weights.sum() - 1) < 1e-12 * np.abs(weights).sum()


@given(st.floats(0, 500), st.floats(0.5, 200), st.floats(0.5, 200))
def test_the_weights_of_order_one_are_those_of_its_formula_to_the_bit(t: float, gap: float, interval: float) -> None:
    near, before = t + gap, t + gap + interval
    w = (near - t) / (before - near)
    assert weights_of("taylor", t, [near, before]).tolist() == [1 + w, -w]


def test_equal_distances_give_the_binomial_weights() -> None:
    assert weights_of("taylor:3", 0, [1, 2, 3, 4]) == pytest.approx([4, -6, 4, -1])
    assert weights_of("taylor:2", 0, [1, 2, 3]) == pytest.approx([3, -3, 1])


@given(DISTANCES, st.floats(0, 3))
def test_chebyshev_is_the_parabola_nearest_to_the_sums_under_a_ridge(distances: list[float], ridge: float) -> None:
    """Against least squares of the sums and, as rows of their own, of the coefficients beside the constant."""
    times, sums = np.array(times_of(distances)), np.random.default_rng(len(distances)).standard_normal(len(distances))
    degree = min(2, len(times) - 1)
    places = np.interp(times, [10.0, times[-1]], [1.0, -1.0])
    polynomials = np.stack([np.cos(k * np.arccos(places)) for k in range(degree + 1)], axis=1)
    damped = np.sqrt(ridge) * np.eye(degree + 1)[1:]
    rows, wanted = np.concatenate([polynomials, damped]), np.concatenate([sums, np.zeros(degree)])
    coefficients = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(approximators, "RIDGE", ridge)
        weights = weights_of("chebyshev", 10.0, times.tolist())
    assert weights @ sums == pytest.approx(coefficients.sum(), rel=1e-5, abs=1e-5)


def test_chebyshev_forecasts_parabolas_without_its_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.array([12.0, 17, 19, 30])
    parabola = np.polynomial.Polynomial([2, -1, 0.25])
    assert abs(weights_of("chebyshev", 10, [*times]) @ parabola(times) - parabola(10)) > 0.1
    monkeypatch.setattr(approximators, "RIDGE", 0.0)
    assert weights_of("chebyshev", 10, [*times]) @ parabola(times) == pytest.approx(parabola(10))


@given(DISTANCES, st.floats(0.01, 100))
def test_chebyshev_weights_don_t_depend_on_the_unit_of_time(distances: list[float], unit: float) -> None:
    times = times_of(distances)
    scaled = weights_of("chebyshev", 10 * unit, [unit * time for time in times])
    assert scaled == pytest.approx(weights_of("chebyshev", 10.0, times), rel=1e-6, abs=1e-9)


def test_chebyshev_weighs_less_noise_than_the_polynomials_of_taylor() -> None:
    for times in ([1.0, 2, 3, 4], [2.0, 5, 8, 11], [1.0, 6, 11, 16]):
        noise = {name: float(np.square(weights_of(name, 0, times[: row.looks_back])).sum()) for name, row in LATER}
        assert noise["chebyshev"] < noise["taylor:2"] < noise["taylor:3"]


def test_chebyshev_of_one_sum_holds_it() -> None:
    assert weights_of("chebyshev", 10.0, [20.0]).tolist() == [1.0]
    assert weights_of("chebyshev", 10.0, [10.0]).tolist() == [1.0]  # of a sampler that visits a timestep twice


def test_an_order_looks_back_at_one_sum_more() -> None:
    rows = [APPROXIMATORS[name] for name in ("taylor", "taylor:2", "taylor:3")]
    assert [(row.looks_back, row.rows) for row in rows] == [(2, 2), (3, 3), (4, 4)]


def test_the_first_order_has_two_spellings_and_one_name(tmp_path: Path) -> None:
    assert CompileOptions(reuse="taylor:1") == CompileOptions(reuse="taylor")
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"compute": [[True], [False]], "reuse": "taylor:1"}))
    spec = ModelSpec.model_validate(
        {"name": "tiny", "family": "dit", "in_channels": 1, "height": 8, "width": 8, "num_classes": 10}
        | {"cfg_channels": 1, "branches": ("0.attn",), "branch_shape": (16, 8), "parameters": 0}
    )
    assert schedule_for(str(file), spec, 2).reuse == "taylor"
    assert [canonical(name) for name in ("taylor:2", "hold", "x", 3, [])] == ["taylor:2", "hold", "x", 3, []]


def test_the_loop_that_affine_is_fitted_in_may_be_said() -> None:
    assert CompileOptions(reuse="affine:closed") == CompileOptions(reuse="affine")
    assert [name for name, row in APPROXIMATORS.items() if row.open_loop] == ["affine:open"]


def test_a_new_row_is_all_that_a_program_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sums and a shift, which no row of the table has."""
    monkeypatch.setitem(
        APPROXIMATORS, "affine", Approximator(looks_back=5, shift=True, fit=lambda means, spreads: [*means])
    )
    rows = tuple((step % 2 == 0,) * 3 for step in range(14))
    schedule = CacheSchedule(compute=rows, reuse="affine")
    program = program_from_schedule(schedule, [float(14 - step) for step in range(14)], ["a", "b", "c"], caches="sums")
    extrapolate = program.segment("extrapolate")
    assert extrapolate.reads == ("ahead", "before", "before.2", "before.3", "before.4")
    assert extrapolate.rows == 6
    assert not list(contradictions(program))
