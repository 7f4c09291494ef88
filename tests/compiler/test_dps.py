"""CacheQuant's schedule compiled: from the statistics to what runs, and what is refused before anything is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler import watching
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import plan_to_watch
from ditc.errors import InputError
from ditc.exporter.dit import DiT
from ditc.exporter.models import builtin_digits
from ditc.program import FULL
from ditc.step_groups import cheapest_starts, cost_of
from ditc.step_statistics import StepStatistics
from tests.compiler.test_smoothcache import rows_of


def test_on_the_reference_models_own_statistics_dps_costs_less_than_fora(tmp_path: Path) -> None:
    settings = CompileOptions(policy="dps:5", steps=20, watch_images=2)
    model = builtin_digits()
    planned = plan_to_watch(model, settings)
    assert planned is not None
    watching.watch(planned[0], model, planned[1], tmp_path)
    changes = StepStatistics.load(tmp_path / watching.STATISTICS).absolute_over_branches().tolist()
    for interval in (2, 3, 4, 5):
        starts = cheapest_starts(interval, changes)
        assert cost_of(starts, changes) < cost_of(list(range(0, 20, interval)), changes)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++2m"])
def test_a_bundle_computes_as_many_steps_as_foras_under_any_sampler(
    sampler: str,
    compiled_once: Callable[..., Bundle],
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = quick_options.model_copy(update={"policy": "dps:2", "sampler": sampler, "reuse": "auto", "vc": "auto"})
    bundle = compiled_once(make_small_model(), settings)
    rows = rows_of(bundle)
    assert len(set(rows)) == 1
    assert rows[0].count("#") == 3
    assert rows[0][0] == "#"
    assert bundle.manifest.program.segment(FULL).ahead  # sums are made ahead, as with fora
    assert run(["inspect", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert '  policy           "dps:2"' in shown
    assert "watched          10 FP images" in shown


def test_what_the_veto_measured_of_a_bundle_counts_in_the_next_schedule(
    compiled_once: Callable[..., Bundle],
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = compiled_once(make_small_model(), quick_options.model_copy(update={"policy": "dps:2"}))
    assert run(["evaluate", str(bundle.path), "--veto", "1", "--images", "8", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    noise = np.array(measured["veto"]["noise"])
    assert (noise > 0).all()
    path = tmp_path / "noise.json"
    path.write_text(json.dumps(measured))
    settings = quick_options.model_copy(update={"policy": f"dps:2:{path}"})
    noisy = compile_model(make_small_model(), tmp_path / "b", settings)
    assert rows_of(noisy)[0].count("#") == 3
    measured["veto"]["noise"] = np.where(np.arange(6)[:, None] == 0, 1e3, noise).tolist()
    path.write_text(json.dumps(measured))
    first = compile_model(make_small_model(), tmp_path / "c", settings)
    assert rows_of(first)[0][:2] == "##"  # the first step is too noisy to be reused at all


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("dps", "policy dps needs N or N:FILE"),
        ("dps:0", "policy dps needs N or N:FILE"),
        ("dps:50", "policy dps:50 puts all 50 steps into one group"),
        ("dps:3:absent.json", "can't read the noise absent.json"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_watched(
    policy: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", "digits", "-o", str(tmp_path / "b"), "--policy", policy]) == 2
    refused = capsys.readouterr().err
    assert said in refused
    assert refused.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_statistics_of_a_policy_with_another_interval_are_watched_anew(
    make_small_model: Callable[[], DiT], quick_options: CompileOptions
) -> None:
    for interval, distances in ((2, 3), (3, 5)):
        settings = quick_options.model_copy(update={"policy": f"dps:{interval}"})
        planned = plan_to_watch(make_small_model(), settings)
        assert planned is not None
        assert planned[1].distances == distances
    with pytest.raises(InputError, match="puts all 6 steps into one group"):
        plan_to_watch(make_small_model(), quick_options.model_copy(update={"policy": "dps:6"}))
