"""The solvers of a search: which are tried of a model, with how many steps, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.compiler.options import CompileOptions
from ditc.errors import InputError
from ditc.quality.options import TuneOptions
from ditc.quality.solvers import FEWEST, Solver, Solvers, falling_counts, in_floats, solvers_of
from ditc.spec import DiffusionSpec, ModelSpec, SamplerSpec, SchedulerSpec
from tests.other_settings import another

BASE = CompileOptions()
OPTIONS = TuneOptions(worse_by=0.1)


def model(prediction: str = "epsilon", **sampler: Any) -> ModelSpec:
    return ModelSpec(
        name="a model",
        family="dit",
        in_channels=3,
        height=8,
        width=8,
        num_classes=5,
        null_label=5,
        cfg_channels=3,
        branches=("blocks.0.attn", "blocks.0.mlp"),
        branch_shape=(16, 64),
        parameters=1,
        diffusion=DiffusionSpec.model_validate({"prediction": prediction, "learned_sigma": False}),
        sampler=SamplerSpec(**sampler),
    )


def solvers(spec: ModelSpec, base: CompileOptions = BASE, **changes: Any) -> tuple[Solvers, str]:
    every, notes = solvers_of(spec, base, OPTIONS.model_copy(update=changes))
    assert every is not None
    return every, " ".join(notes)


def names(every: Solvers) -> list[str]:
    return [solver.name for solver in every.every]


def test_the_bases_own_comes_first_then_every_sampler_with_every_spacing() -> None:
    every, notes = solvers(model())
    assert every.every[0].changes == {}
    assert every.every[0].at(50, BASE) == {}
    assert every.every[0].at(20, BASE) == {"steps": 20}
    assert names(every)[1:] == [
        *("spacing leading", "spacing trailing"),
        *("sampler dpm++2m", "sampler dpm++2m, spacing leading", "sampler dpm++2m, spacing trailing"),
        *("sampler unipc", "sampler unipc, spacing leading", "sampler unipc, spacing trailing"),
    ]
    assert notes == ""


def test_a_solver_that_does_what_another_one_does_is_tried_once() -> None:
    every, _ = solvers(model(spacing="leading"), samplers=("ddim", "unipc"), spacings=("leading",))
    assert names(every) == ["the base's own", "sampler unipc"]


def test_with_nothing_beside_the_base_there_is_nothing_to_search() -> None:
    only = OPTIONS.model_copy(update={"samplers": (), "spacings": (), "step_counts": (50,)})
    assert solvers_of(model(), BASE, only) == (None, ())


@given(st.integers(2, 1000))
def test_numbers_of_steps_fall_from_the_bases_and_cost_four_runs_of_it_at_most(steps: int) -> None:
    counts = falling_counts(steps)
    assert counts[0] == steps
    assert list(counts) == sorted(set(counts), reverse=True)
    assert min(counts) >= min(FEWEST, steps)
    assert sum(counts) <= 4 * steps


def test_numbers_that_are_asked_for_are_tried_beside_the_bases_and_none_between() -> None:
    every, _ = solvers(model(), step_counts=(10, 60, 20))
    assert list(every.falling) == [60, 50, 20, 10]
    every, _ = solvers(model())
    assert list(every.falling) == [*range(50, every.counts[-1] - 1, -1)]


def test_a_model_that_predicts_a_flow_gets_the_samplers_and_spacings_that_have_a_form_for_one() -> None:
    every, note = solvers(model("flow", name="euler"))
    assert names(every) == ["the base's own", "spacing trailing", "sampler dpm++2m", "sampler unipc"]
    assert note.startswith("not tried, since this model does not take them: spacing leading; sampler dpm++2m, spacing")


def test_a_models_own_scheduler_stays_and_others_stand_beside_it() -> None:
    own = SchedulerSpec(kind="DEISMultistepScheduler", config={"solver_order": 2})
    every, note = solvers(model(name="scheduler", scheduler=own, spacing="leading"), spacings=())
    assert names(every) == ["the base's own", "sampler dpm++2m", "sampler unipc"]
    assert every.takes(every.every[0], 7)
    assert note == ""


def test_settings_of_the_bases_sampler_that_another_one_refuses_are_left_out_of_it() -> None:
    every, _ = solvers(model(), CompileOptions(eta=0.5, clip=1.0), samplers=("unipc",), spacings=())
    assert every.every[1].changes == {"sampler": "unipc", "eta": None, "clip": None}
    assert every.every[1].name == "sampler unipc"


@pytest.mark.parametrize(
    ("prediction", "changes", "message"),
    [
        ("flow", {"samplers": ("lms",)}, "--samplers lms can't be tried: .*"),
        ("flow", {"samplers": ("unipc", "ddpm")}, "--samplers ddpm can't be tried: --sampler ddpm is for a process"),
        ("flow", {"spacings": ("leading",)}, "--spacings leading can't be tried: .* picks its timesteps itself"),
        ("epsilon", {"step_counts": (2000, 7)}, "--step-counts 2000 can't be taken: steps must be 2 to 1000"),
    ],
)
def test_what_was_asked_for_and_can_not_be_taken_is_refused(
    prediction: str, changes: dict[str, Any], message: str
) -> None:
    spec = model(prediction, name="euler" if prediction == "flow" else "ddim")
    with pytest.raises(InputError, match=message):
        solvers_of(spec, BASE, OPTIONS.model_copy(update=changes))


def test_a_base_that_its_model_does_not_take_is_refused() -> None:
    with pytest.raises(InputError, match="steps must be 2 to 1000"):
        solvers_of(model(), CompileOptions(steps=1001), OPTIONS)


@pytest.mark.parametrize(
    "base",
    [
        CompileOptions(ranges="fisher", scales="per-step", midpoint="bounded", smooth="balance", float_steps="2:2"),
        CompileOptions(precision="w7a8", scales="dynamic"),
        CompileOptions(precision="fp16"),
        CompileOptions(precision="fp32"),
    ],
    ids=lambda base: base.precision,
)
def test_every_base_runs_in_floating_point(base: CompileOptions) -> None:
    floats = base.model_copy(update=in_floats(base))
    assert floats.bits is None
    assert floats.policy == "none"
    assert floats.precision == (base.precision if base.bits is None else "fp32")


@pytest.mark.parametrize("name", [name for name in CompileOptions.model_fields if name != "watch_images"])
@pytest.mark.parametrize("base", [CompileOptions(), CompileOptions(scales="time-groups", time_groups=5)])
def test_every_setting_of_a_base_lets_it_run_in_floating_point(base: CompileOptions, name: str) -> None:
    changed = base.model_copy(update=another(base, name) or {})
    assert changed.model_copy(update=in_floats(changed)).bits is None


def test_steps_that_a_setting_of_the_base_does_not_take_are_left_out() -> None:
    base = CompileOptions(select="time-groups", time_groups=30)
    solvers, _ = solvers_of(model(), base, OPTIONS)
    assert solvers is not None
    assert min(steps for steps in solvers.counts if solvers.takes(Solver(), steps)) >= 30


def test_a_solver_is_the_same_as_another_of_its_settings() -> None:
    assert Solver((("sampler", "unipc"),)) == Solver((("sampler", "unipc"),))
    assert len({Solver(), Solver(), Solver((("spacing", "leading"),))}) == 2
