"""The outputs of a reuse, on compiled bundles: held where its numbers say so, else what its formula says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import ditc
from ditc.bundle import TABLES, Bundle, open_bundle, seal_bundle, write_tables
from ditc.cli.listing import bundle_facts
from ditc.cli.main import run
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.engines.recording import RecordingBackend
from ditc.exporter.onnx_files import load_graph
from ditc.program import CONDITION, REUSE_ROWS
from ditc.quality.branch_probe import open_branch_probe
from ditc.runtime.approximation import holding_rows
from ditc.runtime.closeness import relative_error
from ditc.runtime.conditioning import condition_tables
from ditc.runtime.executor import StepEvent
from ditc.runtime.pipeline import Pipeline

LABELS = [0, 3, 1, 4]
NAMES = ["fp32-affine", "fp32-taylor"]


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
    first = {"fp32-affine": 1, "fp32-taylor": 3}[name]  # the first interval has nothing to extrapolate from
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
        ("--reuse spline", "unknown --reuse 'spline'; choose one of: affine, auto, hold, taylor, variance"),
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
