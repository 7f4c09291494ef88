"""Commands over a bundle that takes prompts: its examples are those of its own prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.exporter.shipped_prompts import shipped_prompts
from tests.models.captioned import captioned


@pytest.fixture(scope="session")
def bundle(compiled_once: Callable[..., Bundle], quick_options: CompileOptions) -> Bundle:
    return compiled_once(captioned(), quick_options.model_copy(update={"policy": "fora:2", "vc": "std"}))


@pytest.mark.parametrize(
    "command",
    [
        "inspect",
        "verify --images 2",
        "evaluate --images 4 --seeds 0 --rounds 5 --step-images 2",
        "bench --requests 1 --warmup 0 --roofline --against onnxruntime-f32",
        "bisect --points 1",
        "estimate --device orin-nx",
        "doctor",
        "export-polygraphy -o {out} --points 1",
    ],
)
def test_every_command_takes_a_bundle_of_prompts(
    command: str, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = command.format(out=tmp_path / "o").split()
    assert run([name, str(bundle.path), *rest, "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_pictures_of_a_report_stand_over_their_prompts(bundle: Bundle, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    assert run(["report", str(bundle.path), *"--images 4 --requests 1 --against none".split(), "-o", str(page)]) == 0
    pictures = json.loads(page.with_suffix(".json").read_text())["pictures"]["pictures"]
    assert [picture["prompt"] for picture in pictures] == list(shipped_prompts()[:4])
    text = page.read_text()
    assert "<span>three yellow pears on a blue plate</span>" in text
    assert "<span>the empty prompt</span>" in text


def test_inspect_tells_of_encoders_and_prompts(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundle.path)]) == 0
    told = capsys.readouterr().out
    assert "text clip        CLIPTextModelWithProjection, 0.01 M parameters, 10 tokens to pooled; activations" in told
    assert "prompts          120 of the shipped list, in prompts.txt" in told
    assert run(["inspect", str(bundle.path), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["prompts"] == {"source": "the shipped list", "count": 120}
    assert [encoder["name"] for encoder in written["text"]] == ["t5", "clip"]
