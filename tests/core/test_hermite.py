"""HiCache's forecast: its published recurrence where distances are equal, and what it forecasts exactly."""

from __future__ import annotations

from math import factorial, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc import hermite
from ditc.approximators import APPROXIMATORS
from ditc.hermite import hermite_weights
from ditc.passes import program_from_schedule
from ditc.runtime.approximation import first_rows
from ditc.schedule import CacheSchedule

# steps that computed, the latest first, and one ahead of them
STEPS = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(lambda gaps: np.cumsum([-1, *(-gap for gap in gaps)]))
AHEAD = st.integers(0, 9)
LINE_SIGMA = sqrt(0.5)  # at which the first polynomial is k itself


def forecast(step: int, steps: list[int], values: np.ndarray) -> float:
    return float(np.array(hermite_weights(step, steps)) @ values)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 9), st.floats(0.1, 1))
def test_at_equal_distances_it_is_hicaches_series(interval: int, order: int, k: int, sigma: float) -> None:
    """As published: each difference over the interval, over i!, times sigma^i H_i(sigma k)."""
    values = np.random.default_rng(order).standard_normal(order + 1)  # the latest first
    differences, expected = values, values[0]
    for i in range(1, order + 1):
        differences = (differences[:-1] - differences[1:]) / interval
        physicists = np.polynomial.hermite.hermval(sigma * k, [0] * i + [1])
        expected += differences[0] / factorial(i) * sigma**i * physicists
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hermite, "SIGMA", sigma)
        steps = [-interval * place for place in range(order + 1)]
        assert forecast(k, steps, values) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(AHEAD, STEPS, st.floats(0.1, 1))
def test_constants_are_forecast_exactly_whatever_the_contraction(ahead: int, steps: np.ndarray, sigma: float) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hermite, "SIGMA", sigma)
        own = hermite_weights(ahead, steps.tolist())
    assert abs(sum(own) - 1) < 1e-12 * sum(map(abs, own))


@given(AHEAD, STEPS, st.floats(0.1, 1))
def test_a_line_is_forecast_the_same_part_of_the_way_whatever_the_order(
    ahead: int, steps: np.ndarray, sigma: float
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hermite, "SIGMA", sigma)
        went = forecast(ahead, steps.tolist(), 3.0 * steps - 5) - (3.0 * steps[0] - 5)
    assert went == pytest.approx(2 * sigma**2 * 3.0 * (ahead - steps[0]), rel=1e-6, abs=1e-6)


@given(AHEAD, STEPS)
def test_lines_are_forecast_exactly_where_nothing_is_contracted(ahead: int, steps: np.ndarray) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hermite, "SIGMA", LINE_SIGMA)
        assert forecast(ahead, steps.tolist(), 2.0 * steps + 7) == pytest.approx(2.0 * ahead + 7, rel=1e-6, abs=1e-6)
        if len(steps) == 2:
            taylor = APPROXIMATORS["taylor"].weights
            assert taylor is not None
            assert hermite_weights(ahead, steps.tolist()) == pytest.approx(taylor(ahead, steps.tolist()))


def test_a_parabola_is_not_forecast_exactly_but_as_its_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of s^2 at steps 0, -2 and -5: S[0,1] is -2 and S[0,1,2] is 1; the distances are unequal."""
    values = np.array([0.0, 4, 25])
    assert forecast(3, [0, -2, -5], values) == pytest.approx(-2 * 0.5 * 3 + (0.25 * 9 - 0.5))
    monkeypatch.setattr(hermite, "SIGMA", LINE_SIGMA)
    assert forecast(3, [0, -2, -5], values) == pytest.approx(-2 * 3 + (9 - 1))


def test_one_sum_is_held() -> None:
    assert hermite_weights(4, [3]) == [1.0]


def test_steps_are_counted_whatever_their_timesteps() -> None:
    """Where the timesteps of a schedule bend, taylor's numbers follow, and these do not."""
    rows = tuple((step % 2 == 0,) * 2 for step in range(8))
    even, bent = [float(8 - step) for step in range(8)], [float((8 - step) ** 2) for step in range(8)]
    tables = {}
    for reuse in ("hermite", "taylor"):
        schedule = CacheSchedule(compute=rows, reuse=reuse)
        programs = [program_from_schedule(schedule, t, ["a", "b"], caches="sums") for t in (even, bent)]
        tables[reuse] = [first_rows(program, 1) for program in programs]
    assert np.array_equal(*tables["hermite"])
    assert not np.array_equal(*tables["taylor"])
    assert tables["hermite"][0][3, :2, 0].tolist() == [1.25, -0.25]  # 1 step ahead, 2 apart: 0.5 * 1 / 2
