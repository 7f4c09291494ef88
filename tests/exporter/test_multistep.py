"""Schedulers of diffusers read off as recurrences, and the bundles that are made with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ditc.choices import SamplerName, SchedulerSampler, names_of
from ditc.compiler.options import CompileOptions
from ditc.errors import InputError
from ditc.exporter.multistep import multistep_recurrence, multistep_table
from ditc.exporter.recurrence import read_recurrence
from ditc.runtime.samplers import no_pairs, sampler_table, update
from ditc.sampler_checks import sampler_contradictions
from ditc.scheduler_samplers import SCHEDULER_SAMPLERS
from ditc.spec import DiffusionSpec, SamplerSpec, SchedulerSpec

# of NumPy, about how diffusers takes arrays from tensors
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NAMES = names_of(SchedulerSampler)
MEMORY = {"dpm++2m": 1, "dpm++3m": 2, "unipc": 2, "deis": 1, "lms": 3, "euler": 0}
MEMORY |= {"euler-ancestral": 0, "dpm++2m-sde": 1, "unipc-3": 3}
FLOWS = ["dpm++2m", "dpm++3m", "unipc", "unipc-3", "deis", "euler", "dpm++2m-sde"]
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


def scheduler_of(kind: str, steps: int, **config: Any) -> Any:
    scheduler = getattr(diffusers, kind)(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", **config)
    scheduler.set_timesteps(steps)
    return scheduler


def network(x: np.ndarray, t: float) -> np.ndarray:
    return np.asarray(np.tanh(1.3 * x[:, ::-1] + np.cos(t / 70)), np.float32)


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_over_the_columns_is_the_run_of_the_scheduler(
    name: SamplerName, spacing: Any, prediction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (name, prediction) == ("euler-ancestral", "sample"):
        with pytest.raises(InputError, match=r"can't be taken: EulerAncestralDiscreteScheduler.* says prediction_type"):
            multistep_table(DiffusionSpec(prediction="sample"), SamplerSpec(name=name), 12)
        return
    kind, config = SCHEDULER_SAMPLERS[name]
    theirs = scheduler_of(
        kind, 12, timestep_spacing=spacing, steps_offset=1, prediction_type=PREDICTIONS[prediction], **config
    )
    offset = 1 if spacing == "leading" else 0
    table = multistep_table(
        DiffusionSpec(prediction=prediction), SamplerSpec(name=name, spacing=spacing, offset=offset), 12
    )
    walked, expected = both_runs(table, theirs, monkeypatch)
    assert np.abs(walked - expected).max() < 1e-5 * np.abs(expected).max()


def both_runs(table: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """The last sample of a run over the columns and of the scheduler's own, on the same noise."""
    random = np.random.default_rng(1)
    x = random.standard_normal((2, 3, 4, 4)).astype(np.float32)
    scale = getattr(theirs, "scale_model_input", lambda sample, _: sample)
    scaled = float(scale(torch.ones(1), theirs.timesteps[0]))
    sample, pairs = torch.from_numpy(x / np.float32(scaled)), no_pairs(table)
    for i, t in enumerate(theirs.timesteps):
        z = random.standard_normal(x.shape).astype(np.float32)
        seen = scale(sample, t).numpy()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", lambda *_, **__: torch.from_numpy(z))  # noqa: B023
            sample = theirs.step(torch.from_numpy(network(seen, float(t))), t, sample).prev_sample
        out = network(x, table["t"][i])
        after = update({column: float(values[i]) for column, values in table.items()}, x, out, None, z, pairs)
        pairs.appendleft((x, out))
        x = after
    return x, sample.numpy()


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "euler-ancestral"])
def test_other_noise_levels_are_those_of_the_scheduler(
    name: SamplerName, sigmas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, config = SCHEDULER_SAMPLERS[name]
    theirs = scheduler_of(kind, 12, **config, **{f"use_{sigmas}_sigmas": True})
    table = multistep_table(DiffusionSpec(), SamplerSpec(name=name, sigmas=sigmas), 12)
    walked, expected = both_runs(table, theirs, monkeypatch)
    assert np.abs(walked - expected).max() < 1e-5 * np.abs(expected).max()
    assert not np.allclose(table["x0_out"], multistep_table(DiffusionSpec(), SamplerSpec(name=name), 12)["x0_out"])


def test_other_noise_levels_take_the_place_of_those_of_a_models_own_scheduler() -> None:
    kind = "DPMSolverMultistepScheduler"
    own = SchedulerSpec(kind=kind, config={"use_exponential_sigmas": True, "solver_order": 3})
    both = SamplerSpec(name="scheduler", scheduler=own, sigmas="karras")
    karras = SchedulerSpec(kind=kind, config={"use_karras_sigmas": True, "solver_order": 3})
    tables = [
        multistep_table(DiffusionSpec(), each, 12) for each in (both, SamplerSpec(name="scheduler", scheduler=karras))
    ]
    for column, values in tables[0].items():
        assert np.array_equal(values, tables[1][column])


@pytest.mark.parametrize("shift", [None, 3.0])
@pytest.mark.parametrize("name", FLOWS)
def test_a_run_of_a_flow_is_that_of_the_scheduler(
    name: SamplerName, shift: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, config = SCHEDULER_SAMPLERS[name]
    if name == "euler":
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift or 1.0)
    else:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift or 1.0}
        theirs = getattr(diffusers, kind)(**config, **flow)
    theirs.set_timesteps(12)
    table = multistep_table(DiffusionSpec(prediction="flow"), SamplerSpec(name=name, shift=shift), 12)
    walked, expected = both_runs(table, theirs, monkeypatch)
    assert np.abs(walked - expected).max() < 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(-table["x0_out"] * 1000, table["t"], atol=1.001)  # whole timesteps, but for Euler
    assert list(sampler_contradictions(table, "flow")) == []
    for column in ("prev_x", "prev_out", "x0_x", "x0_out"):
        assert list(sampler_contradictions({**table, column: table[column] * 1.01}, "flow"))


