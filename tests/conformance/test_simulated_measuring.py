"""`ditc bench --trace`, `bisect`, `evaluate` and `report` on the simulated TensorRT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditc.cli.main import run


def test_a_trace_has_the_files_of_tensorrts_own_tools(
    built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "trace"
    bundle = built["small"]
    capsys.readouterr()
    command = f"bench {bundle} --target tensorrt --requests 2 --warmup 0 --trace {folder} --json"
    assert run(command.split()) == 0
    assert {path.name for path in folder.iterdir()} >= {f"{k}_full.json" for k in ("layers", "profile")}
    layers = json.loads((folder / "layers_full.json").read_text())
    count, *rows = json.loads((folder / "profile_full.json").read_text())
    assert count == {"count": 3}  # `full` runs at three of the six steps
    assert {row["name"] for row in rows} == {layer["Name"] for layer in layers["Layers"]}
    assert sum(row["percentage"] for row in rows) == pytest.approx(100)
    assert set(json.loads(capsys.readouterr().out)["segments"]) == {"condition", "full", "reuse"}


@pytest.mark.any_version
@pytest.mark.parametrize("option", ["--against onnxruntime-f32", "--roofline"])
def test_what_is_measured_on_the_processor_is_refused_on_a_gpu(
    option: str, built: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = built["small"]
    capsys.readouterr()
    assert run(f"bench {bundle} --target tensorrt {option}".split()) == 2
    assert "measure there too: --target cpu" in capsys.readouterr().err


@pytest.mark.any_version
@pytest.mark.parametrize("name", ["small", "per-step"])
def test_bisect_builds_an_engine_of_every_variant(name: str, built: Any, capsys: pytest.CaptureFixture[str]) -> None:
    results, bundle = {}, built[name]
    for target in ("cpu", "tensorrt"):
        capsys.readouterr()
        command = f"bisect {bundle} --target {target} --by block --points 2 --json"
        assert run(command.split()) == 0
        results[target] = json.loads(capsys.readouterr().out)
    assert results["tensorrt"]["backend"] == "trt"
    errors = [{tuple(g["layers"]): g["error"] for g in results[target]["groups"]} for target in ("tensorrt", "cpu")]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert results["tensorrt"]["together"] == pytest.approx(results["cpu"]["together"], rel=0.1)


@pytest.mark.any_version
def test_evaluate_measures_whole_requests_on_the_device_with_and_without_compensation(
    built: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 images in requests of 4: the last one is filled up, and every image is the CPU's."""
    bundle, results = built["small"], {}
    for target in ("cpu", "tensorrt"):
        capsys.readouterr()
        command = f"evaluate {bundle} --target {target} --images 10 --seeds 0 --rounds 5 --step-images 5 --json"
        assert run(command.split()) == 0
        results[target] = json.loads(capsys.readouterr().out)
    assert results["tensorrt"]["paired"]["psnr_db"]["mean"] == pytest.approx(
        results["cpu"]["paired"]["psnr_db"]["mean"], rel=0.1
    )
    for side in ("bundle", "uncompensated"):
        drifts = [results[target]["steps"][side]["relative_error"][-1] for target in ("cpu", "tensorrt")]
        assert drifts[1] == pytest.approx(drifts[0], rel=0.1)
    assert results["tensorrt"]["steps"]["bundle"] != results["tensorrt"]["steps"]["uncompensated"]
    assert run(f"evaluate {bundle} --target tensorrt --images 10 --batch 5".split()) == 2
    assert "these engines run 4 images at a time, found --batch 5; leave it out" in capsys.readouterr().err


@pytest.mark.any_version
def test_a_report_times_and_shows_what_the_device_does(
    built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, results = built["small"], {}
    for target in ("cpu", "tensorrt"):
        capsys.readouterr()
        command = f"report {bundle} --target {target} --images 5 --requests 1 -o {tmp_path / 'r.html'} --json"
        assert run(command.split()) == 0
        results[target] = json.loads(capsys.readouterr().out)
    device = results["tensorrt"]
    assert device["place"] == "tensorrt, compiled for cpu"
    assert [step["segment"] for step in device["speed"]["steps"]] == ["full", "reuse"] * 3
    assert device["speed"]["against"] == {}  # the usual peer runs on the processor
    assert len(device["pictures"]["pictures"]) == 5
    errors = [results[target]["drift"]["bundle"]["relative_error"][-1] for target in ("cpu", "tensorrt")]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert device["drift"]["bundle"] != device["drift"]["uncompensated"]
