"""A refactoring gives the same bundles: two commits compile the same models on this machine, and all is compared.

    python tests/replay/replay.py OLD [NEW] [--work out/replay]

Programs, settings and graphs have to be equal as text, every other file of a bundle and the images bit for bit. NEW is
the working tree where it isn't named. A bundle of OLD is also opened by NEW, and has to give the same images. Exits
with 1 where anything differs, naming it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from difflib import unified_diff
from io import BytesIO
from pathlib import Path
from runpy import run_path
from typing import Any

import click
import numpy as np
import tomllib

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "golden")]

from bundles import LABELS, MODELS, SEED  # noqa: E402
from graph_text import graph_text  # noqa: E402

TREE = "the working tree"
SAME_OF = ("program", "reference_program", "model", "settings", "precision", "guidance", "batch")
OPENED = """
import sys, numpy as np, ditc
with ditc.load(sys.argv[1]) as pipe:
    np.save(sys.argv[2], pipe.images({labels}, seed={seed}))
"""
MOST_LINES = 20  # of a difference that are shown


def sources(commit: str, folder: Path) -> Path:
    """Return the files of a commit."""
    if commit == TREE:
        return ROOT
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def package(source: Path, folder: Path) -> Path:
    """Make a folder to import `ditc` from, laid out as pyproject.toml says it is installed."""
    places = _places(source)
    for name in sorted(places, key=lambda name: name.count(".")):
        target = folder.joinpath(*name.split("."))
        if "." in name:
            target.symlink_to(source / places[name])
        else:
            target.mkdir(parents=True)
            for path in (source / places[name]).iterdir():
                (target / path.name).symlink_to(path)
    return folder


def _places(source: Path) -> dict[str, str]:
    """Return the folder of each package."""
    folders = source / "core" / "folders.py"
    if not folders.exists():  # older commits have them in pyproject.toml
        return dict(tomllib.loads((source / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"])
    return {"ditc": "core"} | {f"ditc.{name}": name for name in run_path(str(folders))["FOLDERS"]}


def python(packages: Path, *command: object) -> None:
    """Run an interpreter that imports this `ditc`, and no other one."""
    environment = os.environ | {"PYTHONPATH": str(packages)}
    subprocess.run([sys.executable, *map(str, command)], check=True, env=environment, cwd=packages)


def built_side(side: str, commit: str, work: Path, names: list[str]) -> Path:
    """Make the folder of a side's package and bundles."""
    folder = work / side
    packages = package(sources(commit, folder / "sources"), folder / "packages")
    python(packages, HERE / "bundles.py", folder / "bundles", *names)
    return folder


def differences(old: Path, new: Path) -> Iterator[str]:
    """Yield each thing in which two bundles differ."""
    sides = [json.loads((bundle / "manifest.json").read_text()) for bundle in (old, new)]
    for part in SAME_OF:
        texts = [json.dumps(_without_place(side[part]), indent=1).splitlines() for side in sides]
        yield from _text_difference(part, *texts)
    before, after = (side["files"] for side in sides)
    for name in sorted(before.keys() ^ after.keys()):
        yield f"{name}: {'gone' if name in before else 'new'}"
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            texts = (
                [graph_text(side / name).splitlines() for side in (old, new)] if name.endswith(".onnx") else [[], []]
            )
            told = list(_text_difference(name, *texts))
            yield from told or [f"{name}: other numbers"]


def _without_place(value: Any) -> Any:
    """Return settings without the path of a schedule's file."""
    if isinstance(value, dict) and str(value.get("policy", "")).endswith(".json"):
        return {**value, "policy": "SCHEDULE"}
    return value


def _text_difference(name: str, old: list[str], new: list[str]) -> Iterator[str]:
    lines = list(unified_diff(old, new, "old", "new", lineterm="", n=1))
    if lines:
        yield f"{name}:\n    " + "\n    ".join(lines[:MOST_LINES])


def image_differences(old: Path, new: Path, work: Path, name: str) -> Iterator[str]:
    """Compare images of each side's own bundle, and of the old bundle in the new runtime."""
    python(
        new / "packages", "-c", OPENED.format(labels=LABELS, seed=SEED), old / "bundles" / name, work / f"{name}.npy"
    )
    exact = np.load(old / "bundles" / f"{name}.npy")
    for subject, file in (
        ("images", new / "bundles" / f"{name}.npy"),
        ("images of the old bundle", work / f"{name}.npy"),
    ):
        images = np.load(file)
        if not np.array_equal(images, exact):
            yield f"{subject}: differ by up to {np.abs(images - exact).max():.2g}"


@click.command()
@click.argument("old")
@click.argument("new", default=TREE)
@click.option("--only", "names", multiple=True, type=click.Choice(list(MODELS)), help="Models; default all.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/replay"), show_default=True)
def main(old: str, new: str, names: tuple[str, ...], work: Path) -> None:
    """Compile the same models with the commits OLD and NEW, and compare what comes out."""
    work, chosen = work.resolve(), list(names or MODELS)
    shutil.rmtree(work, ignore_errors=True)
    before, after = (built_side(side, commit, work, chosen) for side, commit in (("old", old), ("new", new)))
    failed = False
    for name in chosen:
        bundles = [side / "bundles" / name for side in (before, after)]
        lines = [*differences(*bundles), *image_differences(before, after, work, name)]
        failed = failed or bool(lines)
        click.echo(f"{'differs' if lines else 'equal  '}  {name}")
        for line in lines:
            click.echo(f"  {line}")
    if failed:
        raise click.ClickException(f"{old} and {new} give other bundles; both lie in {work}")


if __name__ == "__main__":
    main()