@pytest.mark.parametrize("shift", [None, 3.0])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_with_trailing_spacing_takes_equal_strides_from_the_noise_to_the_data(
    name: SamplerName, shift: float | None
) -> None:
    """But for one part in 1,000 all classes but Euler's do so by themselves; a shift moves the levels once."""
    flow, sampler = DiffusionSpec(prediction="flow"), SamplerSpec(name=name, spacing="trailing", shift=shift)
    table = multistep_table(flow, sampler, 12)
    levels = np.linspace(1, 1 / 12, 12)
    levels = levels if shift is None else shift * levels / (1 + (shift - 1) * levels)
    np.testing.assert_allclose(-table["x0_out"], levels, atol=1e-6 if name == "euler" else 3e-3)
    own = multistep_table(flow, sampler.model_copy(update={"spacing": "linspace"}), 12)
    assert np.array_equal(own["t"], table["t"]) == (name != "euler")


def test_the_shift_of_a_models_own_flow_scheduler_is_its_own_unless_another_is_chosen() -> None:
    own = SchedulerSpec(kind="FlowMatchEulerDiscreteScheduler", config={"shift": 3.0})
    flow = DiffusionSpec(prediction="flow")
    shifted, named = SamplerSpec(name="scheduler", scheduler=own), SamplerSpec(name="euler", shift=3.0)
    assert np.array_equal(multistep_table(flow, shifted, 12)["t"], multistep_table(flow, named, 12)["t"])
    other = multistep_table(flow, shifted.model_copy(update={"shift": 1.0}), 12)
    assert np.array_equal(other["t"], multistep_table(flow, SamplerSpec(name="euler"), 12)["t"])


