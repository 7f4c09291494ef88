"""Finding the bad layer: a planted one is found and named, on any backend, and the bundle stays as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.bundle import Bundle, open_bundle, seal_bundle
from ditc.cli.main import run
from ditc.compiler.calibrating import calibration_feeds, chosen_points, spread_points
from ditc.compiler.point_conditions import PointConditions
from ditc.diagnosis.bisecting import (
    Target,
    bisect_bundle,
)
from ditc.diagnosis.options import BisectOptions
from ditc.engines.backend import Engine, runnable_path
from ditc.engines.fake import FakeEngine
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import CheckError
from ditc.exporter import onnx_files
from ditc.files import sha256_of
from ditc.program import CONDITION
from ditc.report.wording import joined_names
from ditc.runtime.closeness import relative_error
from ditc.tables import step_inputs

BAD = "blocks.1.mlp.fc1"
ORT = OnnxRuntimeBackend()


@pytest.fixture(scope="module")
def planted(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cached bundle with one activation scale 20 times too large, sealed as if it had been compiled so."""
    folder = tmp_path_factory.mktemp("planted") / "b"
    shutil.copytree(bundles["cached"].path, folder)
    scales = folder / "calib" / "scales.json"
    table = json.loads(scales.read_text())
    table["scales"][BAD] *= 20
    scales.write_text(json.dumps(table))
    seal_bundle(folder, bundles["cached"].manifest)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_layer_with_a_bad_scale_is_ranked_first_by_its_path(
    planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bisect", str(planted), "--json"]) == 0
    bisection = json.loads(capsys.readouterr().out)
    worst = bisection["groups"][0]
    assert worst["layers"] == [BAD]
    assert worst["branches"] == ["blocks.1.mlp"]
    assert worst["share"] > 0.5
    assert worst["worst"]["error"] == max(step["error"] for step in worst["steps"])
    assert len(bisection["groups"]) == 8


def test_layers_of_a_text_are_groups_as_others_are(bundles: dict[str, Bundle]) -> None:
    bisection = bisect_bundle(bundles["streams"].path, BisectOptions(points=4, by="branch"))
    errors = {group.branches: group.error for group in bisection.groups}
    assert sorted(errors) == sorted((branch,) for branch in bundles["streams"].manifest.model.branches)
    assert errors[("blocks.0.ff_text",)] > 0


def test_leaving_the_bad_layer_in_float_takes_most_of_the_error_away(planted: Path) -> None:
    bisection = bisect_bundle(planted, BisectOptions(mode="without"))
    assert bisection.groups[0].layers == (BAD,)
    assert bisection.groups[0].error < bisection.together / 2
    assert min(group.error for group in bisection.groups[1:]) > bisection.together / 2


@pytest.mark.parametrize(("by", "layers"), [("branch", 2), ("block", 4)])
def test_a_coarser_group_with_the_bad_layer_is_ranked_first(planted: Path, by: str, layers: int) -> None:
    worst = bisect_bundle(planted, BisectOptions(by=by)).groups[0]
    assert BAD in worst.layers
    assert len(worst.layers) == layers


def test_the_typed_form_for_tensorrt_names_the_same_layer(planted: Path) -> None:
    types: set[str] = set()

    def opened(path: Path) -> Engine:
        engine = ORT.open(path)
        types.update(port.dtype for name, port in engine.inputs.items() if name != "x")
        return engine

    bisection = bisect_bundle(planted, target=Target("trt", opened))
    assert types == {"float16"}
    assert bisection.backend == "trt"
    assert bisection.groups[0].layers == (BAD,)


def test_everything_quantized_is_the_error_of_the_deployed_segment(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["cached"]
    calib = chosen_points(bundle, 10)
    condition = ORT.session(bundle.segment_path(CONDITION))
    feeds = list(calibration_feeds(condition, calib, PointConditions.of_bundle(bundle), 1))
    ahead = bundle.manifest.program.segment("full").ahead
    for feed in feeds:  # what is summed for later steps changes nothing of this one
        feed["ahead.modulation"] = np.repeat(feed["modulation"][None], ahead, axis=0)
    exact, deployed = (
        np.stack([ORT.session(path).run(["out"], feed)[0][:, :3] for feed in feeds])
        for path in (bundle.reference_path("full"), runnable_path(bundle.segment_path("full"), "onnxrt"))
    )
    bisection = bisect_bundle(bundle.path, BisectOptions(points=10))
    assert bisection.points == 10
    assert bisection.together == pytest.approx(relative_error(deployed, exact), rel=1e-4)
    for step in bisection.together_steps:
        at_step = calib.step == step.step
        assert step.error == pytest.approx(relative_error(deployed[at_step], exact[at_step]), rel=1e-4)
        assert step.t == bundle.manifest.program.steps[step.step].t


def test_shares_add_up_and_follow_the_order(bundles: dict[str, Bundle]) -> None:
    bisection = bisect_bundle(bundles["cached"].path)
    errors = [group.error for group in bisection.groups]
    assert errors == sorted(errors, reverse=True)
    assert sum(group.share for group in bisection.groups) == pytest.approx(1)
    assert bisection.groups[0].share == pytest.approx(errors[0] ** 2 / sum(error**2 for error in errors))
    assert bisection.squares_ratio == pytest.approx(sum(error**2 for error in errors) / bisection.together**2)


def test_the_bundle_is_unchanged_and_nothing_is_left_behind(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = hashes(bundles["cached"].path)
    bisect_bundle(bundles["cached"].path)
    assert hashes(bundles["cached"].path) == before
    assert list(tmp_path.iterdir()) == []


def test_one_engine_per_group_and_one_copy_of_the_weights(bundles: dict[str, Bundle]) -> None:
    seen: list[list[str]] = []

    def opened(path: Path) -> Engine:
        assert not path.is_relative_to(bundles["cached"].path)
        seen.append(sorted(file.name for file in path.parent.iterdir() if file != path))
        return ORT.open(path)

    bisect_bundle(bundles["cached"].path, target=Target("onnxrt", opened))
    assert seen == [["full.onnx", "full.onnx.data"]] * (8 + 2)


def test_variants_with_weights_of_their_own_give_the_same_errors(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bisect_bundle(bundles["cached"].path)
    monkeypatch.setattr(onnx_files, "INLINE_LIMIT_BYTES", 0)
    assert bisect_bundle(bundles["cached"].path) == expected


def test_points_come_from_steps_that_compute(bundles: dict[str, Bundle]) -> None:
    bisection = bisect_bundle(bundles["cached"].path, BisectOptions(points=1000))
    assert bisection.points == 24  # all there are
    assert [step.step for step in bisection.together_steps] == [0, 2, 4]


def test_points_of_steps_that_reuse_are_left_out(bundles: dict[str, Bundle]) -> None:
    program = bundles["cached"].manifest.program
    only_first = program.model_copy(
        update={
            "steps": tuple(
                step if step.index == 0 else step.model_copy(update={"segment": "reuse"}) for step in program.steps
            )
        }
    )
    manifest = bundles["cached"].manifest.model_copy(update={"program": only_first})
    assert set(chosen_points(Bundle(bundles["cached"].path, manifest), 1000).step) == {0}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 50))
def test_points_are_spread_over_the_steps(steps: list[int], count: int) -> None:
    places = spread_points(np.array(steps), count)
    chosen = np.array(steps)[places]
    assert len(set(places.tolist())) == len(places) == min(count, len(steps))
    assert list(chosen) == sorted(chosen)
    assert len(set(chosen)) == min(count, len(set(steps)))


def test_fewer_points_than_steps_reach_from_the_first_step_to_the_last() -> None:
    assert list(spread_points(np.arange(17), 3)) == [0, 8, 16]


def test_a_prediction_that_is_not_finite_fails_the_check(bundles: dict[str, Bundle]) -> None:
    def broken(path: Path) -> Engine:
        engine = ORT.open(path)

        def nan(_: Mapping[str, Any]) -> dict[str, Any]:
            return {"out": np.float32("nan")}

        return FakeEngine(nan, engine.inputs, engine.outputs)

    with pytest.raises(CheckError, match="prediction on fake is NaN or infinite"):
        bisect_bundle(bundles["cached"].path, target=Target("fake", broken))


def test_the_table_names_layers_steps_and_what_is_not_shown(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bisect", str(planted), "--top", "3", "--points", "3"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "3 points at 3 steps, onnxrt; relative error of the prediction"
    assert lines[3].split() == "rank error caused share worst step t error there branch layers".split()
    assert lines[4].split()[0] == "1"
    assert lines[4].split()[-2:] == ["blocks.1.mlp", BAD]
    assert lines[3].index("layers") == lines[4].index(BAD)
    assert lines[7] == "and 5 more; --top shows them"
    assert "of the square with everything quantized" in lines[-1]
    assert printed.err == "bisect: done\n"


def test_names_that_share_their_beginning_are_joined() -> None:
    assert joined_names(["a.0.q"]) == "a.0.q"
    assert joined_names(["a.0.q", "a.0.k"]) == "a.0.{q,k}"
    assert joined_names(["a.0.attn.q", "a.0.mlp"]) == "a.0.{attn.q,mlp}"
    assert joined_names(["q", "k"]) == "{q,k}"


@pytest.fixture
def without_reference(bundles: dict[str, Bundle], tmp_path: Path) -> Path:
    shutil.copytree(bundles["cached"].path, tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "reference")
    return tmp_path / "b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{fp32}", "is fp32, bisect needs w8a8: nothing in it is quantized; compile it with --precision w8a8"),
        ("{bare}", "has no FP reference to compare with; compile it with --reference, or copy its reference/ folder"),
        ("{good} --points 0", "--points must be at least 1, found 0"),
        ("{good} --top 0", "--top must be at least 1, found 0"),
        ("{good} --by head", "unknown --by 'head'; choose one of: block, branch, layer"),
        ("{good} --mode both", "unknown --mode 'both'; choose one of: only, without"),
        ("{good}/calib", "is not a bundle"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str,
    message: str,
    bundles: dict[str, Bundle],
    without_reference: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, fp32 = bundles["cached"].path, bundles["fp32-cached"].path
    assert run(["bisect", *arguments.format(good=good, fp32=fp32, bare=without_reference).split()]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_damaged_scales_are_one_line(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(planted, tmp_path / "b")
    (tmp_path / "b" / "calib" / "scales.json").write_text("{}")
    seal_bundle(tmp_path / "b", open_bundle(planted).manifest)
    assert run(["bisect", str(tmp_path / "b")]) == 2
    assert "scales.json is not a table of scales; compile the bundle again" in capsys.readouterr().err


def test_a_point_is_run_with_the_scales_of_its_step(bundles: dict[str, Bundle]) -> None:
    """Everything quantized is what the deployed segment gives at each point, with the row of the point's step."""
    bundle = bundles["per-step"]
    rows = step_inputs(bundle.tables())
    assert set(rows) == {"scales", "midpoints"}
    calib = chosen_points(bundle, 6)
    condition = ORT.session(bundle.segment_path(CONDITION))
    feeds = list(calibration_feeds(condition, calib, PointConditions.of_bundle(bundle), 1))
    for feed in feeds:
        feed["ahead.modulation"] = feed["modulation"][None]
    deployed = ORT.session(runnable_path(bundle.segment_path("full"), "onnxrt"))
    predictions = [
        deployed.run(["out"], feed | {name: table[step] for name, table in rows.items()})[0][:, :3]
        for feed, step in zip(feeds, calib.step, strict=True)
    ]
    reference = ORT.session(bundle.reference_path("full"))
    exact = [reference.run(["out"], feed)[0][:, :3] for feed in feeds]
    together = bisect_bundle(bundle.path, BisectOptions(points=6)).together
    assert together == pytest.approx(relative_error(np.stack(predictions), np.stack(exact)), rel=1e-4)
