"""Calibration from the pool's own runs: the same scales as by running the segment at the points again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ditc.calib_data.pool import Pool
from ditc.compiler import calibrating, pooling
from ditc.compiler.calibrating import OBSERVED, activation_scales
from ditc.compiler.exporting import export
from ditc.compiler.observing import ObservedPool
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan
from ditc.compiler.point_conditions import PointConditions
from ditc.compiler.pooling import select
from ditc.compiler.work import shared
from ditc.errors import BundleError, InputError
from ditc.files import digest_of
from ditc.quantize.scale_table import ScaleTable

Selected = Callable[..., tuple[Plan, Segments, Path]]


@pytest.fixture
def selected(
    tmp_path: Path, make_small_model: Callable[[], object], quick_options: CompileOptions, exports: Path
) -> Selected:
    """A small model's plan, FP segments and folder of the stage `select`, under changed settings."""

    def make(**changes: object) -> tuple[Plan, Segments, Path]:
        model = make_small_model()
        plan = make_plan(model, quick_options.model_copy(update={"policy": "fora:2", **changes}))
        folder = exports / f"calibrating-{digest_of([part.model_dump() for part in plan.program.segments])}"
        shared(folder, lambda fresh: export(plan, model, fresh))(tmp_path)
        segments = {call: tmp_path / f"{call}.onnx" for call in plan.program.calls}
        (tmp_path / "select").mkdir()
        select(plan, segments, tmp_path / "select")
        return plan, segments, tmp_path / "select"

    return make


def both(plan: Plan, segments: Segments, folder: Path) -> tuple[ScaleTable, ScaleTable]:
    """Scales from what was observed, and from running the segment."""
    observed = activation_scales(plan, segments, folder / "calib.npz")
    (folder / OBSERVED).unlink()
    return observed, activation_scales(plan, segments, folder / "calib.npz")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scales": "per-step"},
        {"midpoint": "bounded"},
        {"ranges": "entropy", "cfg": 1.0},
        {"pool_steps": "uncached", "policy": "fora:3"},
        {"caches": "branches", "ranges": "max"},
    ],
    ids=str,
)
def test_scales_from_the_pool_are_those_of_running_its_points_again(
    selected: Selected, changes: dict[str, object]
) -> None:
    observed, run = both(*selected(**changes))
    assert observed.scales == pytest.approx(run.scales, rel=2e-3)  # a value may fall over the edge of a bin
    assert observed.tensors == run.tensors
    assert observed.midpoints == run.midpoints
    for path, scales in run.steps.items():
        assert observed.steps[path] == pytest.approx(scales, rel=2e-3)


def test_two_processes_probe_a_segment_under_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for process in (1, 2):
        monkeypatch.setattr(calibrating.os, "getpid", lambda process=process: process)
        names |= {calibrating.probe_path(Path("full.onnx"), kind) for kind in ("probe", "observed")}
    assert len(names) == 4


def test_the_segment_is_not_run_at_points_that_were_observed(
    selected: Selected, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, segments, folder = selected()
    monkeypatch.setattr(calibrating, "run_histograms", lambda *_: pytest.fail("the segment was run again"))
    assert activation_scales(plan, segments, folder / "calib.npz").scales


def test_a_pool_whose_histograms_do_not_fit_is_not_observed(
    selected: Selected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "OBSERVED_BYTES", 1)
    plan, segments, folder = selected()
    assert not (folder / OBSERVED).exists()
    assert activation_scales(plan, segments, folder / "calib.npz").scales


@pytest.mark.parametrize("changes", [{"smooth": "smooth"}, {"scales": "dynamic"}, {"pool_steps": "all"}], ids=str)
def test_a_pool_that_could_not_be_used_is_not_observed(selected: Selected, changes: dict[str, object]) -> None:
    _, _, folder = selected(**changes)
    assert not (folder / OBSERVED).exists()


def test_what_was_counted_from_another_bound_is_not_used(
    selected: Selected, quick_options: CompileOptions, make_small_model: Callable[[], object]
) -> None:
    _, segments, folder = selected()
    bounded = make_plan(
        make_small_model(), quick_options.model_copy(update={"policy": "fora:2", "midpoint": "bounded"})
    )
    scales = activation_scales(bounded, segments, folder / "calib.npz")
    (folder / OBSERVED).unlink()
    assert scales == activation_scales(bounded, segments, folder / "calib.npz")


def test_nothing_is_left_beside_the_exported_segments(selected: Selected) -> None:
    _, segments, _ = selected()
    assert not [path for path in segments["full"].parent.iterdir() if "observed" in path.name]


def test_a_damaged_or_foreign_file_of_histograms_is_one_clear_line(selected: Selected) -> None:
    _, _, folder = selected()
    with pytest.raises(BundleError, match="image 1000 at step 0 was not observed"):
        ObservedPool.load(folder / OBSERVED).histograms([(1000, 0)])
    (folder / OBSERVED).write_bytes((folder / OBSERVED).read_bytes()[:100])
    with pytest.raises(BundleError, match="holds no observed pool"):
        ObservedPool.load(folder / OBSERVED)


def test_what_was_observed_survives_the_disk(selected: Selected) -> None:
    _, _, folder = selected(midpoint="bounded")
    pool = ObservedPool.load(folder / OBSERVED)
    pool.save(folder / "again.npz")
    again = ObservedPool.load(folder / "again.npz")
    assert (again.names, again.bounds, list(again.points)) == (pool.names, pool.bounds, list(pool.points))
    points = list(pool.points)[:3]
    for name, histogram in pool.histograms(points).items():
        np.testing.assert_array_equal(again.histograms(points)[name].counts, histogram.counts)


@pytest.mark.parametrize("smooth", ["none", "smooth"])
def test_the_selector_sees_the_largest_magnitude_of_every_layer_at_every_point(
    selected: Selected, smooth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With histograms taken on the way, and without; held to running the segment at some points again."""
    pools: list[Pool] = []
    choose = pooling.select_points
    monkeypatch.setattr(pooling, "select_points", lambda *given: choose(*(pools.append(given[1]), given)[1]))
    plan, segments, folder = selected(select="tap-activations", smooth=smooth)
    assert (folder / OBSERVED).is_file() == (smooth == "none")
    (pool,) = pools
    assert pool.peaks is not None
    probe, condition = calibrating.open_probe(plan, segments), plan.backend.session(segments["condition"])
    assert pool.peaks.shape == (len(pool), len(probe.readers))
    calib = pool.take(np.array([0, 5, len(pool) - 1])).calibration_set()
    for feeds, expected in zip(
        calibrating.calibration_feeds(condition, calib, PointConditions.of_plan(plan), 1),
        pool.peaks[[0, 5, len(pool) - 1]][np.argsort(calib.step, kind="stable")],
        strict=True,
    ):
        activations = probe.run(feeds)
        np.testing.assert_allclose([np.abs(activations[name]).max() for name in probe.readers], expected, rtol=1e-4)


def test_a_selector_that_has_to_see_all_refuses_points_that_compute_in_part(selected: Selected) -> None:
    with pytest.raises(InputError, match=r"--select tap-activations looks at .* leave --pool-steps out"):
        selected(select="tap-activations", pool_steps="all")
