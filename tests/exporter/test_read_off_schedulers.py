"""Schedulers that are read off with their own configuration: they sample as in diffusers, or are refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scheduler_files import OWN, SHAPE, STEPS, VALUES, Settings, prediction_of, read, start, written

from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import trajectory_table
from ditc.errors import InputError
from ditc.exporter.schedulers import SCHEDULERS
from ditc.runtime.samplers import adds_noise, no_pairs, update
from ditc.spec import DiffusionSpec, SamplerSpec

# diffusers hands torch tensors to NumPy in a way that NumPy 2 deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

# that can't be read off with any settings -> the reason
NO_RECURRENCE = {
    "DPMSolverSDEScheduler": "more often than it has steps",
    "HeunDiscreteScheduler": "calls the network 15 times in 8 steps",
    "KDPM2DiscreteScheduler": "calls the network 15 times in 8 steps",
    "KDPM2AncestralDiscreteScheduler": "calls the network 15 times in 8 steps",
}
# keys of an integrator -> other values than the default, where there are some that go together with the other defaults
OWN_VALUES: dict[str, tuple[Any, ...]] = {
    "solver_order": (1, 3),
    "algorithm_type": ("sde-dpmsolver++",),
    "solver_type": ("heun",),
    "lower_order_final": (False,),
    "lambda_min_clipped": (-5.1,),
    "use_karras_sigmas": (True,),
    "use_exponential_sigmas": (True,),
    "use_beta_sigmas": (True,),
    "use_lu_lambdas": (True,),
    "euler_at_final": (True,),
    "final_sigmas_type": ("sigma_min",),
    "disable_corrector": ([0, 3],),
    "sigma_min": (0.03,),
    "sigma_max": (50.0,),
    "predictor_order": (1,),
    "corrector_order": (1,),
    "interpolation_type": ("log_linear",),
    "set_alpha_to_one": (True,),
}
# what of that a class does not have, or gives no number in diffusers, or is inexact even with exact predictions
NOT_TO_BE_HAD: dict[str, tuple[Settings, ...]] = {
    "DEISMultistepScheduler": ({"algorithm_type": "sde-dpmsolver++"},),
    "EulerAncestralDiscreteScheduler": ({"prediction_type": "sample"},),
    "PNDMScheduler": (
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"timestep_spacing": "linspace"},
    ),
    "SASolverScheduler": ({"algorithm_type": "sde-dpmsolver++"},),
    "UniPCMultistepScheduler": ({"lower_order_final": False},),
}
NEEDED: dict[str, Settings] = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "sigma_min": {"use_karras_sigmas": True},
    "sigma_max": {"use_karras_sigmas": True},
}


def own_variations(kind: str) -> Iterator[Settings]:
    """Nothing said; every key of the integrator at every other value; spacings, predictions and betas."""
    needed, keys = NEEDED.get(kind, {}), SCHEDULERS[kind].keys.read
    yield needed
    for key in SCHEDULERS[kind].own:
        for value in OWN_VALUES.get(key, ()):
            yield {**needed, **NEEDED.get(key, {}), key: value}
    for key in {"timestep_spacing", "steps_offset", "prediction_type", "beta_end", "beta_schedule"} & keys.keys():
        for value in VALUES[key][:2]:
            yield {**needed, key: value}


def scheduler_run(kind: str, settings: Settings, calls: int) -> np.ndarray[Any, Any]:
    """The last sample of a run of diffusers' own class, in so many calls of a stand-in for a network."""
    scheduler = getattr(diffusers, kind).from_config(settings)
    scheduler.set_timesteps(calls - (kind == "PNDMScheduler"))
    fresh, x = torch.Generator().manual_seed(3), start()
    x = x / scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])
    more = {"generator": fresh} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        out = prediction_of(scheduler.scale_model_input(x, t), float(t), 3)
        x = scheduler.step(out, t, x, return_dict=False, **more)[0]
    return x.numpy()


def own_run_read_off(diffusion: DiffusionSpec, sampler: SamplerSpec, calls: int) -> np.ndarray[Any, Any]:
    """The same by the columns that were read off, which have noise for every step that draws any in diffusers."""
    table = trajectory_table(diffusion, sampler, calls)
    fresh, x, pairs = torch.Generator().manual_seed(3), start().numpy(), no_pairs(table)
    for row in ({name: float(column[i]) for name, column in table.items()} for i in range(calls)):
        z = torch.randn(SHAPE, generator=fresh).numpy() if adds_noise(table) else None
        out = prediction_of(torch.from_numpy(x), row["t"], 3).numpy()
        before, x = x, update(row, x, out, None, z, pairs).astype(np.float32)
        pairs.appendleft((before, out))
    return x


