"""The outputs of a reuse, on compiled bundles: held where its numbers say so, else what its formula says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ditc
from ditc.approximators import APPROXIMATORS, Approximator
from ditc.bundle import TABLES, Bundle, open_bundle, seal_bundle, write_tables
from ditc.cli.listing import bundle_facts
from ditc.cli.main import run
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.compiler.trajectories import REUSE_NOISE
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.recording import RecordingBackend
from ditc.errors import BundleError
from ditc.exporter.onnx_files import load_graph
from ditc.program import CONDITION, REUSE_ROWS, Step, distance_of
from ditc.quality.branch_probe import open_branch_probe
from ditc.runtime.approximation import Moments, fitted_rows, holding_rows
from ditc.runtime.closeness import relative_error
from ditc.runtime.conditioning import condition_tables
from ditc.runtime.executor import StepEvent
from ditc.runtime.pipeline import Pipeline
from tests.runtime.test_approximation import affine_error

LABELS = [0, 3, 1, 4]
NAMES = ["fp32-affine", "fp32-affine-open", "fp32-taylor"]
ORDERS = {"fp32-taylor": 1, "fp32-taylor-2": 2, "fp32-taylor-3": 3}
NAMED = (
    "affine, affine:open, auto, chebyshev, hermite, hold, learned, learned:closed, taylor, taylor:2, taylor:3, variance"
)
UNKNOWN = f"unknown --reuse {{!r}}; choose one of: {NAMED}"


def trajectory(bundle: Bundle, *, reference: bool = False) -> list[StepEvent]:
    with ditc.load(bundle.path, reference=reference) as pipe:
        return list(pipe.generate(LABELS, seed=3))


def holding(bundle: Bundle, path: Path) -> Bundle:
    """A copy of the bundle whose numbers say that what a step reuses is held."""
    shutil.copytree(bundle.path, path)
    tables = bundle.tables()
    write_tables(path / TABLES, tables | {REUSE_ROWS: holding_rows(*tables[REUSE_ROWS].shape)})
    seal_bundle(path, bundle.manifest)
    return open_bundle(path)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_hold_change_no_bit(bundles: dict[str, Bundle], name: str, tmp_path: Path) -> None:
    copy = holding(bundles[name], tmp_path / "holding")
    for step, held in zip(trajectory(copy), trajectory(bundles["fp32-cached"]), strict=True):
        assert np.array_equal(step.x, held.x)


@pytest.mark.parametrize("name", NAMES)
def test_a_bundles_own_numbers_change_its_reuses_and_nothing_before(bundles: dict[str, Bundle], name: str) -> None:
    first = {"fp32-affine": 1, "fp32-affine-open": 1, "fp32-taylor": 3}[
        name
    ]  # the first interval has nothing to extrapolate from
    pairs = zip(trajectory(bundles[name]), trajectory(bundles["fp32-cached"]), strict=True)
    assert [np.array_equal(step.x, held.x) for step, held in pairs] == [True] * first + [False] * (6 - first)


def test_taylor_extrapolates_every_branch(bundles: dict[str, Bundle]) -> None:
    """At step 3: the step of the bundle that keeps branches, given X_2 + w (X_2 - X_0) for each of them."""
    recorder = RecordingBackend(OnnxRuntimeBackend(), {"extrapolate": {0}})
    with Pipeline(bundles["fp32-taylor"], backend=recorder) as pipe:
        events = list(pipe.generate(LABELS, seed=3))
    assert [event.segment for event in events[:4]] == ["full", "reuse", "full", "extrapolate"]
    branches, spec = bundles["fp32-branches"], bundles["fp32-branches"].manifest.model
    t = branches.tables()["sampler.t"]
    labels = np.array([*LABELS, *[spec.null_label] * 4], np.int64)
    conditioning = condition_tables(OnnxRuntimeBackend().session(branches.segment_path(CONDITION)), t, {"y": labels})
    with open_branch_probe(branches.segment_path("full"), spec.branches) as probe:
        before, near = (probe.run(i, np.concatenate([events[i].before] * 2), conditioning) for i in (0, 2))
    weight = (t[2] - t[3]) / (t[0] - t[2])
    caches = {f"cache.{branch}": n + weight * (n - b) for branch, n, b in zip(spec.branches, near, before, strict=True)}
    feeds = {"x": np.concatenate([events[3].before] * 2), "modulation": conditioning["modulation"][3]}
    feeds |= {name: np.float32(value) for name, value in caches.items()}
    session = OnnxRuntimeBackend().session(branches.segment_path("reuse"))
    expected = session.run(["out"], {port.name: feeds[port.name] for port in session.get_inputs()})[0]
    assert relative_error(recorder.runs["extrapolate"][0].outputs["out"], expected) < 1e-5


def test_affine_is_nearer_to_fp_after_the_first_reuse(bundles: dict[str, Bundle]) -> None:
    exact = trajectory(bundles["fp32-affine"], reference=True)[1].x
    held, corrected = (relative_error(trajectory(bundles[n])[1].x, exact) for n in ("fp32-cached", "fp32-affine"))
    assert corrected < held


def test_in_an_open_loop_the_numbers_are_fps_own_and_nothing_of_int8_is_in_them(
    make_small_model: Callable[[], Any], quick_options: CompileOptions, tmp_path: Path, exports: Path
) -> None:
    """Those of a program in INT8 are those in floating point; in a closed loop they are others."""
    for reuse, differ in (("affine:open", False), ("affine", True)):
        settings = quick_options.model_copy(update={"policy": "fora:2", "vc": "none", "reuse": reuse})
        rows = [
            compile_model(make_small_model(), tmp_path / reuse / name, each, exports=exports).tables()[REUSE_ROWS]
            for name, each in (("int8", settings), ("fp32", settings.model_copy(update={"precision": "fp32"})))
        ]
        assert (np.abs(rows[0] - rows[1]).max() > 1e-4) == differ


def test_an_open_loop_takes_the_sums_that_fps_own_steps_would_leave(bundles: dict[str, Bundle]) -> None:
    """Least squares over what the FP segment makes at step 2 for step 3, on the trajectory without a cache."""
    bundle = bundles["fp32-affine-open"]
    spec, count = bundle.manifest.model, 8
    labels = labels_of_the_fit(bundle, count)
    with ditc.load(bundle.path, reference=True) as pipe:
        exact = list(pipe.generate(labels, seed=REUSE_NOISE))
    y = np.array([*labels, *[spec.null_label] * count], np.int64)
    t = bundle.tables()["sampler.t"]
    modulation = condition_tables(OnnxRuntimeBackend().session(bundle.segment_path(CONDITION)), t, {"y": y})
    sums = []
    for maker in (2, 3):
        feeds = {"x": np.concatenate([exact[maker].before] * 2), "modulation": modulation["modulation"][maker]}
        feeds["ahead.modulation"] = modulation["modulation"][3][None]
        sums.append(ran(bundle, "full", feeds, "cache.ahead.1").reshape(-1, spec.branch_shape[-1]))
    for channel in range(spec.branch_shape[-1]):
        line = np.polyfit(sums[0][:, channel], sums[1][:, channel], 1)
        drawn = (line - [1, 0]) * count / (count + 4) + [1, 0]
        np.testing.assert_allclose(bundle.tables()[REUSE_ROWS][3, :, channel], drawn, rtol=1e-3, atol=1e-4)


def labels_of_the_fit(bundle: Bundle, count: int) -> list[int]:
    """The classes of the images that fit: as many of each, in an order that the compile's seed gives."""
    rng, classes = np.random.default_rng(0), bundle.manifest.model.num_classes
    return [int(label) for _ in range(-(-count // classes)) for label in rng.permutation(classes)][:count]


def test_a_closed_loop_errs_less_than_an_open_one_where_it_is_fitted(
    make_small_model: Callable[[], Any],
    quick_options: CompileOptions,
    tmp_path: Path,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the calibration noise, at every step that reuses: what its own run gives it, with its numbers and the other's.

    The first interval's are the same: nothing has erred before it. What both minimise counts some equal pairs too.
    """
    settings = quick_options.model_copy(
        update={"policy": "fora:3", "steps": 9, "precision": "fp32", "vc": "none", "reuse": "affine"}
    )
    seen: list[Moments] = []

    def watched(method: str, moments: Moments, images: int) -> np.ndarray:
        seen.append(moments)
        return fitted_rows(method, moments, images)

    monkeypatch.setattr("ditc.compiler.fitting.fitted_rows", watched)
    closed = compile_model(make_small_model(), tmp_path / "closed", settings, exports=exports)
    in_closed_loop = list(seen)
    open_loop = compile_model(
        make_small_model(), tmp_path / "open", settings.model_copy(update={"reuse": "affine:open"}), exports=exports
    )
    reusing = [step.index for step in closed.manifest.program.steps if step.segment == "reuse"]
    assert len(in_closed_loop) == len(reusing) == 6
    rows, others = (bundle.tables()[REUSE_ROWS] for bundle in (closed, open_loop))
    np.testing.assert_allclose(rows[1:3], others[1:3], atol=1e-4)
    for step, moments in zip(reusing, in_closed_loop, strict=True):
        own, other = (affine_error(each[step], moments, 4, settings.vc_images) for each in (rows, others))
        assert (own <= other + 1e-6).all()
        assert step < 3 or own.sum() < other.sum()


def test_a_bundle_says_what_it_reuses_and_what_was_fitted(bundles: dict[str, Bundle]) -> None:
    manifest = bundles["fp32-affine"].manifest
    assert manifest.settings["reuse"] == manifest.program.reuse == "affine"
    rows = bundles["fp32-affine"].tables()[REUSE_ROWS]
    report = manifest.checks["approximation"]
    assert isinstance(report, dict)
    assert (report["method"], report["images"]) == ("affine", 8)
    assert report["scale"]["least"] == pytest.approx(rows[1::2, 0].min())  # type: ignore[index, call-overload]
    assert rows[::2].tolist() == holding_rows(3, *rows.shape[1:]).tolist()  # steps that compute
    assert bundle_facts(bundles["fp32-taylor"])["cache"].endswith("slots for 4 branches, reuse taylor")


def test_a_step_that_extrapolates_adds_two_sums(bundles: dict[str, Bundle]) -> None:
    graph = load_graph(bundles["fp32-taylor"].segment_path("extrapolate")).graph
    assert [value.name for value in graph.inputs] == ["x", "modulation", REUSE_ROWS, "cache.ahead", "cache.before"]
    operators = [node.op_type for node in graph]
    assert operators.count("Mul") == 3  # a weight each, and the final layer's scale
    assert operators.count("Add") == 5  # positions, the sums, the final layer's shift and bias
    assert operators.count("MatMul") == 1  # the final layer


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_a_step_forecasts_polynomials_of_its_order_exactly(bundles: dict[str, Bundle], name: str) -> None:
    """Each segment that extrapolates, given sums that lie on a polynomial in t, gives what that is worth at its step.

    The degree is that of the order, or lower where an early step has fewer sums. One degree more is not forecast.
    """
    bundle, order = bundles[name], ORDERS[name]
    degrees = [len(step.reads) - 1 for step in bundle.manifest.program.steps if step.segment == "extrapolate"]
    assert set(degrees) == {*range(1, order + 1)}
    for step in bundle.manifest.program.steps:
        if step.segment == "extrapolate":
            degree = len(step.reads) - 1
            assert forecast_error(bundle, step, degree) < 1e-5
            assert forecast_error(bundle, step, degree + 1) > 1e-3


def forecast_error(bundle: Bundle, step: Step, degree: int) -> float:
    """Return how far a step's own segment is from one that holds what a random polynomial in t is worth there."""
    program, spec = bundle.manifest.program, bundle.manifest.model
    rng = np.random.default_rng(degree)
    parts = rng.standard_normal((degree + 1, 2, *spec.branch_shape))

    def sum_at(t: float) -> np.ndarray:
        return np.tensordot((t / 500 - 1) ** np.arange(degree + 1), parts, 1).astype(np.float32)

    feeds = step_feeds(bundle, step, rng.standard_normal((2, *spec.latent_shape)))
    makers = {slot: step.index - distance_of(value) for value, slot in step.reads.items()}
    caches = {port: sum_at(program.steps[makers[slot]].t) for port, slot in program.cache_ports(step)}
    held = {"cache.ahead": sum_at(step.t)}
    return relative_error(ran(bundle, step.segment, feeds | caches), ran(bundle, "reuse", feeds | held))


@pytest.mark.parametrize("name", ["chebyshev", "hermite"])
def test_a_forecast_adds_the_sums_of_earlier_steps_with_its_weights(bundles: dict[str, Bundle], name: str) -> None:
    bundle, approximator = bundles[f"fp32-{name}"], APPROXIMATORS[name]
    program, weights = bundle.manifest.program, approximator.weights
    assert weights is not None
    places = [getattr(step, approximator.along) for step in program.steps]
    counts = []
    for step in (step for step in program.steps if step.segment == "extrapolate"):
        rng = np.random.default_rng(step.index)
        feeds = step_feeds(bundle, step, rng.standard_normal((2, *bundle.manifest.model.latent_shape)))
        makers = {slot: step.index - distance_of(value) for value, slot in step.reads.items()}
        shape = (2, *bundle.manifest.model.branch_shape)
        in_slots = {slot: rng.standard_normal(shape).astype(np.float32) for slot in makers}
        caches = {port: in_slots[slot] for port, slot in program.cache_ports(step)}
        sums = {makers[slot]: values for slot, values in in_slots.items()}
        latest_first = sorted(sums, reverse=True)
        own = weights(places[step.index], [places[maker] for maker in latest_first])
        total = sum(weight * sums[maker] for weight, maker in zip(own, latest_first, strict=True))
        held = ran(bundle, "reuse", feeds | {"cache.ahead": np.float32(total)})
        assert relative_error(ran(bundle, step.segment, feeds | caches), held) < 1e-5
        counts.append(len(sums))
    assert counts == [min(count, approximator.looks_back) for count in (2, 3, 4)]


def step_feeds(bundle: Bundle, step: Step, x: np.ndarray) -> dict[str, np.ndarray]:
    """Return what segments take at a step, but for caches; `x` are two rows."""
    tables = bundle.tables()
    condition = OnnxRuntimeBackend().session(bundle.segment_path(CONDITION))
    conditioning = condition_tables(condition, tables["sampler.t"], {"y": np.array([1, 2], np.int64)})
    own = {name: table[step.index] for name, table in conditioning.items()}
    return {"x": x.astype(np.float32), REUSE_ROWS: tables[REUSE_ROWS][step.index], **own}


def ran(bundle: Bundle, segment: str, feeds: dict[str, np.ndarray], output: str = "out") -> np.ndarray:
    session = OnnxRuntimeBackend().session(bundle.segment_path(segment))
    return np.asarray(session.run([output], {port.name: feeds[port.name] for port in session.get_inputs()})[0])


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_a_reuse_equals_a_computed_step_when_their_inputs_are_equal(bundles: dict[str, Bundle], name: str) -> None:
    bundle = bundles[name]
    last = bundle.manifest.program.steps[-1]
    assert len(last.reads) == ORDERS[name] + 1
    feeds = step_feeds(bundle, last, np.random.default_rng(0).standard_normal((2, *bundle.manifest.model.latent_shape)))
    ahead = bundle.manifest.program.segment("full").ahead
    feeds["ahead.modulation"] = np.repeat(feeds["modulation"][None], ahead, axis=0)
    total = ran(bundle, "full", feeds, "cache.ahead.1")
    feeds |= {port: total for port, _ in bundle.manifest.program.cache_ports(last)}
    assert relative_error(ran(bundle, last.segment, feeds), ran(bundle, "full", feeds)) < 1e-5


@pytest.mark.parametrize("name", ["fp32-taylor-2", "fp32-taylor-3"])
def test_a_higher_order_is_the_lower_one_until_it_has_its_sums(
    bundles: dict[str, Bundle], pipes: dict[str, Pipeline], name: str
) -> None:
    program = bundles[name].manifest.program
    first = next(step.index for step in program.steps if len(step.reads) == ORDERS[name] + 1)
    lower = "fp32-taylor-2" if ORDERS[name] == 3 else "fp32-taylor-8"
    events = zip(*(pipes[each].generate(LABELS, seed=3) for each in (name, lower)), strict=True)
    assert [np.array_equal(own.x, other.x) for own, other in events] == [True] * first + [False] * (8 - first)


def test_weights_of_sums_that_a_step_has_not_are_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(bundles["fp32-taylor-2"].path, path)
    tables = bundles["fp32-taylor-2"].tables()
    assert not tables[REUSE_ROWS][3, 2].any()
    tables[REUSE_ROWS] = tables[REUSE_ROWS].copy()
    tables[REUSE_ROWS][3, 2] = 1
    write_tables(path / TABLES, tables)
    seal_bundle(path, bundles["fp32-taylor-2"].manifest)
    with pytest.raises(BundleError, match=r"'reuse\.rows' of step 3 weighs 3 sums, and it reads 2"):
        open_bundle(path)


def test_what_is_fitted_may_look_back_at_several_sums(
    monkeypatch: pytest.MonkeyPatch,
    make_small_model: Callable[[], Any],
    quick_options: CompileOptions,
    tmp_path: Path,
    exports: Path,
) -> None:
    """Least squares over two sums, as one row of the table; what is fitted to more errs less than what holds."""

    def least_squares(means: np.ndarray, spreads: np.ndarray) -> list[np.ndarray]:
        moments = spreads + means[:, None] * means[None]
        seen, exact = moments[:-1, :-1].transpose(2, 0, 1), moments[:-1, -1].T
        return [*np.linalg.solve(seen + 1e-9 * np.eye(seen.shape[1]), exact[..., None])[..., 0].T]

    monkeypatch.setitem(APPROXIMATORS, "affine", Approximator(looks_back=2, fit=least_squares))
    options = {"policy": "fora:2", "precision": "fp32", "vc": "none", "reuse": "affine"}
    bundle = compile_model(
        make_small_model(), tmp_path / "b", quick_options.model_copy(update=options), exports=exports
    )
    rows, steps = bundle.tables()[REUSE_ROWS], bundle.manifest.program.steps
    assert [step.segment for step in steps] == ["full", "reuse", "full", "extrapolate", "full", "extrapolate"]
    assert [np.unique(row, axis=1).shape[1] > 1 for row in rows] == [step.segment == "extrapolate" for step in steps]
    assert bundle.manifest.measured("approximation").approximation.shift is None  # type: ignore[union-attr]
    exact = trajectory(bundle, reference=True)[3].x
    held = trajectory(holding(bundle, tmp_path / "holding"))[3].x
    assert relative_error(trajectory(bundle)[3].x, exact) < relative_error(held, exact)


def test_quantized_extrapolation_of_the_reference_model_is_nearer_to_fp(tmp_path: Path, exports: Path) -> None:
    options = CompileOptions(steps=30, points=100, vc="none", verify_images=16, batch=16)
    psnr_db = {}
    for reuse in ("hold", "taylor"):
        bundle = compile_model("digits", tmp_path / reuse, options.model_copy(update={"reuse": reuse}), exports=exports)
        psnr_db[reuse] = bundle.manifest.checks["verify"]["psnr_db_mean"]  # type: ignore[index, call-overload]
    assert psnr_db["taylor"] > psnr_db["hold"] + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (f"--reuse {name}", UNKNOWN.format(name))
            for name in ("spline", "taylor:0", "taylor:4", "taylor:x", "taylor:", "hold:2")
        ),
        ("--reuse taylor --policy none", "--reuse taylor works on sums made ahead: it needs a policy that reuses"),
        ("--reuse affine --caches branches", "--reuse affine works on sums made ahead"),
        ("--policy {file} --reuse hold", "was made for --reuse taylor, found hold; give --reuse taylor"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    rows = [[True] * 12, [False] * 12] * 2
    (tmp_path / "s.json").write_text(json.dumps({"compute": rows, "reuse": "taylor"}))
    given = arguments.format(file=tmp_path / "s.json").split()
    assert run(["compile", "digits", "-o", str(tmp_path / "b"), "--steps", "4", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "b").exists()
