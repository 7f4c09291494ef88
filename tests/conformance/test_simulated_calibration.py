"""The INT8 calibrators of TensorRT 10: subclasses of the real classes, driven through their whole protocol."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt
from tensorrt.interface import MAGIC  # type: ignore[import-not-found]

import ditc
from ditc.cli.main import run
from ditc.engines.calibrator import make_calibrator, scales_from_cache
from ditc.errors import DitcError, InputError

HAS_CALIBRATORS = hasattr(tensorrt, "IInt8EntropyCalibrator2")
with_calibrators = pytest.mark.skipif(not HAS_CALIBRATORS, reason="TensorRT 11 has no calibrators")
without_calibrators = pytest.mark.skipif(HAS_CALIBRATORS, reason="TensorRT 10 has calibrators")


class Tensor:
    def __init__(self, pointer: int) -> None:
        self.pointer = pointer


def caches(bundle: Path) -> list[Path]:
    return sorted((bundle / "engines").glob("calibration-*.cache"))


@without_calibrators
@pytest.mark.parametrize("method", ["entropy", "minmax"])
def test_tensorrt_11_names_the_explicit_form(method: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(bundle), "--calibration", method]) == 2
    line = capsys.readouterr().err
    assert f"TensorRT {tensorrt.__version__} has no INT8 calibrators" in line
    assert "leave --calibration out: the explicit Q/DQ form holds the scales already" in line
    assert not (bundle / "engines").exists()


@with_calibrators
@pytest.mark.parametrize(
    ("method", "base"), [("entropy", "IInt8EntropyCalibrator2"), ("minmax", "IInt8MinMaxCalibrator")]
)
def test_a_calibrator_goes_through_the_protocol(method: str, base: str, tmp_path: Path) -> None:
    cache = tmp_path / "scales.cache"
    batches = iter([{"x": Tensor(256), "y": Tensor(512)}, {"y": Tensor(1024), "x": Tensor(768)}])
    calibrator = make_calibrator(tensorrt, method, batches, cache)
    assert isinstance(calibrator, getattr(tensorrt, base))
    assert calibrator.get_algorithm() in tensorrt.CalibrationAlgoType.__members__.values()
    assert calibrator.get_batch_size() == 1
    assert calibrator.read_calibration_cache() is None
    assert calibrator.get_batch(["x", "y"]) == [256, 512]
    assert calibrator.get_batch(["x", "y"]) == [768, 1024]
    assert calibrator.get_batch(["x", "y"]) is None
    calibrator.write_calibration_cache(memoryview(b"TRT-100300-EntropyCalibration2\nx: 3c010a14\n"))
    assert calibrator.read_calibration_cache() == cache.read_bytes()
    assert scales_from_cache(cache.read_bytes())["x"] == pytest.approx(1 / 127, rel=1e-3)
    assert calibrator.failure is None


@with_calibrators
def test_a_failure_while_feeding_is_kept_and_no_cache_is_written(tmp_path: Path) -> None:
    def broken() -> Any:
        yield {"x": Tensor(256)}
        raise DitcError("the device went away")

    calibrator = make_calibrator(tensorrt, "entropy", broken(), tmp_path / "cache")
    assert calibrator.get_batch(["x"]) == [256]
    assert calibrator.get_batch(["x"]) is None
    calibrator.write_calibration_cache(b"TRT-\n")
    assert "the device went away" in str(calibrator.failure)
    assert not (tmp_path / "cache").exists()
    calibrator = make_calibrator(tensorrt, "entropy", iter([{"x": Tensor(256)}]), tmp_path / "cache")
    assert calibrator.get_batch(["other"]) is None
    assert "asks for input 'other'" in str(calibrator.failure)


@with_calibrators
def test_a_calibrated_bundle_builds_runs_and_its_scales_can_be_compared(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(bundle), "--calibration", "minmax"]) == 0
    with ditc.load(bundle, target="tensorrt") as gpu, ditc.load(bundle, reference=True) as exact:
        samples, expected = gpu.latents([0, 3, 4], seed=3), exact.latents([0, 3, 4], seed=3)
    assert np.linalg.norm(samples - expected) / np.linalg.norm(expected) < 0.2  # the cache's error; INT8 is not played
    capsys.readouterr()
    assert run(["inspect", str(bundle), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["calibrations"]
    assert row["layers"] == 8
    # largest magnitudes on the same points: what the bundle's own `max` ranges are, within FP32
    assert all(ratio == pytest.approx(1, rel=1e-3) for ratio in row["ratios"].values())
    assert run(["inspect", str(bundle)]) == 0
    assert "scale over the bundle's own, 8 linear layers" in capsys.readouterr().out


@with_calibrators
@pytest.mark.any_version
@pytest.mark.parametrize("name", ["text", "pixart"])
def test_a_calibrator_is_fed_a_point_s_own_texts_and_tables(
    name: str, unbuilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(unbuilt / name, tmp_path / name))
    assert run(["build", str(bundle), "--calibration", "minmax"]) == 0
    capsys.readouterr()
    assert run(["inspect", str(bundle), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["calibrations"]
    assert all(ratio == pytest.approx(1, rel=1e-3) for ratio in row["ratios"].values())


@with_calibrators
@pytest.mark.any_version
def test_the_cache_is_taken_up_by_the_next_build_and_belongs_to_its_method(bundle: Path) -> None:
    assert run(["build", str(bundle), "--calibration", "entropy"]) == 0
    (first,) = caches(bundle)
    before = first.stat().st_mtime_ns
    for plan in (bundle / "engines").glob("full-*.plan"):
        plan.unlink()
    assert run(["build", str(bundle), "--calibration", "entropy"]) == 0
    assert caches(bundle) == [first]
    assert first.stat().st_mtime_ns == before
    assert run(["build", str(bundle), "--calibration", "minmax"]) == 0
    assert len(caches(bundle)) == 2


@with_calibrators
@pytest.mark.any_version
def test_explicit_and_calibrated_engines_are_not_mixed(bundle: Path) -> None:
    assert run(["build", str(bundle), "--calibration", "minmax"]) == 0
    assert run(["build", str(bundle)]) == 0
    for plan in (bundle / "engines").glob("reuse-*.plan"):
        plan.unlink()
    with pytest.raises(InputError, match="no engine of segment reuse"), ditc.load(bundle, target="tensorrt"):
        pass


@with_calibrators
@pytest.mark.any_version
def test_a_bundle_without_its_reference_cannot_be_calibrated(capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Path(os.environ["DITC_BUNDLES"]) / "fp16"
    assert run(["build", str(bundle), "--calibration", "entropy"]) == 2
    assert "has no FP reference of segment full" in capsys.readouterr().err


@with_calibrators
@pytest.mark.any_version
def test_any_failure_while_feeding_writes_no_cache(tmp_path: Path) -> None:
    def broken() -> Any:
        yield {"x": Tensor(256)}
        raise ValueError("a shape that does not fit")

    calibrator = make_calibrator(tensorrt, "entropy", broken(), tmp_path / "cache")
    calibrator.get_batch(["x"])
    assert calibrator.get_batch(["x"]) is None
    calibrator.write_calibration_cache(b"TRT-\n")
    assert isinstance(calibrator.failure, ValueError)
    assert not (tmp_path / "cache").exists()


@with_calibrators
@pytest.mark.any_version
def test_only_the_segments_that_are_calibrated_lose_precision(unbuilt: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(unbuilt / "float-ends", tmp_path / "float-ends"))
    assert run(["build", str(bundle), "--calibration", "entropy"]) == 0
    assert [path.name.split("-")[1] for path in caches(bundle)] == ["full"]
    flags = {}
    for plan in (bundle / "engines").glob("*.plan"):
        data = plan.read_bytes()[len(MAGIC) :]
        size = int.from_bytes(data[:4], "little")
        flags[plan.name.split("-")[0]] = json.loads(data[4 : 4 + size])["flags"]
    assert flags.pop("full") == ["FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"]
    assert set(map(tuple, flags.values())) == {()}
    assert "float" in flags


def test_a_damaged_cache_is_one_line() -> None:
    with pytest.raises(InputError, match="damaged at 'x: zz'"):
        scales_from_cache(b"TRT-100300-EntropyCalibration2\nx: zz\n")


def test_what_is_no_calibration_cache_is_refused() -> None:
    with pytest.raises(InputError, match="no calibration cache of TensorRT"):
        scales_from_cache(b"scales")


@with_calibrators
@pytest.mark.any_version
def test_polygraphys_calibrator_takes_up_our_cache(bundle: Path) -> None:
    """The cache is TensorRT's own format, so a build through Polygraphy finds the same scales."""
    from polygraphy.backend.trt import Calibrator

    assert run(["build", str(bundle), "--calibration", "entropy"]) == 0
    (cache,) = caches(bundle)
    calibrator = Calibrator(data_loader=[], cache=str(cache))
    assert isinstance(calibrator, tensorrt.IInt8EntropyCalibrator2)
    assert bytes(calibrator.read_calibration_cache()) == cache.read_bytes()
