"""`ditc report`: what it gathers is what the bundle does, and its page shows all of it and loads nothing."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ditc.runtime.pipeline as pipeline
import ditc.spec as spec
from ditc.bundle import Bundle, Manifest, open_bundle, seal_bundle, write_tables
from ditc.calibset import CalibSet
from ditc.choices import ScaleBinding, names_of
from ditc.cli.main import run
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import CheckError, InputError
from ditc.precision import PRECISIONS, quantized
from ditc.quality.bootstrap import Estimate
from ditc.quality.distributions import Distribution
from ditc.quality.evaluation import Distributions, Evaluation
from ditc.quantize.scale_table import ScaleTable
from ditc.report.facts import Activations, Calibration, Drift, Fidelity, Pictures, Report, Skipped, Speed
from ditc.report.gathering import check_report, default_page, report_bundle
from ditc.report.options import ReportOptions
from ditc.report.page import page_from_report
from ditc.report.samples import gain_for
from ditc.report.sentences import SCALES_IN_WORDS, program_sentence
from ditc.report.tables import segment_bytes
from ditc.speed.options import BenchOptions
from ditc.speed.side_by_side import SideBySide

QUICK = ReportOptions(images=3, requests=2, against=())
QUICK_LINE = "--images 3 --requests 1 --against none"


def resealed(bundle: Bundle, path: Path, tables: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(bundle.path, path)
    if tables is not None:
        write_tables(path / "tables.safetensors", bundle.tables() | tables)
    seal_bundle(path, bundle.manifest.model_copy(update=changes))
    return path


def changed_settings(manifest: Manifest, **changes: Any) -> dict[str, Any]:
    return manifest.settings | changes


@pytest.fixture(scope="module")
def cached(bundles: dict[str, Bundle]) -> Report:
    """Everything measured: INT8, a cache, compensation."""
    return report_bundle(bundles["cached"].path, QUICK.model_copy(update={"against": ("onnxruntime-f32",)}))


@pytest.fixture(scope="module")
def page(cached: Report) -> str:
    return page_from_report(cached, "cached-report.json")


def test_json_is_the_whole_report(cached: Report) -> None:
    assert Report.model_validate_json(cached.model_dump_json()) == cached


def test_images_are_those_of_the_bundle_and_of_fp_on_the_same_noise(bundles: dict[str, Bundle], cached: Report) -> None:
    assert isinstance(cached.pictures, Pictures)
    assert [picture.label for picture in cached.pictures.pictures] == [0, 1, 2]
    for reference, side in ((False, "found"), (True, "exact")):
        with pipeline.load(bundles["cached"].path, reference=reference) as pipe:
            images = pipe.images([0, 1, 2], seed=1)
        shown = [pixels(getattr(picture, side)) for picture in cached.pictures.pictures]
        assert np.array_equal(shown, np.moveaxis(np.round((images + 1) * 127.5), 1, -1))
    gap = pixels(cached.pictures.pictures[0].found) - pixels(cached.pictures.pictures[0].exact)
    shown_gap = pixels(cached.pictures.pictures[0].difference) - 127.5
    assert np.abs(shown_gap - cached.pictures.gain * gap).max() <= cached.pictures.gain + 1  # each was rounded
    assert isinstance(cached.fidelity, Fidelity)
    psnr = [picture.psnr_db for picture in cached.pictures.pictures]
    assert cached.fidelity.measures["psnr_db"].mean == pytest.approx(np.mean(psnr))
    assert cached.fidelity.measures["psnr_db"].worst == pytest.approx(min(psnr))


def pixels(data: str | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))), np.float64)


def test_the_form_in_which_integers_ran_is_on_the_page(cached: Report, page: str) -> None:
    assert cached.arithmetic == OnnxRuntimeBackend().arithmetic(8)
    assert f"INT8 there: {cached.arithmetic.text}." in unescape(page)


@pytest.mark.parametrize("precision", sorted(name for name in PRECISIONS if quantized(name)))
def test_every_precision_with_integers_shows_its_activations_and_calibration(
    precision: str, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = bundles["cached"]
    settings = changed_settings(bundle.manifest, precision=precision)
    report = report_bundle(resealed(bundle, tmp_path / "b", precision=precision, settings=settings), QUICK)
    assert isinstance(report.activations, Activations)
    assert isinstance(report.calibration, Calibration)
    words = "linear layers in INT8" if precision == "w8a8" else f"linear layers in INT8 of fewer bits ({precision})"
    assert f"{words} with one scale for all steps" in program_sentence(report)


def test_differences_are_enlarged_as_far_as_they_do_not_clip() -> None:
    for largest, gain in ((0.3, 2), (0.5, 2), (0.9, 1), (4.0, 1), (0.004, 128), (0.0, 256)):
        assert gain_for(np.array([largest, -largest / 2], np.float32)) == gain


def test_drift_is_what_verify_finds_with_and_without_the_compensation(
    bundles: dict[str, Bundle], cached: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(cached.drift, Drift)
    assert run(f"verify {bundles['cached'].path} --images 3 --json".split()) == 0
    verified = json.loads(capsys.readouterr().out)
    assert cached.drift.bundle.relative_error == pytest.approx(verified["relative_error"], rel=1e-3)
    assert cached.drift.uncompensated is not None
    assert cached.drift.uncompensated.variance_drift != cached.drift.bundle.variance_drift
    assert np.array_equal(cached.compensation, bundles["cached"].tables()["compensation.k"])


def test_every_step_is_timed_in_its_segment(cached: Report) -> None:
    assert isinstance(cached.speed, Speed)
    program = cached.manifest.program
    assert [(s.index, s.t, s.segment) for s in cached.speed.steps] == [(s.index, s.t, s.segment) for s in program.steps]
    assert all(0 < step.engine_seconds < step.seconds for step in cached.speed.steps)
    assert {name: segment.calls for name, segment in cached.speed.segments.items()} == {
        "condition": 1,
        "full": 3,
        "reuse": 3,
    }
    (peer,) = cached.speed.peers.values()
    assert isinstance(cached.speed.against, SideBySide)
    assert peer.ratio_run == pytest.approx(peer.run.median / cached.speed.against.bundle.run.median)


def test_activations_reach_what_calibration_saw(bundles: dict[str, Bundle], cached: Report) -> None:
    recorded = cached.activations
    assert isinstance(recorded, Activations)
    assert recorded.steps == (0, 2, 4)
    table = ScaleTable.model_validate_json((bundles["cached"].path / "calib" / "scales.json").read_bytes())
    assert {layer for activation in recorded.activations for layer in activation.layers} == set(table.scales)
    for activation in recorded.activations:
        assert activation.limits == pytest.approx([127 * table.scales[activation.layers[0]]] * 3)
        assert max(activation.largest) >= 0.5 * activation.limits[0]  # the range was made from such points


def test_scales_of_each_step_and_midpoints_are_in_the_limits(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["per-step"]
    report = report_bundle(bundle.path, QUICK)
    assert isinstance(report.activations, Activations)
    table = ScaleTable.model_validate_json((bundle.path / "calib" / "scales.json").read_bytes())
    for activation in report.activations.activations:
        layer = activation.layers[0]
        middles = table.midpoints.get(layer, (0,) * 6)
        wanted = [table.steps[layer][step] * (127 + abs(middles[step])) for step in report.activations.steps]
        assert activation.limits == pytest.approx(wanted)
    assert table.midpoints
    assert report.compensation is None
    assert isinstance(report.drift, Drift)
    assert report.drift.uncompensated is None
    text = page_from_report(report, "x.json")
    assert "scales of their own at each step" in text
    assert "without compensation" not in text


def test_the_calibration_set_is_counted_and_clustered(bundles: dict[str, Bundle], cached: Report) -> None:
    calibration, calib = cached.calibration, CalibSet.load(bundles["cached"].path / "calib" / "calib.npz")
    assert isinstance(calibration, Calibration)
    assert calibration.digest == calib.digest
    assert calibration.by_step == tuple(np.bincount(calib.step, minlength=6))
    assert calibration.by_class == {label: int((calib.label == label).sum()) for label in np.unique(calib.label)}
    assert not isinstance(calibration.clusters, Skipped)
    assert len(calibration.clusters) == 3  # one for 8 points
    counted = np.zeros(6, int)
    for cluster in calibration.clusters:
        for step, count in cluster.steps.items():
            counted[step] += count
    assert tuple(counted) == calibration.by_step
    assert [cluster.middle for cluster in calibration.clusters] == sorted(
        cluster.middle for cluster in calibration.clusters
    )


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    assert "<script" not in page
    assert not re.search(r"\bon\w+=", page)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert not re.search(r"https?:|@import|url\(", page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in unescape(page)


def test_the_page_shows_every_part(page: str, cached: Report) -> None:
    titles = re.findall(r"<svg[^>]*><title>([^<]*)", page)
    assert titles[:6] == [
        "Program",
        "Latency of each step",
        "Error of the samples",
        "Drift of the variance, channel 0",
        "Drift of the variance, channel 1",
        "Drift of the variance, channel 2",
    ]
    assert {"Compensation", "Calibration points of each step", "Clusters of the calibration set"} <= set(titles)
    assert page.count("<img") == page.count('alt="') == 9
    assert page.count("<table") == page.count("<caption") == page.count("<thead")
    for entry in cached.manifest.files.values():
        assert entry.sha256 in page
    assert "6 DDIM steps with guidance 1.5, of which 3 compute all 4 branches and 3 reuse what those left" in page


def test_sizes_of_segments_are_those_of_their_files(bundles: dict[str, Bundle], cached: Report) -> None:
    folder = bundles["cached"].path / "segments"
    every = {name: segment_bytes(cached.manifest, name) for name in ("condition", "full", "reuse")}
    for name, (portable, forms) in every.items():
        sizes = {path.name: path.stat().st_size for path in folder.glob(f"{name}.*")}
        assert portable == sizes[f"{name}.onnx"] + sizes.get(f"{name}.onnx.data", 0) > 0
        assert portable + forms == sum(sizes.values())


def test_a_name_with_markup_in_it_stays_a_name(cached: Report) -> None:
    named = cached.manifest.model.model_copy(update={"name": "<script>alert(1)</script> & co"})
    manifest = cached.manifest.model_copy(update={"model": named})
    text = page_from_report(cached.model_copy(update={"manifest": manifest, "bundle": 'a"<b>'}), "<i>.json")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text
    assert "<b>" not in text.replace("<figcaption><b>", "")
    assert "<i>.json" not in text


def test_a_bundle_without_quantization_or_reuse_says_so(bundles: dict[str, Bundle]) -> None:
    report = report_bundle(bundles["fp32-none"].path, QUICK)
    assert report.activations == Skipped(skipped="fp32 quantizes no activation, so none has a range to keep to")
    assert report.calibration == Skipped(skipped="fp32 calibrates nothing")
    assert isinstance(report.drift, Drift)
    assert report.drift.bundle.relative_error == (0,) * 6  # it is its own FP program
    text = page_from_report(report, "x.json")
    assert "of which 6 compute all 4 branches; everything in float32" in text
    assert "quantizes no activation" in text


def test_steps_in_floating_point_are_drawn_as_such(bundles: dict[str, Bundle]) -> None:
    text = page_from_report(report_bundle(bundles["float-ends"].path, QUICK), "x.json")
    assert "3 compute all 4 branches, 2 of them in floating point" in text
    assert "engine, computed in floating point" in text
    cells = re.findall(r'<path d="([^"]*)" class="float"', text)
    assert [path.count("M") for path in cells] == [2 * 4]


def test_a_bundle_for_another_target_says_what_could_not_be_measured(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = bundles["cached"]
    path = resealed(bundle, tmp_path / "b", settings=changed_settings(bundle.manifest, target="cuda"))
    report = report_bundle(path, QUICK)
    assert isinstance(report.speed, Skipped)
    assert "the bundle is for cuda, which does not run here (" in report.speed.skipped
    assert report.place == "cpu, compiled for cuda"
    assert isinstance(report.drift, Drift)  # its portable segments run here
    text = page_from_report(report, "x.json")
    assert "Not timed: the bundle is for cuda" in text
    assert "Latency of each step" not in text
    assert "median ms" not in text
    with pytest.raises(InputError, match="--fail-if-slower needs latencies, and the bundle is for cuda"):
        report_bundle(path, QUICK.model_copy(update={"against": ("torch-f32",), "fail_if_slower": 1.0}))


def test_without_the_reference_there_are_images_and_nothing_to_compare_with(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    shutil.copytree(bundles["cached"].path, tmp_path / "b", ignore=shutil.ignore_patterns("reference", "calib"))
    report = report_bundle(tmp_path / "b", QUICK.model_copy(update={"against": None}))
    assert isinstance(report.pictures, Pictures)
    assert report.pictures.pictures[0].exact is None
    assert all(
        isinstance(part, Skipped) for part in (report.fidelity, report.drift, report.activations, report.calibration)
    )
    assert isinstance(report.speed, Speed)
    text = page_from_report(report, "x.json")
    assert "Nothing to compare with: the bundle has no FP program" in text
    assert "measured at the compile over 4 latents" in text


def test_latents_without_a_decoder_have_curves_and_no_images(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "PIXEL_CHANNELS", (1,))
    report = report_bundle(bundles["cached"].path, QUICK)
    assert isinstance(report.pictures, Skipped)
    assert isinstance(report.fidelity, Fidelity)
    assert report.fidelity.of == "latents"
    assert "compile it with --vae FOLDER" in page_from_report(report, "x.json")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy sees it coming
def test_samples_that_are_not_finite_are_a_failed_check(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["cached"]
    largest = 1e38  # of a float32, which twice of is infinite
    k = np.full_like(bundle.tables()["compensation.k"], largest)
    checks = bundle.manifest.checks | {"compensation": {"k_mean": largest, "k_min": largest, "k_max": largest}}
    path = resealed(bundle, tmp_path / "b", tables={"compensation.k": k}, checks=checks)
    with pytest.raises(CheckError, match="NaN or infinite"):
        report_bundle(path, QUICK)


def test_the_command_writes_a_page_and_its_numbers_beside_the_bundle(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine"
    shutil.copytree(bundles["fp32-cached"].path, path)
    assert run(f"report {path} {QUICK_LINE} --json".split()) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "mine-report.json").read_text()) == printed
    assert (tmp_path / "mine-report.html").read_text().startswith("<!doctype html>\n<html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "mine-report.html", "mine-report.json"]
    open_bundle(path)
    monkeypatch.chdir(path)
    assert default_page(Path()) == tmp_path / "mine-report.html"


def test_a_page_is_written_before_a_gate_shuts(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    line = f"report {bundles['cached'].path} -o {page} {QUICK_LINE} --evaluate-images 8 --evaluate-seeds 0"
    assert run(f"{line} --fail-if-worse=-1000".split()) == 1
    assert "the Frechet distance is worse than FP's by" in capsys.readouterr().err
    assert "Against real images: features pixels" in page.read_text()


def test_the_gates_are_those_of_evaluate_and_bench(cached: Report) -> None:
    gated = ReportOptions(against=("onnxruntime-f32",), fail_if_slower=1e6)
    with pytest.raises(CheckError, match=r"of onnxruntime-f32 takes .* expected at least 1e\+06x"):
        check_report(cached, gated)
    check_report(cached, gated.model_copy(update={"fail_if_slower": 1e-6}))
    difference = Distribution.model_construct(frechet_distance=Estimate(value=0.5, low=0.1, high=0.9))
    evaluation = Evaluation.model_construct(distribution=Distributions.model_construct(difference=difference))
    evaluated = cached.model_copy(update={"evaluation": evaluation})
    with pytest.raises(CheckError, match=r"interval 0\.1 to 0\.9, all above 0\.05"):
        check_report(evaluated, ReportOptions(fail_if_worse=0.05))
    check_report(evaluated, ReportOptions(fail_if_worse=0.2))


@pytest.mark.parametrize("row", [str, lambda name: [name], lambda name: {name}, lambda name: iter([name])])
@pytest.mark.parametrize("kind", [BenchOptions, ReportOptions])
def test_peers_may_be_one_name_or_any_row_of_names(kind: Any, row: Any) -> None:
    assert kind(against=row("torch-f32")).against == ("torch-f32",)


def test_no_peer_may_be_a_lone_name() -> None:
    assert ReportOptions(against="none").against == ()


@pytest.mark.parametrize("kind", [BenchOptions, ReportOptions])
@pytest.mark.parametrize(
    ("given", "message"), [(3, "a row of values, found 3"), ([1], "one of: torch-f32, .*; found 1")]
)
def test_peers_that_are_no_names_are_refused_in_one_line(kind: Any, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^--against must be {message}$"):
        kind(against=given)


def test_a_gate_asks_for_what_it_needs() -> None:
    assert ReportOptions().evaluation is None
    gated = ReportOptions(fail_if_worse=0.1).evaluation
    assert gated is not None
    assert (gated.images, gated.seeds) == (1000, (0, 1, 2))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--images 0", "--images must be at least 1"),
        ("--seed -1", "--seed must be at least 0, found -1"),
        ("--requests 0", "--requests must be at least 1"),
        ("--against fastest", "unknown peer 'fastest'"),
        ("--fail-if-slower 1", "--fail-if-slower is about peers; name some with --against"),
        ("--fail-if-worse nan", "--fail-if-worse must be a finite number"),
        ("--evaluate-images 2", "--evaluate-images must be at least 4, found 2"),
        ("--evaluate-images 8 --evaluate-seeds 1,1", "--evaluate-seeds must be different numbers"),
        ("--evaluate-seeds a", "--evaluate-seeds must be whole numbers"),
        ("-o {bundle}/r.html", "lies inside the bundle, which is sealed"),
        ("-o {bad}/r.pdf", "--out must end in .html"),
        ("--target warp", "unknown --target 'warp'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    more: str, message: str, bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles["cached"].path
    command = f"report {bundle} --json -o {tmp_path}/r.html {more.format(bundle=bundle, bad=tmp_path)}"
    assert run(command.split()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


def test_every_binding_of_scales_has_words() -> None:
    assert set(SCALES_IN_WORDS) == set(names_of(ScaleBinding))