@pytest.mark.parametrize(
    ("diffusion", "given", "message"),
    [
        (
            {"prediction": "flow"},
            {"name": "lms"},
            "LMSDiscreteScheduler has no form for a flow; choose --sampler euler",
        ),
        ({"prediction": "flow"}, {"name": "euler", "sigmas": "karras"}, "--sigmas karras is for a process over betas"),
        ({"prediction": "flow"}, {"name": "unipc", "spacing": "leading"}, "picks its timesteps itself"),
        ({"prediction": "flow"}, {"name": "euler", "spacing": "leading"}, "picks its timesteps itself"),
        ({}, {"name": "unipc", "shift": 3.0}, "--shift 3 is for a model that predicts a flow"),
        ({}, {"name": "euler-ancestral", "sigmas": "karras"}, "EulerAncestralDiscreteScheduler has no karras sigmas"),
    ],
)
def test_noise_levels_that_a_sampler_does_not_have_are_refused(
    diffusion: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        multistep_table(DiffusionSpec(**diffusion), SamplerSpec(**given), 12)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_formulas_over_betas_refuse_a_flow_and_other_noise_levels(name: SamplerName) -> None:
    with pytest.raises(
        InputError, match=f"--sampler {name} is for a process over betas, and the model predicts a flow"
    ):
        sampler_table(DiffusionSpec(prediction="flow"), SamplerSpec(name=name), 12)
    for given, flag in (({"sigmas": "karras"}, "--sigmas"), ({"shift": 2.0}, "--shift")):
        with pytest.raises(InputError, match=f"--sampler {name} has the noise levels .* {flag} would do nothing"):
            CompileOptions(sampler=name, **given).sampler_spec(SamplerSpec())


def test_a_flows_shift_stays_with_another_sampler_and_goes_with_one_over_betas() -> None:
    own = SamplerSpec(name="euler", shift=3.0, sigmas="karras")
    assert CompileOptions(sampler="unipc").sampler_spec(own) == SamplerSpec(name="unipc", shift=3.0)
    assert CompileOptions(sampler="ddim").sampler_spec(own) == SamplerSpec()
    assert CompileOptions(shift=1.5).sampler_spec(own) == own.model_copy(update={"shift": 1.5})


@pytest.mark.parametrize("name", NAMES)
def test_no_sampler_keeps_more_pairs_than_it_needs(name: SamplerName) -> None:
    assert multistep_recurrence(DiffusionSpec(), SamplerSpec(name=name), 12).memory == MEMORY[name]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", ["linear", "scaled-linear"])
@pytest.mark.parametrize("name", NAMES)
def test_the_columns_contradict_nothing_and_mixed_up_ones_do(name: SamplerName, schedule: Any, prediction: Any) -> None:
    table = multistep_table(DiffusionSpec(prediction=prediction, beta_schedule=schedule), SamplerSpec(name=name), 20)
    assert list(sampler_contradictions(table, prediction)) == []
    for column in {"prev_x", "prev_out", "x.1", "out.1"} & table.keys():
        if np.abs(table[column]).max() < 1e-3:
            continue  # of a prediction of noise, some look back at outputs alone
        assert list(sampler_contradictions({**table, column: table[column] * 1.01}, prediction))


def test_columns_that_a_bundle_would_be_refused_for_are_refused_by_the_compile() -> None:
    """PNDM subtracts a fixed stride, which is not the next timestep of the list with linspace spacing."""
    scheduler = SchedulerSpec(kind="PNDMScheduler", config={"skip_prk_steps": True})
    with pytest.raises(InputError, match=r"PNDMScheduler can't be taken .* inexact even with exact predictions"):
        multistep_table(DiffusionSpec(), SamplerSpec(name="scheduler", scheduler=scheduler), 10)


@pytest.mark.parametrize("name", ["unipc", "dpm++3m", "dpm++2m"])
def test_betas_that_begin_at_a_sigma_of_24000_are_taken(name: SamplerName) -> None:
    table = multistep_table(DiffusionSpec(beta_schedule="squared-cosine"), SamplerSpec(name=name), 10)
    assert list(sampler_contradictions(table, "epsilon")) == []


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_a_first_timestep_that_rounding_makes_twice_is_the_first(spacing: Any) -> None:
    """Karras sigmas over squared cosine betas; looked up, such a timestep is taken for the second, a sigma later."""
    scheduler = SchedulerSpec(kind="DPMSolverMultistepScheduler", config={"use_karras_sigmas": True})
    sampler = SamplerSpec(name="scheduler", scheduler=scheduler, spacing=spacing)
    table = multistep_table(DiffusionSpec(beta_schedule="squared-cosine"), sampler, 20)
    assert table["t"][0] == table["t"][1]
    assert -table["x0_out"][0] > -table["x0_out"][1]


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("HeunDiscreteScheduler", {}, "calls the network 19 times in 10 steps"),
        ("KDPM2DiscreteScheduler", {}, "times in 10 steps"),
        ("KDPM2AncestralDiscreteScheduler", {}, "times in 10 steps"),
        ("PNDMScheduler", {}, "calls the network 19 times in 10 steps"),
        ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.1}, "a whole run of it differs"),
    ],
)
def test_what_is_no_recurrence_is_refused_with_the_reason(kind: str, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refused:
        read_recurrence(kind, lambda: scheduler_of(kind, 10, **config), 10)
    assert str(refused.value).startswith(f"{kind} can't be taken: ")


@pytest.mark.parametrize("given", [{"eta": 0.5}, {"clip": 1.0}, {"variance": "fixed-large"}])
def test_settings_that_would_do_nothing_are_refused(given: dict[str, Any]) -> None:
    options = CompileOptions(sampler="unipc", **given)
    with pytest.raises(InputError, match=f"--sampler unipc .* --{next(iter(given))} would do nothing"):
        options.sampler_spec(SamplerSpec())


def test_what_a_model_clips_by_itself_is_not_asked_of_such_a_sampler() -> None:
    sampler = CompileOptions(sampler="deis").sampler_spec(SamplerSpec(spacing="leading", offset=1, clip=1.0))
    assert sampler == SamplerSpec(name="deis", spacing="leading", offset=1)


def test_without_diffusers_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(InputError, match="--sampler lms is read off diffusers; install it with: pip install"):
        multistep_table(DiffusionSpec(), SamplerSpec(name="lms"), 10)


@pytest.mark.parametrize("name", ["unipc", "lms", "euler-ancestral", "dpm++2m-sde"])
def test_a_bundle_walks_as_the_scheduler_and_the_model_do_in_torch_on_the_same_noise(
    name: SamplerName,
    compiled_once: Callable[..., Any],
    make_small_model: Callable[..., Any],
    quick_options: CompileOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ditc.runtime.pipeline import load

    options = quick_options.model_copy(
        update={"sampler": name, "policy": "none", "precision": "fp32", "vc": "none", "cfg": 1.0}
    )
    model, labels = make_small_model(), [1, 4]
    noise, *fresh = np.random.default_rng(2).standard_normal((1 + options.steps, 2, 3, 8, 8), dtype=np.float32)
    with load(compiled_once(model, options).path) as pipe:
        latents = pipe.executor.last(pipe.request(labels), noise, lambda step: fresh[step])
    kind, config = SCHEDULER_SAMPLERS[name]
    theirs = scheduler_of(kind, options.steps, timestep_spacing="linspace", **config)
    sample = torch.from_numpy(noise) / theirs.scale_model_input(torch.ones(1), theirs.timesteps[0])
    drawn = iter(fresh)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.from_numpy(next(drawn)))
    with torch.no_grad():
        for t in theirs.timesteps:
            seen = theirs.scale_model_input(sample, t)
            out = model(seen, torch.full((2,), float(t)), torch.tensor(labels))[:, :3]
            sample = theirs.step(out, t, sample).prev_sample
    assert (next(drawn, None) is None) == (name in ("euler-ancestral", "dpm++2m-sde"))
    assert np.abs(latents - sample.numpy()).max() < 1e-4 * np.abs(sample.numpy()).max()


def test_a_bundle_of_a_flow_walks_as_the_scheduler_and_the_model_do_in_torch(
    compiled_once: Callable[..., Any], make_small_model: Callable[..., Any], quick_options: CompileOptions
) -> None:
    from ditc.runtime.pipeline import load

    changes = {"sampler": "euler", "shift": 3.0, "policy": "none", "precision": "fp32", "vc": "none", "cfg": 1.0}
    model, labels, options = make_small_model(), [1, 4], quick_options.model_copy(update=changes)
    model.diffusion = DiffusionSpec(prediction="flow")
    noise = np.random.default_rng(2).standard_normal((2, 3, 8, 8), dtype=np.float32)
    bundle = compiled_once(model, options)
    assert bundle.manifest.settings["sampler"]["shift"] == 3
    with load(bundle.path) as pipe:
        latents = pipe.latents(labels, noise=noise)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(options.steps)
    sample = torch.from_numpy(noise)
    with torch.no_grad():
        for t in theirs.timesteps:
            out = model(sample, torch.full((2,), float(t)), torch.tensor(labels))[:, :3]
            sample = theirs.step(out, t, sample).prev_sample
    assert np.abs(latents - sample.numpy()).max() < 1e-4 * np.abs(sample.numpy()).max()
