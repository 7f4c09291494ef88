"""Golden files: what people and engines see, as text that is reviewed like code.

`GOLDEN=write pytest tests/golden` writes them anew; the difference is then part of the change. They hold nothing that a
processor decides: where a measured number stands, the text says so.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from graph_text import graph_text

from ditc.bundle import Bundle
from ditc.cli.main import cli, run
from ditc.engines.backend import lowered_path

EXPECTED = Path(__file__).parent / "expected"
FORMS = ("portable", "onnxrt", "trt")
# of a listing: what is measured, and what follows from it
MEASURED = (
    (r"PSNR [-\d.]+ dB", "PSNR <measured> dB"),
    (r"K [-\d.]+ to [-\d.]+, mean [-\d.]+", "K <measured>"),
    (r"[\d.]+ MB", "<size> MB"),
    (r" +<size>", " <size>"),
    (r"\b[0-9a-f]{16}\b", "<digest>"),
    (r"^(  versions  +).*$", r"\1<versions>"),
)


def check_golden(name: str, text: str) -> None:
    """Hold a text to its file; where it isn't, both are shown side by side."""
    file = EXPECTED / name
    if os.environ.get("GOLDEN") == "write":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert text.splitlines() == file.read_text().splitlines(), (
        f"{file}: if it is meant, GOLDEN=write pytest tests/golden"
    )


def without_measured(text: str) -> str:
    for pattern, shown in MEASURED:
        text = re.sub(pattern, shown, text, flags=re.MULTILINE)
    return text


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_of_full(form: str, bundles: dict[str, Bundle]) -> None:
    segment = bundles["cached"].segment_path("full")
    check_golden(f"full.{form}.txt", graph_text(segment if form == "portable" else lowered_path(segment, form)))


@pytest.mark.parametrize("name", ["cached", "float-ends"])
def test_what_inspect_shows(name: str, bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundles[name].path)]) == 0
    shown = capsys.readouterr().out.replace(str(bundles[name].path), "BUNDLE")
    check_golden(f"inspect-{name}.txt", without_measured(shown))


@pytest.mark.parametrize("name", ["cached", "per-step", "float-ends", "fp32-taylor", "fp32-branches"])
def test_the_program(name: str, bundles: dict[str, Bundle]) -> None:
    check_golden(f"program-{name}.json", bundles[name].manifest.program.model_dump_json(indent=1))


@pytest.mark.parametrize("name", ["ditc", *sorted(cli.commands)])
def test_the_help_of_every_command(name: str) -> None:
    arguments = ["--help"] if name == "ditc" else [name, "--help"]
    shown = CliRunner(env={"COLUMNS": "100"}).invoke(cli, arguments, prog_name="ditc")
    check_golden(f"help/{name}.txt", shown.output)


def test_there_is_no_golden_file_of_a_command_that_is_gone() -> None:
    assert {file.stem for file in (EXPECTED / "help").iterdir()} == {"ditc", *cli.commands}
