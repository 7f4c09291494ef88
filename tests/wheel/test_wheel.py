"""The wheel as a deployment gets it: installed with [cpu] alone it runs a bundle, and gives the same images.

`make test-wheel` runs it, and CI after the other tests: it asks the package registry for what a user's pip asks for.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ditc.folders import FOLDERS

ROOT = Path(__file__).parents[2]
COMPILE_ONLY = ("torch", "onnx", "onnx_ir", "onnxscript", "sklearn", "scipy", "diffusers")
# where the sources of a folder lie in the wheel
PLACES = {"core": "ditc"} | {name: f"ditc/{name}" for name in FOLDERS}
# a training's record, which no code reads
NOT_SHIPPED = {f"{name}.training.json" for name in ("digits", "digit_classifier", "emoji", "emoji_classifier")}
QUICK = "--steps 10 --points 40 --pool 20 --vc-images 4 --verify-images 2"

pytestmark = [pytest.mark.wheel, pytest.mark.slow, pytest.mark.timeout(1200)]


def output_of(*command: str | Path, cwd: Path) -> str:
    """Return what a command prints. Where it fails, all that it said is in the error."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of the tree, from a copy: what an earlier build left would go into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PLACES:
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    pip = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps"]
    output_of(*pip, "--wheel-dir", folder, folder / "tree", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def deployed(wheel: Path) -> Path:
    """The `bin` of a fresh environment with the wheel and what [cpu] asks for."""
    place = wheel.parent / "environment"
    output_of(sys.executable, "-m", "venv", place, cwd=wheel.parent)
    pip = [place / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check"]
    output_of(*pip, "--constraint", ROOT / "constraints.txt", f"{wheel}[cpu]", cwd=wheel.parent)
    return place / "bin"


@pytest.fixture(scope="module")
def bundle(wheel: Path) -> Path:
    """The reference model, compiled where the compiler is."""
    path = wheel.parent / "bundle"
    here(wheel.parent, "compile", "digits", "-o", path, *QUICK.split())
    return path


def here(cwd: Path, *arguments: str | Path) -> str:
    """Run a command of the tree under test."""
    return output_of(sys.executable, "-m", "ditc.cli", *arguments, cwd=cwd)


def test_the_wheel_holds_every_file_of_the_folders(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    files = {
        f"{place}/{path.relative_to(ROOT / name).as_posix()}"
        for name, place in PLACES.items()
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name not in NOT_SHIPPED
    }
    assert held == files


def test_nothing_that_only_compiling_needs_is_installed(deployed: Path, tmp_path: Path) -> None:
    code = f"import importlib.util as u; print([name for name in {COMPILE_ONLY} if u.find_spec(name)])"
    assert output_of(deployed / "python", "-c", code, cwd=tmp_path) == "[]\n"


def test_a_bundle_gives_the_images_of_where_it_was_compiled_bit_for_bit(
    deployed: Path, bundle: Path, tmp_path: Path
) -> None:
    request = ("run", bundle, "--labels", "3,1,4,1,5", "--seed", "2")
    output_of(deployed / "ditc", *request, "-o", tmp_path / "there", cwd=tmp_path)
    here(tmp_path, *request, "-o", tmp_path / "here")
    there, expected = ({path.name: path.read_bytes() for path in (tmp_path / p).iterdir()} for p in ("there", "here"))
    assert len(expected) >= 5
    assert there == expected


def test_inspect_says_the_same(deployed: Path, bundle: Path, tmp_path: Path) -> None:
    said = output_of(deployed / "ditc", "inspect", bundle, "--json", cwd=tmp_path)
    assert json.loads(said) == json.loads(here(tmp_path, "inspect", bundle, "--json"))


@pytest.mark.parametrize(
    "command", ["verify BUNDLE --images 2", "report BUNDLE --images 1 --requests 1 -o r.html", "doctor"]
)
def test_the_other_commands_of_a_deployment_run(command: str, deployed: Path, bundle: Path, tmp_path: Path) -> None:
    words = [str(bundle) if word == "BUNDLE" else word for word in command.split()]
    assert output_of(deployed / "ditc", *words, cwd=tmp_path)


def test_compiling_there_says_what_to_install(deployed: Path, tmp_path: Path) -> None:
    command = [str(deployed / "ditc"), "compile", "digits", "-o", "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'ditc[export]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "b").exists()