@pytest.mark.parametrize("kind", sorted(set(OWN) - NO_RECURRENCE.keys()))
def test_a_class_that_can_be_read_off_samples_as_diffusers_does_from_its_own_configuration(
    kind: str, tmp_path: Path
) -> None:
    samples = []
    for settings in own_variations(kind):
        diffusion, sampler, about = read(written(tmp_path / "s.json", kind, **settings))
        assert about == ()
        assert sampler.scheduler is not None
        assert sampler.scheduler.kind == kind
        other = {key for key, default in SCHEDULERS[kind].own.items() if settings.get(key, default) != default}
        assert sampler.scheduler.config.keys() == other
        if {key: settings[key] for key in settings.keys() - NEEDED.get(kind, {})} in NOT_TO_BE_HAD.get(kind, ()):
            with pytest.raises(InputError, match=f"^{kind} can't be taken"):
                trajectory_table(diffusion, sampler, STEPS)
            continue
        expected = scheduler_run(kind, settings, STEPS)
        samples.append(own_run_read_off(diffusion, sampler, STEPS))
        gap = np.abs(samples[-1] - expected).max() / np.abs(expected).max()
        assert gap < 2e-5, f"{settings}: {gap}"
    distinct = {sample.tobytes() for sample in samples}
    assert len(distinct) > len(samples) / 2  # the keys say something


@pytest.mark.parametrize("kind", sorted(NO_RECURRENCE))
def test_a_class_that_can_not_be_read_off_is_refused_by_name_unless_another_sampler_is_chosen(
    kind: str, tmp_path: Path
) -> None:
    diffusion, sampler, _ = read(written(tmp_path / "s.json", kind))
    with pytest.raises(
        InputError, match=f"{kind} can't be taken: it calls the network .*--sampler dpm.* ddim"
    ) as refused:
        trajectory_table(diffusion, sampler, STEPS)
    assert NO_RECURRENCE[kind] in str(refused.value)
    assert "\n" not in str(refused.value)
    for name in ("ddim", "ddpm", "unipc"):
        chosen = CompileOptions(sampler=name).sampler_spec(sampler)
        assert (chosen.name, chosen.scheduler) == (name, None)
        assert len(trajectory_table(diffusion, chosen, STEPS)["t"]) == STEPS


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("PNDMScheduler", {}, "calls the network 16 times in 8 steps"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "`final_sigmas_type` zero is not supported"),
        ("DPMSolverMultistepScheduler", {"solver_type": "huen"}, "says huen is not implemented"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "steps are not finite"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
            "what it leaves of the noise, with what it adds, is not the rest",
        ),
    ],
)
def test_settings_that_can_not_be_read_off_are_refused_in_one_line(
    kind: str, settings: Settings, reason: str, tmp_path: Path
) -> None:
    diffusion, sampler, _ = read(written(tmp_path / "s.json", kind, **settings))
    with pytest.raises(InputError, match=f"^{kind} can't be taken") as refused:
        trajectory_table(diffusion, sampler, STEPS)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_spacing_may_be_chosen_for_a_class_that_has_one(tmp_path: Path) -> None:
    options = CompileOptions(spacing="trailing")
    diffusion, sampler, _ = read(written(tmp_path / "s.json", "UniPCMultistepScheduler", timestep_spacing="leading"))
    chosen = options.sampler_spec(sampler)
    assert chosen.scheduler == sampler.scheduler
    assert trajectory_table(diffusion, chosen, STEPS)["t"][0] == 999
    diffusion, sampler, _ = read(written(tmp_path / "s.json", "DPMSolverSinglestepScheduler"))
    with pytest.raises(InputError, match="picks its timesteps itself, found --spacing trailing"):
        trajectory_table(diffusion, options.sampler_spec(sampler), STEPS)


@pytest.mark.parametrize("given", [{"eta": 0.5}, {"clip": 1.0}, {"variance": "fixed-large"}])
def test_settings_that_do_nothing_for_the_models_own_scheduler_are_refused(given: Settings, tmp_path: Path) -> None:
    _, sampler, _ = read(written(tmp_path / "s.json", "LMSDiscreteScheduler"))
    with pytest.raises(InputError, match=r"LMSDiscreteScheduler has its own noise or none .* would do nothing"):
        CompileOptions(**given).sampler_spec(sampler)
