"""Golden files of what every command prints with --json: keys, order, nesting and types, which others' scripts read.

`GOLDEN=write pytest tests/golden` writes them anew; a difference is a change that somebody has to be told of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from json_shape import shape_text
from test_golden import EXPECTED, check_golden

import ditc.cli.building as building
import ditc.engines.building as engines
from ditc.bundle import Bundle
from ditc.cli.main import cli, run
from ditc.engines.building import BuiltSegment, PlannedBuild
from ditc.engines.store import EngineRecord, Platform
from ditc.engines.trt_worker import MachineDescription
from ditc.quality import demo, prompt_demo, search
from tests.conftest import EMOJI_EXACT

MODEL = """
import torch
from ditc.exporter.dit import DiT, DiTConfig

def make():
    torch.manual_seed(0)
    config = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=64, depth=2, num_heads=4, num_classes=5)
    return DiT(config, name="small").eval()
"""
QUICK = "--steps 4 --policy fora:2 --points 8 --pool 8 --ranges max --vc-images 2 --verify-images 1"
TUNED = "--least-psnr=-100 --images 4 --intervals 2 --precision fp32 --steps 4 --vc-images 2 --verify-images 1"
EVALUATED = "--images 4 --seeds 0,1 --rounds 2 --step-images 1"
PLATFORM = Platform(tensorrt="10.3", gpu="made up", compute_capability="8.7", system="linux", machine="aarch64")

# name of the golden file: what is typed, without --json
LINES: Mapping[str, str] = {
    "compile": f"compile own_small:make -o {{out}} {QUICK} --precision fp32",
    "run": "run {cached} --labels 0,1 -o {out}",
    "verify": "verify {cached} --images 1",
    "inspect": "inspect {cached}",
    "inspect-float-ends": "inspect {float-ends}",
    "evaluate": f"evaluate {{cached}} {EVALUATED} --veto 1",
    "evaluate-fp32": f"evaluate {{fp32-cached}} {EVALUATED}",
    "evaluate-digits": f"evaluate {{digits}} {EVALUATED}",
    "tune": f"tune own_small:make -o {{out}} {TUNED}",
    "bench": "bench {cached} --requests 1 --warmup 0",
    "bench-fp32": "bench {fp32-cached} --requests 1 --warmup 0",
    "bench-everything": "bench {cached} --requests 1 --warmup 0 --roofline --against onnxruntime-f32 --trace {out}",
    "bench-no-peer": "bench {cached} --requests 1 --warmup 0 --against torch-f32",
    "estimate": "estimate {cached} --device orin-nx",
    "bisect": "bisect {cached} --points 1",
    "report": "report {cached} --images 2 --requests 1 --evaluate-images 4 --evaluate-seeds 0 -o {out}.html",
    "report-no-peer": "report {fp32-cached} --images 2 --requests 1 --against none -o {out}.html",
    "export-polygraphy": "export-polygraphy {cached} -o {out} --points 1",
    "doctor": "doctor {cached}",
    "build": "build {cached} --engines {out}",
    "build-dry-run": "build {cached} --engines {out} --dry-run",
    "demo": f"demo -o {{out}} {QUICK}",
    "demo-emoji": "demo emoji -o {out} --steps 3 --policy none --precision fp32",
}


class Places(dict[str, str]):
    """Where bundles lie, by name, each compiled when it is first asked for; `out` is a place that is free."""

    def __init__(self, out: Path, bundles: Mapping[str, Bundle], compiled_once: Callable[..., Bundle]) -> None:
        super().__init__(out=str(out))
        self._bundles, self._compiled_once = bundles, compiled_once

    def __missing__(self, name: str) -> str:
        from ditc.compiler.options import CompileOptions

        if name == "digits":
            options = CompileOptions(policy="none", precision="fp32", vc="none", steps=4, verify_images=1)
            return str(self._compiled_once("digits", options).path)
        return str(self._bundles[name].path)


@pytest.fixture
def places(
    tmp_path: Path,
    bundles: Mapping[str, Bundle],
    compiled_once: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Places]:
    """Bundles and an output folder, with a module that makes the small model in the working directory."""
    (tmp_path / "own_small.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    yield Places(tmp_path / "out", bundles, compiled_once)
    sys.modules.pop("own_small", None)


@pytest.fixture(autouse=True)
def _few_images_and_candidates(
    monkeypatch: pytest.MonkeyPatch,
    compiled_once: Callable[..., Bundle],
    emoji_files: Path,  # of the model that comes with ditc
) -> None:
    monkeypatch.setattr(search, "CORRECTIONS", search.CORRECTIONS[:1])
    monkeypatch.setattr(demo, "QUALITY_IMAGES", 50)
    monkeypatch.setattr(demo, "TIMED_BATCHES", (1,))
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(prompt_demo, "ROUNDS", 1)
    monkeypatch.setattr(prompt_demo, "compile_model", lambda model, *_, **__: compiled_once(model, EMOJI_EXACT))


@pytest.fixture(autouse=True)
def _a_gpu_that_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with TensorRT that has built every engine of a plan."""

    def built(plan: PlannedBuild, _: object) -> list[BuiltSegment]:
        records = [EngineRecord.of(key, b"", device_memory_bytes=1, build_seconds=1.0) for key in plan.keys]
        return [BuiltSegment(key, record, True) for key, record in zip(plan.keys, records, strict=True)]

    machine = MachineDescription(platform=PLATFORM, free_bytes=1 << 40, total_bytes=1 << 40)
    monkeypatch.setattr(engines, "describe_machine", lambda *_: machine)
    monkeypatch.setattr(building, "build_engines", built)


@pytest.mark.parametrize("name", LINES)
def test_the_json_of_every_command(name: str, places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LINES[name].format_map(places).split(), "--json"]) == 0
    check_golden(f"json/{name}.json", shape_text(capsys.readouterr().out))


def test_every_command_has_a_golden_file_of_its_json() -> None:
    assert {line.split()[0] for line in LINES.values()} == {*cli.commands}
    assert {file.stem for file in (EXPECTED / "json").iterdir()} == {*LINES}
