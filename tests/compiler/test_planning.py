"""Planning: what is taken for the settings that are left to ditc, and what it depends on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import make_plan
from ditc.exporter.dit import DiT
from ditc.passes import NoSumsError

DEFAULTS = CompileOptions(steps=12)
BRANCHES = 4  # of the small model


@pytest.mark.parametrize(
    ("changes", "reuse"),
    [
        ({}, "taylor"),
        ({"policy": "fora:5"}, "taylor"),  # 4 skips in a row, one sum for each
        ({"policy": "fora:6"}, "hold"),  # 5: more than branches, so their outputs are kept
        ({"policy": "window:2:3:3"}, "taylor"),  # from the last step to the next: a weight of 1
        ({"policy": "window:3:4:2"}, "taylor"),  # from two neighbours: a weight of 2
        ({"caches": "sums"}, "taylor"),
        ({"caches": "branches"}, "hold"),
        ({"policy": "none"}, "hold"),
        ({"sampler": "ddpm"}, "taylor"),
        ({"sampler": "ddpm", "policy": "fora:4"}, "taylor"),
        ({"sampler": "ddpm", "policy": "fora:5"}, "hold"),  # fresh noise, and 4 in a row
        ({"eta": 0.2, "policy": "fora:5"}, "hold"),
        ({"sampler": "ddpm", "policy": "fora:5", "reuse": "taylor"}, "taylor"),
        ({"reuse": "affine"}, "affine"),
    ],
)
def test_a_reuse_is_extrapolated_where_sums_are_made_and_under_noise_few_follow_each_other(
    make_small_model: Callable[[], DiT], changes: dict[str, str], reuse: str
) -> None:
    plan = make_plan(make_small_model(), DEFAULTS.model_copy(update=changes))
    assert (plan.options.reuse, plan.program.reuse) == (reuse, reuse)


@pytest.mark.parametrize(
    ("rows", "named", "reuse"),
    [
        ([[True] * BRANCHES, [False] * BRANCHES] * 6, None, "taylor"),
        ([[True] * BRANCHES, [False] * BRANCHES] * 6, "hold", "hold"),
        ([[True] * BRANCHES, [False] * BRANCHES] * 6, "variance", "variance"),
        ([[True] * BRANCHES, [False, True] * (BRANCHES // 2)] * 6, None, "hold"),
    ],
)
def test_a_schedules_file_has_its_say(
    tmp_path: Path, make_small_model: Callable[[], DiT], rows: list[list[bool]], named: str | None, reuse: str
) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"compute": rows} | ({} if named is None else {"reuse": named})))
    plan = make_plan(make_small_model(), DEFAULTS.model_copy(update={"policy": str(path)}))
    assert plan.options.reuse == reuse


def test_branches_that_do_more_than_add_are_held(
    make_small_model: Callable[[], DiT], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_small_model()
    branch = type(model.branches[0])
    monkeypatch.setattr(branch, "merge", lambda self, h, out, parts: 0.5 * h + out)
    assert make_plan(model, DEFAULTS).options.reuse == "hold"


@pytest.mark.parametrize(("precision", "smooth"), [("w8a8", "smooth"), ("w4a8", "smooth"), ("fp32", "none")])
def test_what_becomes_int8_is_smoothed(make_small_model: Callable[[], DiT], precision: str, smooth: str) -> None:
    plan = make_plan(make_small_model(), DEFAULTS.model_copy(update={"precision": precision}))
    assert plan.options.smooth == smooth


@pytest.mark.parametrize(
    ("changes", "vc"),
    [
        ({}, "none"),  # extrapolated
        ({"reuse": "hold"}, "std"),
        ({"reuse": "affine"}, "none"),
        ({"reuse": "hold", "eta": 0.5}, "none"),
        ({"reuse": "hold", "precision": "fp32"}, "std"),
        ({"caches": "branches"}, "std"),
        ({"sampler": "ddpm", "policy": "fora:5"}, "none"),  # holds, but there is noise
        ({"policy": "none"}, "none"),
        ({"vc": "lsq"}, "lsq"),
    ],
)
def test_what_holds_without_noise_is_compensated(
    make_small_model: Callable[[], DiT], changes: dict[str, str], vc: str
) -> None:
    assert make_plan(make_small_model(), DEFAULTS.model_copy(update=changes)).options.vc == vc


@pytest.mark.parametrize("changes", [{"caches": "sums"}, {"reuse": "taylor"}])
def test_sums_that_a_schedule_does_not_allow_are_an_error_of_their_own(
    make_small_model: Callable[[], DiT], changes: dict[str, str]
) -> None:
    with pytest.raises(NoSumsError):
        make_plan(make_small_model(), DEFAULTS.model_copy(update={"policy": "fora:6", **changes}))


def test_what_was_asked_for_is_not_decided_again(make_small_model: Callable[[], DiT]) -> None:
    plan = make_plan(make_small_model(), DEFAULTS.model_copy(update={"reuse": "hold", "smooth": "balance"}))
    assert (plan.options.reuse, plan.options.smooth) == ("hold", "balance")


@pytest.mark.parametrize(
    ("clip", "sampler", "advised"), [(1.0, "euler", True), (None, "euler", False), (1.0, None, False)]
)
def test_a_sampler_that_cannot_clip_says_so_where_the_models_own_does(
    clip: float | None, sampler: str | None, advised: bool, make_small_model: Callable[..., Any]
) -> None:
    model = make_small_model()
    model.sampler = model.sampler.model_copy(update={"clip": clip})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_plan(model, DEFAULTS.model_copy(update={"sampler": sampler}))
    assert any("clips nothing" in str(warning.message) for warning in caught) is advised
