"""These tests need the real TensorRT bindings; `test_tensorrt_bindings.py` runs them once for each version."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

INSIDE = "DITC_REAL_BINDINGS" in os.environ  # in the process that has one version's bindings
collect_ignore_glob = [] if INSIDE else ["test_simulated_*.py"]

Play = Callable[..., None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Sets what the simulated GPU is and which fault it plays, here and in child processes."""

    def set_simulation(**settings: object) -> None:
        monkeypatch.setenv("DITC_SIMULATION", json.dumps(settings))

    return set_simulation


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the small bundle without engines."""
    return Path(shutil.copytree(Path(os.environ["DITC_BUNDLES"]) / "small", tmp_path / "small"))


@pytest.fixture
def unbuilt() -> Path:
    """The folder of the bundles as they were compiled; not to be changed."""
    return Path(os.environ["DITC_BUNDLES"])


class Built(dict[str, Path]):
    """Bundles with their engines, by name, each built when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        from ditc.cli.main import run

        bundle = Path(shutil.copytree(Path(os.environ["DITC_BUNDLES"]) / name, self.folder / name))
        assert run(["build", str(bundle)]) == 0
        self[name] = bundle
        return bundle


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("built"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Test with the first version only where nothing depends on TensorRT's."""
    if os.environ.get("DITC_REAL_BINDINGS") != "10.3.0":
        for item in items:
            if item.get_closest_marker("any_version"):
                item.add_marker(pytest.mark.skip(reason="does not depend on the version; runs with 10.3.0"))
