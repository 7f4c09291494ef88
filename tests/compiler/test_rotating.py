"""Rotation as a stage: the FP function stays, the reference is not touched, and INT8 reads what scales are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ditc.bundle import Bundle
from ditc.cli.listing import bundle_facts
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.diagnosis.bisecting import bisect_bundle
from ditc.diagnosis.options import BisectOptions
from ditc.engines.building import check_calibratable
from ditc.errors import CheckError, InputError
from ditc.exporter.models import builtin_digits
from ditc.exporter.onnx_files import load_graph
from ditc.exporter.stress import stressed
from ditc.progress import silent
from ditc.report.calibration import activations_of
from ditc.report.facts import Activations
from tests.conftest import small_model


@pytest.mark.parametrize(("kind", "products"), [("rotated", 6), ("streams-rotated", 23)])
def test_every_segment_computes_what_it_did(kind: str, products: int, bundles: dict[str, Bundle]) -> None:
    check = bundles[kind].manifest.measured("rotate").rotate
    assert check is not None
    assert 0 < check.parity["full"] < 1e-5
    assert max(check.parity.values()) < 1e-5
    assert (check.products, len(check.folded)) == (products, 2)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", ["none", "smooth"])
@pytest.mark.parametrize("size", [8, 32, 128])
def test_digits_under_stress_compute_what_they_did(
    size: int, smoothing: str, tmp_path: Path, quick_options: CompileOptions, exports: Path
) -> None:
    settings = {"rotate": size, "smooth": smoothing, "policy": "fora:3", "vc": "none"}
    options = quick_options.model_copy(update=settings)
    check = compile_model(stressed(builtin_digits()), tmp_path / "b", options, exports=exports).manifest.measured(
        "rotate"
    )
    assert check.rotate is not None
    assert max(check.rotate.parity.values()) < 1e-5
    assert len(check.rotate.folded) == (6 if size <= 32 else 0)  # heads have 32 channels


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Bundle]) -> Bundle:
    return bundles["rotated"]


def test_a_bundle_says_what_was_rotated_and_breaks_no_rule(bundle: Bundle) -> None:
    checks: Any = bundle.manifest.checks
    assert bundle.manifest.settings["rotate"] == 16
    assert checks["rotate"]["folded"] == ["blocks.0.attn.proj", "blocks.1.attn.proj"]
    assert checks["kernels"]["full"] == {"linears": 8, "integer": 8}
    assert not any(checks["tensorrt"].values())
    assert bundle_facts(bundle)["rotation"] == (
        "groups of 16 channels: 2 of 8 linear layers read it for nothing, 6 products in front of the others"
    )


def test_products_are_counted_and_the_reference_has_none(bundle: Bundle, bundles: dict[str, Bundle]) -> None:
    plain = bundles["cached"]
    work = [each.manifest.checks["footprints"]["full"]["float_operations"] for each in (bundle, plain)]  # type: ignore[index,call-overload]
    # 16 tokens of 2 rows read 64 channels twice and 256 once, in each of 2 blocks, in groups of 16
    assert work[0] - work[1] == 2 * 2 * 16 * 8 * 16 * (64 + 64 + 256)
    names = [[node.name for node in load_graph(each.reference_path("full")).graph] for each in (bundle, plain)]
    assert names[0] == names[1]


def test_bisection_and_report_look_at_what_is_quantized(bundle: Bundle) -> None:
    """Nothing clips far beyond its range, as it would where scales are of other numbers."""
    assert 0 < bisect_bundle(bundle.path, BisectOptions(points=4, by="block")).together < 0.1
    activations = activations_of(bundle, silent)
    assert isinstance(activations, Activations)
    assert all(max(each.largest) < 1.5 * max(each.limits) for each in activations.activations)


def test_a_rotation_that_changes_the_function_fails_the_compile(
    tmp_path: Path, quick_options: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditc.quantize.rotated_graphs.inverse", lambda matrix: 0.99 * matrix)
    options = quick_options.model_copy(update={"policy": "none", "rotate": 4})
    with pytest.raises(CheckError, match=r"segment full: rotation changes .* compile with no --rotate"):
        compile_model(small_model(depth=1), tmp_path / "b", options)


def test_groups_that_do_not_divide_the_channels_are_refused_before_anything_runs(
    tmp_path: Path, quick_options: CompileOptions
) -> None:
    stages = []
    options = quick_options.model_copy(update={"policy": "none", "rotate": 128})
    with pytest.raises(InputError, match=r"found 64 channels at blocks\.0\.attn\.qkv; give at most --rotate 64"):
        compile_model(small_model(), tmp_path / "b", options, progress=lambda stage, *_: stages.append(stage))
    assert "select" not in stages


def test_a_calibrator_that_starts_from_fp_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="knows nothing of --rotate 16"):
        check_calibratable(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotate": 48}, "--rotate needs a power of two, found 48: .* give 32 or 64"),
        ({"rotate": 1}, "--rotate must be at least 2 and at most 16384, found 1; it is a power of two"),
        ({"rotate": 16, "precision": "fp32"}, "--rotate 16 is for activations in integers, and --precision fp32"),
        ({"rotate": 16, "midpoint": "bounded"}, "--midpoint bounded would do nothing"),
        ({"rotate": 16, "ranges": "fisher"}, "--ranges fisher weighs what layers of the model read"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompileOptions.model_validate(changes)
