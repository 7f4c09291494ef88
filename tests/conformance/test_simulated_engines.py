"""Engines that a simulated GPU takes, and those that it must not: of other GPUs, networks, bytes or versions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from second_request import LABELS, latents

from ditc.cli.main import run
from ditc.engines.store import EngineStore, embedded_host_code
from ditc.errors import InputError


def test_an_engine_of_another_gpu_is_not_loaded(built: Any, play: Any) -> None:
    play(compute_capability=[9, 0])
    with pytest.raises(InputError, match=r"is for SM 8\.7, this machine has 9\.0; build it here with"):
        latents(built["small"], "tensorrt")


@pytest.mark.any_version
def test_an_engine_of_another_network_is_not_loaded(built: Any, bundle: Path) -> None:
    shutil.copytree(built["learned-noise"] / "engines", bundle / "engines")
    shutil.copytree(built["odd-addresses"] / "engines", bundle / "engines", dirs_exist_ok=True)
    for record in (bundle / "engines").glob("condition-*"):
        record.unlink()
    shutil.copy(next((built["small"] / "engines").glob("condition-*.plan")), bundle / "engines")
    shutil.copy(next((built["small"] / "engines").glob("condition-*.json")), bundle / "engines")
    with pytest.raises(InputError, match=r"the engine of segment full in .* is for another network"):
        latents(bundle, "tensorrt")


@pytest.mark.any_version
def test_a_plan_with_a_changed_byte_never_reaches_tensorrt(
    built: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built["small"] / "engines", bundle / "engines")
    plan = next((bundle / "engines").glob("condition-*.plan"))
    data = bytearray(plan.read_bytes())
    data[-1] ^= 1
    plan.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"is damaged: it does not match the hash"):
        latents(bundle, "tensorrt")


@pytest.mark.any_version
def test_a_plan_with_host_code_never_reaches_tensorrt(built: Any, bundle: Path) -> None:
    shutil.copytree(built["small"] / "engines", bundle / "engines")
    store = EngineStore(bundle / "engines")
    record = next(record for record in store.records() if record.key.segment == "condition")
    library = Path(np.__file__).parent / "_core"
    code = next(path for path in library.glob("*.so")).read_bytes()
    plan = store.plan_path(record.key).read_bytes() + code
    store.put(type(record).of(record.key, plan, device_memory_bytes=1, build_seconds=1), plan)
    assert embedded_host_code(plan) in ("x86-64", "AArch64")
    with pytest.raises(InputError, match=r"carries .* code .a plugin or a runtime., which ditc never runs"):
        latents(bundle, "tensorrt")


@pytest.mark.any_version
def test_gpu_code_is_not_host_code() -> None:
    cubin = b"\x7fELF\x02\x01" + bytes(12) + (190).to_bytes(2, "little") + bytes(40)
    assert embedded_host_code(b"plan" + cubin) is None
    assert embedded_host_code(b"plan" + cubin[:12]) is None


@pytest.mark.any_version
def test_version_compatible_engines_are_for_other_programs(bundle: Path) -> None:
    assert run(["build", str(bundle), "--version-compatible"]) == 0
    with pytest.raises(InputError, match="for the lean runtime of a later TensorRT"):
        latents(bundle, "tensorrt")


@pytest.mark.any_version
def test_a_deployment_may_leave_reference_and_calibration_behind(built: Any, bundle: Path) -> None:
    shutil.copytree(built["small"] / "engines", bundle / "engines")
    shutil.rmtree(bundle / "reference")
    shutil.rmtree(bundle / "calib")
    assert len(latents(bundle, "tensorrt")) == len(LABELS)
    assert run(["build", str(bundle), "--calibration", "entropy"]) == 2


@pytest.mark.any_version
def test_a_store_shared_with_calibrated_engines_of_another_bundle(bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert run(["build", str(bundle), "--calibration", "minmax", "--engines", str(store)]) == 0
    with pytest.raises(InputError, match=r"the engine of segment condition in .* is built with minmax calibration"):
        latents(Path(os.environ["DITC_BUNDLES"]) / "fp16", "tensorrt", engines=store)


@pytest.mark.any_version
def test_a_renamed_record_is_not_taken(built: Any, bundle: Path) -> None:
    shutil.copytree(built["small"] / "engines", bundle / "engines")
    record = next((bundle / "engines").glob("full-*.json"))
    record.rename(record.with_name("full-0000000000000000.json"))
    with pytest.raises(InputError, match="no engine of segment full"):
        latents(bundle, "tensorrt")


@pytest.mark.any_version
def test_hardware_compatible_engines_run_on_a_later_gpu(bundle: Path, play: Any) -> None:
    assert run(["build", str(bundle), "--hardware-compatible"]) == 0
    store = EngineStore(bundle / "engines")
    record = next(store.records())
    other = record.key.platform.model_copy(update={"compute_capability": "9.0", "gpu": "Another GPU"})
    older = record.key.platform.model_copy(update={"compute_capability": "7.5", "gpu": "Another GPU"})
    assert record.key.serves(record.key.model_copy(update={"platform": other}))
    assert not record.key.serves(record.key.model_copy(update={"platform": older}))


def test_an_engine_that_tensorrt_refuses_is_one_line(built: Any, play: Any) -> None:
    play(fault="refuse")
    with pytest.raises(InputError, match=r"does not take the engine of segment condition: Magic tag does not match"):
        latents(built["small"], "tensorrt")
