"""A stage that is kept from an earlier run was made with the same settings: all that it reads is in its key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ditc.compiler import driver
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from tests.conftest import BUNDLES, QUICK, small_model
from tests.other_settings import OTHERS, another

KINDS: dict[str, dict[str, Any]] = {
    "float-ends": BUNDLES["float-ends"],
    "corrected": {**BUNDLES["w4a8-corrected"], "rotate": 16, "smooth": "smooth", "vc": "std"},
    "gradients": {"policy": "fora:2", "ranges": "fisher", "scales": "time-groups", "select": "time-groups"},
    "closed": {"policy": "fora:2", "reuse": "learned:closed", "vc": "std", "precision": "fp32"},
    "uncached": {"policy": "none", "pool_steps": "all", "smooth": "none", "select": "tap-activations"},
}
HARMLESS = {
    # whether the pool is looked at on the way: what was seen there is held to the settings by who takes it
    *(("select", name) for name in ("midpoint", "precision", "ranges", "rotate", "scales", "smooth")),
    ("smooth", "midpoint"),  # lower bounds that a probe has, and smoothing doesn't take
}

Read = dict[str, set[str]]
Keys = dict[str, str]
Run = Callable[[dict[str, Any], Path, dict[str, Path] | None], tuple[Keys, dict[str, Path]]]


class Stop(Exception):
    """Ends a compile in front of the seal, with its stages left in their folder."""


class Watched(CompileOptions):
    """Settings that tell which of them are read while a stage runs."""

    def __getattribute__(self, name: str) -> Any:
        if name in CompileOptions.model_fields and READING:
            READS[READING[-1]].add(name)
        return super().__getattribute__(name)


READING: list[str] = []
READS: Read = defaultdict(set)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, exports: Path) -> Iterator[Run]:
    """Runs a compile up to its seal and returns its stages: their keys and their folders.

    Where it is handed folders of stages it takes these, up to the first stage that is not among them: what comes behind
    one more stage has another key.
    """
    real = driver._Compile.stage

    def run(settings: dict[str, Any], target: Path, there: dict[str, Path] | None) -> tuple[Keys, dict[str, Path]]:
        keys: Keys = {}
        folders: dict[str, Path] = {}

        def stage(self: Any, name: str, own: list[Any], make: Callable[[Path], None]) -> Path:
            def watched(folder: Path) -> None:
                READING.append(name)
                try:
                    make(folder)
                finally:
                    READING.pop()

            if there is None:
                folders[name] = real(self, name, own, watched)
            elif name in there:
                self.key, self.folders[name] = driver.digest_of([self.key, name, own]), there[name]
            else:
                raise Stop
            keys[name] = self.key
            return self.folders[name]

        monkeypatch.setattr(driver._Compile, "stage", stage)
        with pytest.raises(Stop):
            compile_model(small_model(), target, Watched(**{**QUICK.model_dump(), **settings}), exports=exports)
        return keys, folders

    def stop(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(driver, "seal", stop)
    READS.clear()
    yield run
    READS.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_is_made_again_when_a_setting_that_it_reads_changes(kind: str, tmp_path: Path, stages: Run) -> None:
    keys, folders = stages(KINDS[kind], tmp_path / "b", None)
    read = {name: set(fields) for name, fields in READS.items()}
    assert "verify_images" in read["verify"]
    stale = set()
    for field in sorted(set().union(*read.values())):
        other = another(CompileOptions(**{**QUICK.model_dump(), **KINDS[kind]}), field)
        if other is None:
            continue
        changed, _ = stages({**KINDS[kind], **other}, tmp_path / field, folders)
        readers = {name for name, fields in read.items() if field in fields and name in changed}
        stale |= {(name, field) for name in readers if changed[name] == keys[name]}
    assert stale - HARMLESS == set()


def test_every_setting_has_another_value() -> None:
    assert set(OTHERS) == set(CompileOptions.model_fields)
