"""Smoothing as a stage: the FP function stays, INT8 gets easier, nothing is added to run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ditc
from ditc.bundle import Bundle
from ditc.calibset import CalibSet
from ditc.cli.listing import bundle_facts
from ditc.compiler import smoothing
from ditc.compiler.calibrating import calibration_feeds
from ditc.compiler.driver import compile_model
from ditc.compiler.exporting import export
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan
from ditc.compiler.point_conditions import PointConditions
from ditc.compiler.pooling import select
from ditc.compiler.quantizing import quantize
from ditc.errors import CheckError, InputError
from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.onnx_files import load_graph
from ditc.exporter.stress import stressed
from ditc.program import CONDITION
from ditc.quantize.linears import linears_of
from ditc.quantize.transforms import TRANSFORMS
from ditc.requests import Request
from ditc.runtime.closeness import relative_error
from ditc.runtime.executor import seeded_noise
from ditc.speed.eager import eager_images
from ditc.tables import sampler_columns

PATHS = {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1"}


def hard_model() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=1, num_heads=4, num_classes=5)
    return stressed(DiT(config, name="small").eval())


@dataclass(frozen=True)
class Exported:
    """A model exported under a schedule whose rows compute all, some and no branches, with a calibration set."""

    plan: Plan
    segments: Segments
    calib: Path

    def smoothed(self, method: str, folder: Path) -> Segments:
        smoothing.smooth(self.with_options(smooth=method), self.segments, self.calib, folder)
        return {
            name: folder / path.name if (folder / path.name).is_file() else path for name, path in self.segments.items()
        }

    def with_options(self, **changes: str) -> Plan:
        return replace(self.plan, options=self.plan.options.model_copy(update=changes))

    def outputs(self, segments: Segments, name: str = "full") -> np.ndarray:
        """The prediction at every calibration point, with the tables of the segments' own `condition`."""
        sessions = [self.plan.backend.session(segments[each]) for each in (CONDITION, name)]
        feeds = calibration_feeds(sessions[0], CalibSet.load(self.calib), PointConditions.of_plan(self.plan), 8)
        return np.concatenate([sessions[1].run(["out"], feed)[0] for feed in feeds])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, quick_options: CompileOptions) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    rows = [[True, True], [False, False], [False, True]] * 2
    (folder / "schedule.json").write_text(json.dumps({"compute": rows}))
    model = hard_model()
    plan = make_plan(model, quick_options.model_copy(update={"policy": str(folder / "schedule.json")}))
    export(plan, model, folder)
    segments = {name: folder / f"{name}.onnx" for name in plan.program.calls}
    select(plan, segments, folder)
    return Exported(plan, segments, folder / "calib.npz")


@pytest.fixture(scope="module", params=list(TRANSFORMS))
def folded(
    request: pytest.FixtureRequest, exported: Exported, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Segments, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return exported.smoothed(request.param, folder), folder


def test_the_fp_function_does_not_change(exported: Exported, folded: tuple[Segments, Path]) -> None:
    assert relative_error(exported.outputs(folded[0]), exported.outputs(exported.segments)) < 2e-6


def test_every_segment_that_computes_is_folded_and_held_to_what_it_was(
    exported: Exported, folded: tuple[Segments, Path]
) -> None:
    segments, folder = folded
    row = next(name for name in segments if name.startswith("row"))
    assert {name for name in segments if segments[name] != exported.segments[name]} == {CONDITION, "full", row}
    parity = json.loads((folder / "smooth.json").read_text())["parity"]
    assert parity.keys() == {"full", "reuse", row}
    assert 0 < max(parity.values()) < 2e-6


def test_nothing_is_added_to_what_runs(exported: Exported, folded: tuple[Segments, Path]) -> None:
    for name, path in folded[0].items():
        before, after = load_graph(exported.segments[name]), load_graph(path)
        assert [node.op_type for node in after.graph] == [node.op_type for node in before.graph]


def test_the_report_names_every_layer_once(folded: tuple[Segments, Path]) -> None:
    report = json.loads((folded[1] / "smooth.json").read_text())
    assert report["layers"].keys() == PATHS
    assert report["left"] == ["blocks.0.mlp.fc2"]
    weights = {linear.path: linear.weight_array() for linear in linears_of(load_graph(folded[0]["full"]))}
    for path in PATHS - {"blocks.0.attn.proj"}:
        assert report["layers"][path]["largest"] / report["layers"][path]["least"] > 10
        peaks = np.abs(weights[path]).max(axis=1)
        assert peaks.max() / peaks.min() < 10  # outliers were 10 to 40 times as large


def test_int8_is_as_easy_as_without_outliers(exported: Exported, folded: tuple[Segments, Path], tmp_path: Path) -> None:
    exact = exported.outputs(exported.segments)
    errors = []
    for name, segments in (("hard", exported.segments), ("smoothed", folded[0])):
        (tmp_path / name).mkdir()
        quantize(exported.plan, segments, exported.calib, tmp_path / name)
        errors.append(relative_error(exported.outputs({**segments, "full": tmp_path / name / "full.onnx"}), exact))
    assert errors[1] < errors[0] / 3


def test_a_fold_that_changes_the_function_fails_the_compile(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoothing, "multiply_output", lambda *_: None)
    with pytest.raises(CheckError, match="segment full: smoothing changes its outputs by"):
        exported.smoothed("balance", tmp_path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, quick_options: CompileOptions) -> Bundle:
    options = quick_options.model_copy(update={"policy": "fora:2", "vc": "none", "smooth": "smooth"})
    return compile_model(hard_model(), tmp_path_factory.mktemp("smoothed") / "b", options)


def test_a_bundles_reference_is_the_models_own_function(bundle: Bundle) -> None:
    """Its `full` and its `condition` were changed together, and the compiled `full` takes the same tables."""
    spec = bundle.manifest.model
    noise, fresh = seeded_noise(0, 0, 2, spec.latent_shape)
    table = sampler_columns(bundle.tables())
    expected = eager_images(hard_model(), table, Request.of(spec, [1, 2]), noise, fresh, bundle.manifest.guidance)
    with ditc.load(bundle.path, reference=True) as reference, ditc.load(bundle.path) as compiled:
        assert relative_error(reference.latents([1, 2], noise=noise), expected) < 1e-3
        first = [next(iter(pipe.generate([1, 2], seed=0))).x for pipe in (compiled, reference)]
    assert relative_error(*first) < 0.05


def test_a_bundle_says_what_was_smoothed(bundle: Bundle) -> None:
    assert bundle.manifest.settings["smooth"] == "smooth"
    report = bundle.manifest.checks["smooth"]
    assert isinstance(report, dict)
    assert report["layers"].keys() == PATHS
    assert bundle_facts(bundle)["smoothing"] == "smooth: 3 of 4 linear layers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smooth": "awq"}, "unknown --smooth 'awq'; choose one of: auto, balance, none, smooth"),
        ({"smooth": "smooth", "precision": "fp32"}, "--smooth smooth needs --precision w8a8, found fp32"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompileOptions.model_validate(changes)
