"""Every command that opens a bundle or writes beside one, where names are no UTF-8 and files are links.

The table has a row for each such command, and a new one without a row fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import click
import numpy as np
import pytest

from ditc.bundle import Bundle
from ditc.cli.main import cli, run
from ditc.runtime.pipeline import load

ODD = os.fsdecode(b"caf\xe9 'a' \"b\"\n c")  # no UTF-8, quotes, spaces, two lines
# what a command is given beside the bundle; OUT is an odd folder
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": (),
    "run": ("--labels", "1,2", "-o", "OUT/run"),
    "verify": ("--images", "1"),
    "bench": ("--requests", "1", "--trace", "OUT/trace", "--against", "onnxruntime-f32", "--roofline"),
    "build": ("--dry-run", "--engines", "OUT/engines"),
    "report": ("--images", "1", "--requests", "1", "-o", "OUT/page.html"),
    "evaluate": ("--images", "4", "--seeds", "0", "--features", "pixels", "--real", "fp", "--save", "OUT/evaluated"),
    "bisect": ("--points", "2"),
    "estimate": (),
    "doctor": (),
    "export-polygraphy": ("-o", "OUT/polygraphy"),
}
SLOW = ("evaluate",)
UNABLE = {"build": "ditc: TensorRT's builder can be given names in UTF-8 only, found b'"}
WRITES = {
    "run": "run/grid.png",
    "bench": "trace/layers_full.json",
    "report": "page.json",
    "evaluate": "evaluated",
    "export-polygraphy": "polygraphy/README.md",
}


def with_links(bundle: Path, place: Path, *, scattered: bool) -> Path:
    """A copy of which every file is a link: to blobs in one folder, as a hub's cache has them, or one in each."""
    place.mkdir(parents=True)
    snapshot, blobs = place / "snapshot", place / "blobs"
    for file in [path for path in bundle.rglob("*") if path.is_file()]:
        name = sha256(file.read_bytes()).hexdigest()
        link, blob = snapshot / file.relative_to(bundle), blobs / name / "blob" if scattered else blobs / name
        for folder in (link.parent, blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "bundle").symlink_to("snapshot")
    return place / "bundle"


@pytest.fixture(scope="module", params=[False, True], ids=["hub", "scattered"])
def bundle(
    request: pytest.FixtureRequest, bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("odd") / ODD
    return with_links(bundles["cached"].path, place, scattered=request.param)


def test_every_command_that_takes_a_bundle_has_a_row() -> None:
    taking = {name for name, command in cli.commands.items() if "bundle" in {p.name for p in arguments_of(command)}}
    assert taking == set(COMMANDS)


def arguments_of(command: click.Command) -> list[click.Parameter]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Argument)]


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS]
)
def test_a_command_works_on_links_in_a_folder_of_any_name_or_says_why_not(
    bundle: Path, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / ODD
    out.mkdir()
    code = run([command, str(bundle), *(word.replace("OUT", str(out)) for word in COMMANDS[command])])
    said = capfd.readouterr().err
    if command in UNABLE:
        assert (code, said.count("\n")) == (2, 1)
        assert said.startswith(UNABLE[command])
    else:
        assert code == 0, said
        assert command not in WRITES or (out / WRITES[command]).exists()


def test_a_bundle_of_links_gives_the_images_of_its_files(bundle: Path, bundles: dict[str, Bundle]) -> None:
    with load(bundle) as linked, load(bundles["cached"].path) as plain:
        np.testing.assert_array_equal(linked.images([0, 3], seed=5), plain.images([0, 3], seed=5))


@pytest.mark.slow
def test_a_bundle_is_compiled_into_a_folder_of_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, few = tmp_path / ODD / "bundle", "--points 8 --pool 24 --vc-images 2 --verify-images 2 --steps 3".split()
    assert run(["compile", "digits", *few, "-o", str(out), "--exports", str(tmp_path / ODD / "exports"), "--json"]) == 0
    assert run(["compile", "digits", "-o", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "bundle exists already" in error
    assert error.isprintable()


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "utf-8:strict"}, {"LC_ALL": "C.UTF-8"}]
)
def test_names_are_printed_in_every_locale(bundle: Path, locale: dict[str, str]) -> None:
    command = [sys.executable, "-m", "ditc.cli", "inspect", str(bundle)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **locale}, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
