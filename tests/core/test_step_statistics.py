"""Statistics of steps: what they hold, that they come back as they were written, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ditc.errors import BundleError, InputError
from ditc.step_statistics import StepStatistics, SumStatistics, kind_of
from tests.core.test_schedule import BRANCHES, SPEC

STEPS, WINDOW, CHANNELS = 5, 2, 3


def statistics(sums: SumStatistics | None = None) -> StepStatistics:
    """Made up: the relative change of branch b at step t over k steps is t + k / 10 + b / 100."""
    t, k, b = np.ogrid[:STEPS, 1 : WINDOW + 1, : len(BRANCHES)]
    relative = np.where(k <= t, t + k / 10 + b / 100, np.nan)
    return StepStatistics(BRANCHES, 3, absolute=2 * relative, relative=relative, sums=sums)


def some_sums() -> SumStatistics:
    rng = np.random.default_rng(0)
    width = WINDOW + 1
    shapes = (STEPS, width, CHANNELS), (STEPS, width, width, CHANNELS), (STEPS, width)
    return SumStatistics(*(rng.standard_normal(shape) for shape in shapes))


def test_branches_of_one_kind_have_the_last_part_of_their_names_in_common() -> None:
    assert [kind_of(name) for name in ("blocks.0.attn", "a.b.mlp", "alone")] == ["attn", "mlp", "alone"]


def test_the_change_of_a_kind_is_the_mean_of_its_branches() -> None:
    changes = statistics().relative_by_kind()
    assert list(changes) == ["attn", "mlp"]
    assert changes["attn"][3] == pytest.approx([3.11, 3.21])  # branches 0 and 2
    assert changes["mlp"][3] == pytest.approx([3.12, 3.22])
    assert np.isnan(changes["attn"][1, 1])


@pytest.mark.parametrize("sums", [None, some_sums()])
def test_what_is_written_comes_back(sums: SumStatistics | None, tmp_path: Path) -> None:
    before = statistics(sums)
    before.save(tmp_path / "s.npz")
    after = StepStatistics.load(tmp_path / "s.npz")
    assert (after.branches, after.images) == (BRANCHES, 3)
    np.testing.assert_array_equal(after.absolute, before.absolute)
    np.testing.assert_array_equal(after.relative, before.relative)
    assert (after.sums is None) == (sums is None)
    for name, array in ({} if sums is None else vars(sums)).items():
        np.testing.assert_array_equal(getattr(after.sums, name), array)


@pytest.mark.parametrize("content", [b"", b"PK", b"nothing of the kind"])
def test_another_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(BundleError, match="has no statistics of steps") as refused:
        StepStatistics.load(tmp_path / "s.npz")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("place", [(1, 0, 3), (2, 1, 0), (4, 1, 2)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_diverges_is_refused(value: float, place: tuple[int, int, int]) -> None:
    relative = statistics().relative.copy()
    relative[place] = value
    with pytest.raises(InputError, match="the model diverges"):
        StepStatistics(BRANCHES, 3, absolute=relative, relative=relative)


def test_statistics_of_another_trajectory_are_refused() -> None:
    statistics().check_fits(SPEC, STEPS)
    for spec, steps in ((SPEC, 6), (SPEC.model_copy(update={"branches": BRANCHES[:3]}), STEPS)):
        with pytest.raises(InputError, match="these statistics are of 5 steps and 4 branches, and tiny takes"):
            statistics().check_fits(spec, steps)


def test_sizes_are_what_absolute_changes_are_shares_of() -> None:
    """The made up change is as large as the output, at every step by another factor."""
    relative = statistics().relative
    factor = np.arange(1.0, STEPS + 1)[:, None, None]
    sizes = StepStatistics(BRANCHES, 3, absolute=factor * relative, relative=relative).sizes()
    np.testing.assert_allclose(sizes, np.broadcast_to([[2], [2], [3], [4], [5]], (STEPS, len(BRANCHES))))
    still = np.where(np.isnan(relative), np.nan, 0.0)
    assert not StepStatistics(BRANCHES, 3, absolute=still, relative=still).sizes().any()
