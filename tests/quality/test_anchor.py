"""The anchor of a search: one set of FP images for all candidates, whatever their samplers and steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.bundle import Bundle
from ditc.compiler.options import CompileOptions
from ditc.errors import InputError
from ditc.progress import silent
from ditc.quality import candidates
from ditc.quality.anchor import Anchor, Held
from ditc.quality.candidates import Candidates, Subject
from ditc.quality.evaluating import evaluate_bundle
from ditc.quality.options import EvaluateOptions, TuneOptions
from ditc.quality.trials import Changes, Trial
from ditc.spec import Skipped

OPTIONS = EvaluateOptions(images=24, seeds=(0,), rounds=20, step_images=1)
OTHER_NOISE = OPTIONS.model_copy(update={"seeds": (3,)})


@pytest.fixture
def fewer(
    compiled_once: Callable[..., Bundle], make_small_model: Callable[..., Any], quick_options: CompileOptions
) -> Bundle:
    """The small model in FP with half of the steps that the shared bundles have."""
    changes = {"policy": "none", "precision": "fp32", "vc": "none", "steps": 3}
    return compiled_once(make_small_model(), quick_options.model_copy(update=changes))


@pytest.fixture
def anchor(bundles: dict[str, Bundle], tmp_path: Path) -> Anchor:
    return Anchor(lambda: bundles["fp32-none"], tmp_path, silent)


def distances(held: Held) -> tuple[float, ...]:
    distance, recall = held.difference.frechet_distance, held.difference.recall
    return distance.value, distance.low, distance.high, recall.value


def test_the_anchor_held_against_itself_shows_no_difference(anchor: Anchor, bundles: dict[str, Bundle]) -> None:
    held = anchor.held(bundles["fp32-none"], OPTIONS, exact=True)
    assert distances(held) == (0, 0, 0, 0)
    assert held.psnr_low > 200


@pytest.mark.parametrize("exact", [True, False])
def test_fewer_steps_are_not_judged_by_their_own_images(anchor: Anchor, fewer: Bundle, exact: bool) -> None:
    own = evaluate_bundle(fewer.path, OPTIONS).distribution
    assert not isinstance(own, Skipped)
    assert own.difference.frechet_distance.value == pytest.approx(0, abs=1e-6)
    assert abs(anchor.held(fewer, OPTIONS, exact=exact).difference.frechet_distance.value) > 1e-3


def test_another_sampler_is_not_judged_by_its_own_images(anchor: Anchor, bundles: dict[str, Bundle]) -> None:
    assert abs(anchor.held(bundles["memory-none"], OPTIONS, exact=True).difference.frechet_distance.value) > 1e-4


def test_no_candidate_moves_the_anchor(anchor: Anchor, bundles: dict[str, Bundle], fewer: Bundle) -> None:
    before = anchor.distribution(OPTIONS)
    first = distances(anchor.held(bundles["fp32-cached"], OPTIONS, exact=False))
    for other in (fewer, bundles["memory-none"]):
        anchor.held(other, OPTIONS, exact=True)
    assert anchor.distribution(OPTIONS) == before
    assert distances(anchor.held(bundles["fp32-cached"], OPTIONS, exact=False)) == first


def test_a_candidate_of_the_bases_sampler_and_steps_is_held_to_what_evaluate_says(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = bundles["cached"]
    held = Anchor(lambda: bundle, tmp_path, silent).held(bundle, OPTIONS, exact=False)
    evaluation = evaluate_bundle(bundle.path, OPTIONS)
    assert not isinstance(evaluation.distribution, Skipped)
    expected = evaluation.distribution.difference
    for name, estimate in held.difference.measures.items():
        np.testing.assert_allclose([*dict(estimate).values()], [*dict(expected.measures[name]).values()], atol=1e-5)
    assert held.psnr_db == evaluation.measured_pairs["psnr_db"].mean


def test_real_images_that_fp_makes_are_the_anchors(anchor: Anchor, fewer: Bundle, tmp_path: Path) -> None:
    """This model has no real images known: FP's of other noise stand for them, and fewer steps make others."""
    held = anchor.held(fewer, OPTIONS, exact=True)
    own = Anchor(lambda: fewer, tmp_path / "own", silent)
    assert distances(own.held(fewer, OPTIONS, exact=True))[0] == 0
    assert distances(held)[0] != 0
    assert len({path.name for path in tmp_path.glob("fp-*/seed0-24-to-47.npy")}) == 1
    assert len([*tmp_path.glob("fp-*/seed0-24-to-47.npy")]) == 1  # of the anchor alone


