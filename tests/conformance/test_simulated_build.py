"""`ditc build`, with TensorRT played on top of its real bindings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tensorrt
from tensorrt.building import Config  # type: ignore[import-not-found]
from tensorrt.interface import MAGIC, Played  # type: ignore[import-not-found]
from tensorrt.running import Engine  # type: ignore[import-not-found]

from ditc.cli.main import run
from ditc.engines.store import BuildSettings
from ditc.engines.trt_builder import build_engine
from ditc.errors import InputError

VERSION = os.environ["DITC_REAL_BINDINGS"]
LONG_ENOUGH = 300  # seconds for what takes one, on a machine with much else to do
HAS_CALIBRATORS = hasattr(tensorrt, "IInt8EntropyCalibrator2")


def header_of(plan: Path) -> dict[str, Any]:
    """Return the settings that the simulated builder was given."""
    data = plan.read_bytes()[len(MAGIC) :]
    size = int.from_bytes(data[:4], "little")
    return dict(json.loads(data[4 : 4 + size]))


def plans(bundle: Path) -> dict[str, Path]:
    return {path.name.split("-")[0]: path for path in (bundle / "engines").glob("*.plan")}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ditc: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_bindings_are_the_real_ones_of_this_version() -> None:
    assert tensorrt.__version__ == VERSION
    assert tensorrt.ILogger.__module__.startswith("tensorrt_bindings")


def test_a_played_class_refuses_what_the_real_one_does_not_have() -> None:
    config = Config()
    with pytest.raises(AttributeError):
        config.set_memory_pool_limits(tensorrt.MemoryPoolType.WORKSPACE, 1)
    with pytest.raises(AssertionError):
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE)
    with pytest.raises(AttributeError):
        config.builder_optimisation_level = 3
    if not HAS_CALIBRATORS:
        with pytest.raises(AttributeError):
            config.int8_calibrator = None


def test_every_method_played_exists_in_the_real_class() -> None:
    for played in Played.__subclasses__():
        own = [name for name in vars(played) if not name.startswith("_") and name != "REAL"]
        gone = [name for name in own if not hasattr(played.REAL, name)]
        removed = ["set_calibration_profile"] if not HAS_CALIBRATORS else []
        assert [name for name in gone if name not in removed] == []
    assert Engine in Played.__subclasses__()


def test_a_build_makes_every_segment_strongly_typed_without_precision_flags(built: Any) -> None:
    built_plans = plans(built["small"])
    assert set(built_plans) == {"condition", "full", "reuse", "update"}
    for plan in built_plans.values():
        header = header_of(plan)
        assert header["strongly_typed"]
        assert header["flags"] == []
        assert header["workspace"] == 1 << 30


def test_every_setting_reaches_the_builder(bundle: Path) -> None:
    assert run([*f"build {bundle} --workspace 256".split(), "--version-compatible", "--hardware-compatible"]) == 0
    header = header_of(plans(bundle)["full"])
    assert header["workspace"] == 256 << 20
    assert header["flags"] == ["EXCLUDE_LEAN_RUNTIME", "VERSION_COMPATIBLE"]
    assert header["hardware_compatible"].endswith("AMPERE_PLUS")


@pytest.mark.any_version
def test_a_second_build_does_nothing(built: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (built["small"] / "engines").glob("*.plan")}
    capsys.readouterr()
    assert run(["build", str(built["small"]), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [engine["built"] for engine in printed["engines"]] == [False] * 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.any_version
def test_a_dry_run_prints_keys_and_memory_and_builds_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(bundle), "--dry-run", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["cache_key"].startswith("ditc-engines-")
    assert printed["memory"]["together"] == sum(v for k, v in printed["memory"].items() if k != "together")
    assert printed["memory"]["weights of full"] > 0
    assert not (bundle / "engines").exists()
    assert run(["build", str(bundle)]) == 0
    capsys.readouterr()
    assert run(["build", str(bundle), "--dry-run", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["cache_key"] == printed["cache_key"]
    assert all(engine["present"] for engine in again["engines"])


@pytest.mark.any_version
def test_another_gpu_gets_other_keys(bundle: Path, play: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def key() -> str:
        capsys.readouterr()
        assert run(["build", str(bundle), "--dry-run", "--json"]) == 0
        return str(json.loads(capsys.readouterr().out)["cache_key"])

    first = key()
    play(compute_capability=[9, 0])
    assert key() != first
    play(gpu="Another GPU")
    assert key() != first


@pytest.mark.any_version
def test_engines_can_lie_elsewhere(bundle: Path, tmp_path: Path) -> None:
    assert run(["build", str(bundle), "--engines", str(tmp_path / "cache")]) == 0
    assert not (bundle / "engines").exists()
    assert len(list((tmp_path / "cache").glob("*.plan"))) == 4
    assert run([*f"run {bundle} --target tensorrt --labels 1 -o {tmp_path}/o --engines {tmp_path}/cache".split()]) == 0


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("parse", 2, "can't read full.trt.onnx: node 3: no importer registered for op: Hardmax"),
        ("null", 1, "could not build full.trt.onnx: could not find any implementation for node blocks.0.attn"),
        ("out-of-memory", 1, "OutOfMemory; free memory on the GPU, or lower --workspace (now 1024 MiB)"),
        ("kill", 1, "building segment full: the process was killed, likely for want of memory"),
        ("crash", 1, "building segment full: TensorRT crashed (SIGSEGV)"),
    ],
)
def test_a_build_that_fails_keeps_what_was_finished(
    fault: str, code: int, message: str, bundle: Path, play: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    play(fault=fault, segment="full")
    assert message in refused(capsys, "build", bundle, code=code)
    assert set(plans(bundle)) == {"condition"}
    assert sorted(path.suffix for path in (bundle / "engines").iterdir()) == ["", ".cache", ".json", ".plan"]
    play()
    assert run(["build", str(bundle), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [engine["built"] for engine in printed["engines"]] == [False, True, True, True]


@pytest.mark.any_version
def test_a_machine_without_tensorrt_says_so(bundle: Path, play: Any, capsys: pytest.CaptureFixture[str]) -> None:
    play(fault="no-library")
    assert "TensorRT can't be imported (libnvinfer.so" in refused(capsys, "build", bundle)


def test_a_machine_without_a_gpu_says_so(bundle: Path, play: Any, capsys: pytest.CaptureFixture[str]) -> None:
    play(gpu=None)
    assert "no GPU 0 to run on (CUDA_ERROR_NO_DEVICE" in refused(capsys, "build", bundle)


@pytest.mark.any_version
def test_a_profile_that_cannot_fit_is_refused_before_building(
    bundle: Path, play: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    play(memory_bytes=100_000)
    line = refused(capsys, "build", bundle)
    assert "batch 4 needs at least" in line
    assert "Simulated GPU has 0 MB" in line
    assert not (bundle / "engines").exists()


@pytest.mark.any_version
def test_a_workspace_that_cannot_fit_is_refused(bundle: Path, play: Any, capsys: pytest.CaptureFixture[str]) -> None:
    play(memory_bytes=2_000_000_000)
    assert "lower --workspace" in refused(capsys, "build", bundle, "--workspace", 2048)


def test_a_timing_cache_of_another_machine_is_refused(
    bundle: Path, tmp_path: Path, play: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "timings"
    assert run(["build", str(bundle), "--timing-cache", str(cache)]) == 0
    play(compute_capability=[9, 0])
    line = refused(capsys, "build", bundle, "--timing-cache", cache)
    assert f"timing cache {cache} was made on another GPU or by another TensorRT" in line


@pytest.mark.any_version
def test_a_damaged_timing_cache_is_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "timings").write_bytes(b"\0\1\2")
    assert "was made on another GPU" in refused(capsys, "build", bundle, "--timing-cache", tmp_path / "timings")


@pytest.mark.any_version
def test_the_stores_own_timing_cache_starts_anew_where_it_does_not_fit(bundle: Path) -> None:
    assert run(["build", str(bundle)]) == 0
    cache = next((bundle / "engines").glob("*.cache"))
    good = cache.read_bytes()
    cache.write_bytes(b"not a timing cache")
    plans(bundle)["full"].unlink()
    assert run(["build", str(bundle)]) == 0
    assert json.loads(cache.read_bytes())["platform"] == json.loads(good)["platform"]


def test_replay_builds_from_the_timing_cache_alone_and_leaves_it(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "timings"
    assert "does not exist" in refused(capsys, "build", bundle, "--replay", "--timing-cache", cache)
    assert "name one with --timing-cache" in refused(capsys, "build", bundle, "--replay")
    assert run(["build", str(bundle), "--timing-cache", str(cache), "--engines", str(tmp_path / "first")]) == 0
    content = json.loads(cache.read_bytes())
    whole = cache.read_bytes()
    assert run(["build", str(bundle), "--replay", "--timing-cache", str(cache)]) == 0
    assert cache.read_bytes() == whole
    assert header_of(plans(bundle)["full"])["flags"] == ["ERROR_ON_TIMING_CACHE_MISS"]
    cache.write_text(json.dumps({**content, "segments": ["condition"]}))
    line = refused(
        capsys, "build", bundle, "--replay", "--timing-cache", cache, "--engines", tmp_path / "third", code=1
    )
    assert "every tactic has to be in the timing cache" in line


@pytest.mark.any_version
def test_a_plan_whose_bytes_changed_is_built_again(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(bundle)]) == 0
    plan = plans(bundle)["reuse"]
    plan.write_bytes(plan.read_bytes() + b"\0")
    capsys.readouterr()
    assert run(["build", str(bundle), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {e["segment"] for e in printed["engines"] if e["built"]} == {"reuse"}


@pytest.mark.any_version
def test_a_tensorrt_in_the_current_folder_is_not_run(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise SystemExit('a planted module was run')")
    monkeypatch.chdir(tmp_path)
    assert run(["build", str(bundle), "--dry-run"]) == 0


@pytest.mark.any_version
def test_what_libraries_print_does_not_disturb_a_build(bundle: Path, play: Any) -> None:
    play(fault="noise")
    assert run(["build", str(bundle)]) == 0


@pytest.mark.any_version
def test_what_a_killed_build_left_is_removed(bundle: Path) -> None:
    (bundle / "engines" / ".building-left").mkdir(parents=True)
    assert run(["build", str(bundle)]) == 0
    assert not list((bundle / "engines").glob(".building-*"))


@pytest.mark.any_version
def test_two_builds_of_one_store_do_not_meet(bundle: Path, play: Any, capsys: pytest.CaptureFixture[str]) -> None:
    play(fault="hang", segment="condition")
    first = subprocess.Popen([sys.executable, "-m", "ditc.cli", "build", str(bundle)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list((bundle / "engines").glob(".building-*/request.json")))
        assert "another build is writing" in refused(capsys, "build", bundle)
    finally:
        first.send_signal(signal.SIGINT)
        assert ended(first) == 130
    assert [path.name for path in (bundle / "engines").iterdir()] == ["lock"]


@pytest.mark.any_version
def test_a_child_whose_parent_is_killed_stops_by_itself(bundle: Path, play: Any) -> None:
    play(fault="hang", segment="condition")
    parent = subprocess.Popen([sys.executable, "-m", "ditc.cli", "build", str(bundle)], stderr=subprocess.DEVNULL)
    wait_for(lambda: children_of(parent.pid))
    wait_for(lambda: list((bundle / "engines").glob(".building-*/request.json")))
    wait_for(lambda: children_of(parent.pid))
    child = children_of(parent.pid)[0]
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_running(child))
    assert not is_running(child)
    assert not list((bundle / "engines").glob("*.plan"))


def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process that is about to end; one that isn't is killed."""
    try:
        return process.wait(timeout=LONG_ENOUGH)
    finally:
        process.kill()
        process.wait()


def is_running(pid: int) -> bool:
    """Does a process exist, and not only as an entry that nobody has collected?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(part) for part in text.split()]


def wait_for(condition: Any, seconds: float = LONG_ENOUGH) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_an_open_dimension_without_a_size_is_named(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"is open along 'batch'"):
        build_engine(tensorrt, bundle / "segments" / "full.trt.onnx", {"steps": 50}, BuildSettings())


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dla", "0"], "does not run on a DLA"),
        (["--target", "cuda"], "--target cuda needs no build"),
        (["--target", "tpu"], "unknown --target 'tpu'"),
        (["--workspace", "0"], "--workspace must be at least 1, found 0; it is in MiB"),
        (["--optimization-level", "9"], "--optimization-level must be at least 0 and at most 5, found 9"),
        (["--calibration", "kl"], "unknown --calibration 'kl'; choose one of: entropy, explicit, minmax"),
    ],
)
def test_settings_that_make_no_sense_are_named(
    options: list[str], message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "build", bundle, *options)
