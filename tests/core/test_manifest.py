"""A manifest keeps what its compile said, and is read through views that know no more than they need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ditc.bundle import Bundle, open_bundle
from ditc.cli.main import run
from ditc.errors import BundleError
from ditc.files import sha256_of
from ditc.runtime.pipeline import load
from ditc.spec import PartialRecord

LATER = ("scales", "midpoint", "smooth", "reuse", "caches", "float_steps")  # settings that the first bundles lack


@pytest.fixture
def folder(bundles: Mapping[str, Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["cached"].path, tmp_path / "b"))


def rewritten(folder: Path, **parts: Any) -> Any:
    """Seal a bundle with another manifest, as another version would have written it; returns that manifest."""
    manifest = json.loads((folder / "manifest.json").read_bytes()) | parts
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.sha256").write_text(sha256_of(folder / "manifest.json") + "\n")
    return manifest


@pytest.mark.parametrize("name", ["cached", "per-step", "float-ends", "fp32-affine"])
def test_the_views_read_all_that_a_compile_measured(name: str, bundles: Mapping[str, Bundle]) -> None:
    manifest = bundles[name].manifest
    assert manifest.measured().model_dump(mode="json", exclude_unset=True) == manifest.checks
    asked = manifest.asked.model_dump(exclude={"sampler"}, exclude_unset=True)
    assert asked == {setting: manifest.settings[setting] for setting in asked}
    assert {"target", "scales", "policy", "points"} <= set(asked)


def test_a_bundle_of_another_version_opens_and_is_shown_as_it_was_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = open_bundle(folder).manifest
    settings = {name: value for name, value in written.settings.items() if name not in LATER} | {"dropped": [1]}
    checks = {name: check for name, check in written.checks.items() if name != "footprints"}
    checks |= {"pool": {**dict(checks["pool"]), "age": 3}, "dropped": "text"}  # type: ignore[arg-type]
    manifest = rewritten(folder, settings=settings, checks=checks)
    opened = open_bundle(folder).manifest
    assert opened.model_dump(mode="json") == manifest
    assert (opened.target, opened.scales, opened.asked.smooth) == ("cpu", "static", None)
    pool = opened.measured().pool
    assert pool is not None
    assert pool.points == open_bundle(folder).manifest.checks["pool"]["points"]  # type: ignore[index,call-overload]
    assert run(["inspect", str(folder)]) == 0
    assert "  dropped          [1]" in capsys.readouterr().out
    with load(folder) as pipe:
        assert pipe.latents([1]).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("target", None, r"\(Value error, target is null"),
        ("target", 5, "target: Input should be a valid string"),
        ("scales", ["static"], "scales: Input should be a valid string"),
        ("points", "many", "points: Input should be a valid integer"),
        ("sampler", "ddim", "sampler: Input should be"),
    ],
)
def test_a_setting_that_is_read_and_has_no_meaning_is_refused_in_one_line(
    setting: str, value: Any, message: str, folder: Path
) -> None:
    rewritten(folder, settings=open_bundle(folder).manifest.settings | {setting: value})
    with pytest.raises(BundleError, match=f"is damaged at settings .*{message}") as refused:
        open_bundle(folder)
    assert "\n" not in str(refused.value)


def test_an_unknown_target_is_refused_where_it_would_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(folder, settings=open_bundle(folder).manifest.settings | {"target": "tpu"})
    assert run(["verify", str(folder)]) == 2
    assert "unknown target 'tpu'; choose one of" in capsys.readouterr().err


def test_checks_of_another_form_hinder_only_who_shows_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(folder, checks=open_bundle(folder).manifest.checks | {"kernels": {"full": {"linears": "all"}}})
    opened = open_bundle(folder).manifest
    assert opened.measured("verify").verify is not None
    assert opened.measured("verify").kernels is None
    with load(folder) as pipe:
        pipe.latents([1])
    assert run(["inspect", str(folder)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"{folder}: the `checks` in its manifest are not those of a compile (kernels.full.linears: " in printed


class Parts(PartialRecord):
    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"asked"})

    always: int | None = None
    asked: int | None = None


def test_only_parts_that_may_be_left_out_are_no_null_as_json() -> None:
    assert Parts().model_dump(mode="json") == {"always": None}
    assert Parts(asked=1).model_dump(mode="json") == {"always": None, "asked": 1}
    assert Parts.model_validate_json(Parts().model_dump_json()) == Parts()