def test_other_noise_has_an_anchor_of_its_own(anchor: Anchor, bundles: dict[str, Bundle]) -> None:
    assert anchor.distribution(OPTIONS) != anchor.distribution(OTHER_NOISE)
    assert distances(anchor.held(bundles["fp32-none"], OTHER_NOISE, exact=True)) == (0, 0, 0, 0)


def test_the_anchor_is_opened_once_and_only_where_it_is_asked_for(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    opened: list[Bundle] = []

    def open_() -> Bundle:
        opened.append(bundles["fp32-none"])
        return opened[-1]

    anchor = Anchor(open_, tmp_path, silent)
    assert not opened
    for _ in range(2):
        anchor.held(bundles["fp32-cached"], OPTIONS, exact=False)
    assert len(opened) == 1


def test_images_without_features_are_refused_with_what_to_do(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    anchor = Anchor(lambda: bundles["fp32-none"], tmp_path, silent)
    with pytest.raises(InputError, match="features 'digits' take images of shape"):
        anchor.distribution(OPTIONS.model_copy(update={"features": "digits"}))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Changes]:
    """The candidates that were measured, rather than taken from an earlier search."""
    measured: list[Changes] = []

    def trial_of(_: Any, stage: str, changes: Changes, *__: Any) -> Trial:
        measured.append(changes)
        numbers = dict.fromkeys(("seconds", "psnr_db", "psnr_low", "worse_by", "worse_high"), float(len(measured)))
        return Trial(stage=stage, changes=changes, size_bytes=1, within=True, **numbers)

    monkeypatch.setattr(candidates, "trial_of", trial_of)
    monkeypatch.setattr(candidates, "compile_model", lambda *_, **__: None)
    return measured


def searching(work: Path, base: CompileOptions, **changes: Any) -> Candidates:
    options = TuneOptions(worse_by=100.0).model_copy(update=changes)
    return Candidates(Subject("a.pt", None, None, None, None, True, None, (), None), base, options, work, silent)


def test_a_trial_is_taken_up_by_the_same_search_only_where_the_anchor_is_the_same(
    counted: list[Changes], tmp_path: Path
) -> None:
    changes: Changes = {"policy": "none", "steps": 10, "sampler": "unipc"}
    first = searching(tmp_path, CompileOptions()).trial("solver", changes)
    assert searching(tmp_path, CompileOptions()).trial("solver", changes) == first
    assert len(counted) == 1
    same_candidate = CompileOptions(steps=20)
    assert searching(tmp_path, same_candidate).trial("solver", changes) != first
    assert len(counted) == 2
    assert searching(tmp_path, CompileOptions(sampler="ddpm")).trial("solver", changes) != first
    assert len(counted) == 3


def test_other_lists_of_what_is_tried_and_another_budget_take_up_the_trials_that_are_there(
    counted: list[Changes], tmp_path: Path
) -> None:
    changes: Changes = {"policy": "fora:2"}
    first = searching(tmp_path, CompileOptions(), intervals=(2,)).trial("schedule", changes)
    others = {"intervals": (2, 3), "step_counts": (20,), "samplers": ("unipc",)}
    again = searching(tmp_path, CompileOptions(), **others, worse_by=0.1)
    assert again.trial("window", changes) == first.model_copy(update={"stage": "window", "within": False})
    assert first.within  # its distance, 1, is 100 at most, and not 0.1
    assert len(counted) == 1
    searching(tmp_path, CompileOptions(), images=100).trial("schedule", changes)
    searching(tmp_path, CompileOptions(), seeds=(1,)).trial("schedule", changes)
    assert len(counted) == 3


def test_other_noise_is_measured_anew(counted: list[Changes], tmp_path: Path) -> None:
    search = searching(tmp_path, CompileOptions(), seeds=(4, 1))
    trial = search.trial("schedule", {"policy": "fora:2"})
    confirmed = search.confirmed(trial)
    assert search.options.fresh_seeds == (5, 6)
    assert (confirmed.stage, confirmed.changes) == ("confirm", trial.changes)
    assert len(counted) == 2
    assert searching(tmp_path, CompileOptions(), seeds=(4, 1)).confirmed(trial) == confirmed
