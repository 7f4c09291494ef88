"""`ditc doctor` on machines that are not this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ditc.diagnosis import doctor
from ditc.diagnosis.doctor import jetpack
from ditc.engines import onnxrt
from ditc.engines.integer_form import Exactness


@pytest.mark.parametrize(
    ("release", "works", "words"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64", True, "JetPack 6.2"),
        ("# R36 (release), REVISION: 4.0, GCID: 1", True, "JetPack 6.1"),
        ("# R38 (release), REVISION: 2.0, GCID: 1", True, "JetPack 7"),
        ("# R36 (release), REVISION: 3.0, GCID: 1", False, "JetPack 6.0 with TensorRT 8.6; ditc needs TensorRT 10.3"),
        ("# R35 (release), REVISION: 4.1, GCID: 1", False, "JetPack 5 with TensorRT 8.5"),
        ("# R32 (release), REVISION: 7.1, GCID: 1", False, "an early JetPack"),
        ("something else", False, "release is not understood: 'something else'"),
    ],
)
def test_jetpack_is_read_from_its_release(release: str, works: bool, words: str, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").write_text(release + "\n")
    finding = jetpack(tmp_path)
    assert finding is not None
    assert finding.works == works
    assert words in finding.detail


def test_other_machines_have_no_jetpack(tmp_path: Path) -> None:
    assert jetpack(tmp_path) is None


@pytest.mark.parametrize(
    ("exactness", "works", "words"),
    [
        (Exactness(8), True, "INT8 exact as it is"),
        (Exactness(7, 8), True, "INT8 exact with unsigned weights, which is slower"),
        (Exactness(7), False, "INT8 refused, since it would not be exact"),
    ],
)
def test_what_the_probe_found_is_what_the_target_can(
    exactness: Exactness, works: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxrt, "onnxruntime_exactness", lambda: exactness)
    finding = doctor.onnxruntime_cpu()
    assert finding.works == works
    assert words in finding.detail


def test_a_deployment_is_probed_without_onnx() -> None:
    code = "import sys\nfor name in ('onnx', 'onnx_ir', 'torch'): sys.modules[name] = None\n"
    code += "from ditc.cli.main import run\nsys.exit(run(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "; INT8 exact" in done.stdout
