"""Samplers: step by step against diffusers, the original DiT and the formulas of the papers."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ditc.diffusion import alphas_cumprod
from ditc.errors import InputError
from ditc.runtime.samplers import needs_noise, sampler_table, timesteps, update
from ditc.spec import DiffusionSpec, SamplerSpec

LAW = settings(deadline=None)  # a busy machine stalls now and then

SHAPE = (2, 3, 4, 4)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
BETAS = {"linear": "linear", "scaled-linear": "scaled_linear", "squared-cosine": "squaredcos_cap_v2"}
VARIANCES = {"learned": "learned_range", "fixed-small": "fixed_small", "fixed-large": "fixed_large"}


def normal(*seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rows_of(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int) -> list[dict[str, float]]:
    table = sampler_table(diffusion, sampler, steps)
    return [{name: float(column[i]) for name, column in table.items()} for i in range(steps)]


def assert_close(sample: np.ndarray, expected: Any) -> None:
    gap = np.linalg.norm(sample - np.asarray(expected)) / np.linalg.norm(np.asarray(expected))
    assert gap < 1e-5


def exactly(scheduler: Any) -> Any:
    """diffusers multiplies 1000 numbers up in float32, which alone is an error of 1e-4 near the clean end."""
    levels = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    scheduler.alphas_cumprod = levels
    if getattr(scheduler, "final_alpha_cumprod", 1) != 1:
        scheduler.final_alpha_cumprod = levels[0]
    return scheduler


def assert_walks_like_ddim(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int) -> None:
    """Both sides take each step from the same sample with the same model output and the same noise."""
    theirs = exactly(
        DDIMScheduler(
            num_train_timesteps=diffusion.train_steps,
            beta_schedule=BETAS[diffusion.beta_schedule],
            prediction_type=PREDICTIONS[diffusion.prediction],
            timestep_spacing=sampler.spacing,
            steps_offset=sampler.offset,
            set_alpha_to_one=sampler.final_alpha_one,
            clip_sample=sampler.clip is not None,
            clip_sample_range=sampler.clip or 1.0,
        )
    )
    theirs.set_timesteps(steps)
    x = normal(0)
    rows = rows_of(diffusion, sampler, steps)
    assert [row["t"] for row in rows] == theirs.timesteps.tolist()
    for index, (row, t) in enumerate(zip(rows, theirs.timesteps, strict=True)):
        out, z = normal(1, index), normal(2, index)
        expected = theirs.step(
            torch.from_numpy(out), t, torch.from_numpy(x), eta=sampler.eta, variance_noise=torch.from_numpy(z)
        ).prev_sample
        x = update(row, x, out, None, z)
        assert_close(x, expected)


@pytest.mark.parametrize("clip", [None, 1.0, 0.3])
@pytest.mark.parametrize("final_alpha_one", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_is_diffusers_step_by_step(
    prediction: Any, spacing: Any, offset: int, final_alpha_one: bool, clip: float | None
) -> None:
    sampler = SamplerSpec(spacing=spacing, offset=offset, final_alpha_one=final_alpha_one, clip=clip)
    assert_walks_like_ddim(DiffusionSpec(prediction=prediction), sampler, 20)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("schedule", BETAS)
def test_noisy_ddim_is_diffusers_on_every_beta_schedule(schedule: Any, eta: float) -> None:
    assert_walks_like_ddim(DiffusionSpec(beta_schedule=schedule), SamplerSpec(spacing="leading", offset=1, eta=eta), 25)


@pytest.mark.parametrize("steps", [2, 50, 200, 250])
def test_ddim_is_diffusers_at_any_number_of_steps(steps: int) -> None:
    assert_walks_like_ddim(DiffusionSpec(), SamplerSpec(spacing="leading"), steps)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_the_timesteps_are_those_of_diffusers_at_every_number_of_steps(spacing: Any) -> None:
    theirs = DDIMScheduler(timestep_spacing=spacing)
    differing = []
    for steps in range(2, 1001):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.tolist()[:steps]  # its sums overshoot now and then, to a timestep of -1
        if timesteps(SamplerSpec(spacing=spacing), steps, 1000).tolist() != expected:
            differing.append(steps)
    assert not differing


def assert_walks_like_ddpm(
    diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """As for DDIM; `last` steps at the end are left out where diffusers adds noise to the finished sample."""
    theirs = exactly(
        DDPMScheduler(
            prediction_type=PREDICTIONS[diffusion.prediction],
            variance_type=VARIANCES[sampler.variance],
            timestep_spacing=sampler.spacing,
            steps_offset=sampler.offset,
            clip_sample=sampler.clip is not None,
            clip_sample_range=sampler.clip or 1.0,
        )
    )
    theirs.set_timesteps(steps)
    x = normal(0)
    rows = rows_of(diffusion, sampler, steps)
    assert [row["t"] for row in rows] == theirs.timesteps.tolist()
    for index, (row, t) in enumerate(list(zip(rows, theirs.timesteps, strict=True))[: steps - last]):
        out, raw, z = normal(1, index), normal(2, index), normal(3, index)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, z=z, **k: torch.from_numpy(z)
        )
        both = np.concatenate([out, raw], axis=1) if sampler.variance == "learned" else out
        expected = theirs.step(torch.from_numpy(both), t, torch.from_numpy(x)).prev_sample
        x = update(row, x, out, raw, z)
        assert_close(x, expected)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_is_diffusers_step_by_step(
    prediction: Any, variance: Any, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = SamplerSpec(name="ddpm", spacing="leading", variance=variance, clip=clip)
    assert_walks_like_ddpm(DiffusionSpec(prediction=prediction), sampler, 20, monkeypatch, last=0)


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 1), ("trailing", 0)])
def test_ddpm_is_diffusers_on_other_spacings(spacing: Any, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = SamplerSpec(name="ddpm", spacing=spacing, offset=offset)
    assert_walks_like_ddpm(DiffusionSpec(), sampler, 20, monkeypatch, last=1)


@pytest.mark.parametrize("schedule", BETAS)
def test_the_noise_levels_are_those_of_diffusers(schedule: Any) -> None:
    expected = DDPMScheduler(beta_schedule=BETAS[schedule]).alphas_cumprod
    np.testing.assert_allclose(alphas_cumprod(DiffusionSpec(beta_schedule=schedule)), expected, rtol=1e-4)


def space_timesteps(train_steps: int, steps: int) -> list[int]:
    """The original release's: a fractional stride is added up, each sum rounded; ascending."""
    stride, place, numbers = (train_steps - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        numbers.append(round(place))
        place += stride
    return numbers


@LAW
@given(train_steps=st.integers(2, 1000), data=st.data())
def test_linspace_rounds_even_strides_over_both_ends(train_steps: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(2, train_steps))
    numbers = timesteps(SamplerSpec(spacing="linspace"), steps, train_steps)
    stride = Fraction(train_steps - 1, steps - 1)
    assert all(abs(t - stride * index) <= Fraction(1, 2) for index, t in enumerate(numbers.tolist()[::-1]))


@pytest.mark.parametrize("steps", [2, 10, 25, 50, 100, 250, 500, 1000])
def test_linspace_is_the_original_respacing(steps: int) -> None:
    assert timesteps(SamplerSpec(spacing="linspace"), steps, 1000).tolist() == space_timesteps(1000, steps)[::-1]


@LAW
@given(
    spacing=st.sampled_from(["linspace", "leading", "trailing"]), steps=st.integers(2, 400), extra=st.integers(0, 600)
)
@example(spacing="trailing", steps=61, extra=939)
def test_timesteps_fall_strictly_and_stay_in_range(spacing: Any, steps: int, extra: int) -> None:
    numbers = timesteps(SamplerSpec(spacing=spacing), steps, steps + extra)
    assert len(numbers) == steps
    assert numbers[-1] >= 0
    assert numbers[0] < steps + extra
    assert all(later < earlier for earlier, later in pairwise(numbers))


def test_the_learned_variance_is_that_of_improved_ddpm() -> None:
    diffusion = DiffusionSpec()
    t = space_timesteps(1000, 50)
    products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t]
    before = np.append(1.0, products[:-1])
    betas = 1 - products / before
    posterior = betas * (1 - before) / (1 - products)
    rows = rows_of(diffusion, SamplerSpec(name="ddpm", variance="learned"), 50)[::-1]
    for i in range(1, 50):
        x, out, v, z = (normal(part, i) for part in range(4))
        x0 = x / np.sqrt(products[i]) - np.sqrt(1 / products[i] - 1) * out
        mean = betas[i] * np.sqrt(before[i]) / (1 - products[i]) * x0
        mean += (1 - before[i]) * np.sqrt(1 - betas[i]) / (1 - products[i]) * x
        fraction = (v + 1) / 2
        log_variance = fraction * np.log(betas[i]) + (1 - fraction) * np.log(posterior[i])
        assert_close(update(rows[i], x, out, v, z), mean + np.exp(0.5 * log_variance) * z)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("spacing", "offset"), [("linspace", 0), ("leading", 0), ("leading", 1), ("trailing", 0)])
def test_the_last_ddpm_step_adds_no_noise(spacing: Any, offset: int, variance: Any) -> None:
    sampler = SamplerSpec(name="ddpm", spacing=spacing, offset=offset, variance=variance)
    *others, last = rows_of(DiffusionSpec(), sampler, 10)
    x, out, raw = normal(0), normal(1), normal(2)
    np.testing.assert_array_equal(update(last, x, out, raw, normal(3)), update(last, x, out, raw, None))
    assert not needs_noise(last)
    assert all(needs_noise(row) for row in others)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_last_ddim_step_returns_the_clean_sample(eta: float) -> None:
    last = rows_of(DiffusionSpec(prediction="sample"), SamplerSpec(eta=eta), 10)[-1]
    out = normal(1)
    np.testing.assert_allclose(update(last, normal(0), out, None, normal(2)), out, atol=1e-6)


def test_ddim_without_eta_asks_for_no_noise() -> None:
    assert not any(needs_noise(row) for row in rows_of(DiffusionSpec(), SamplerSpec(), 10))
    assert all(needs_noise(row) for row in rows_of(DiffusionSpec(), SamplerSpec(eta=0.5), 10)[:-1])


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_leads_to_the_clean_sample(name: Any, prediction: str) -> None:
    clean, x = normal(0), normal(1)
    diffusion = DiffusionSpec(prediction=prediction)  # type: ignore[arg-type]
    products = alphas_cumprod(diffusion)
    for index, row in enumerate(rows_of(diffusion, SamplerSpec(name=name), 30)):
        signal, noise = np.sqrt(products[int(row["t"])]), np.sqrt(1 - products[int(row["t"])])
        eps = (x - signal * clean) / noise
        out = {"epsilon": eps, "v": signal * eps - noise * clean, "sample": clean}[prediction]
        x = update(row, x, out.astype(np.float32), None, normal(2, index))
    np.testing.assert_allclose(x, clean, atol=1e-4)


def test_clipping_bounds_the_clean_sample_only() -> None:
    last = rows_of(DiffusionSpec(prediction="sample"), SamplerSpec(clip=0.5), 10)[-1]
    out = np.array([-3, -0.4, 0.4, 3], np.float32).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(update(last, out, out, None, None).ravel(), [-0.5, -0.4, 0.4, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_an_update_leaves_its_inputs_alone_and_stays_float32(name: Any) -> None:
    arrays = [normal(i) for i in range(4)]
    row = rows_of(DiffusionSpec(), SamplerSpec(name=name, variance="learned", eta=0.5, clip=0.1), 10)[3]
    assert update(row, *arrays).dtype == np.float32
    for i, array in enumerate(arrays):
        np.testing.assert_array_equal(array, normal(i))


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("final_alpha_one", [True, False])
@pytest.mark.parametrize("steps", [2, 3, 1000])
def test_every_coefficient_is_a_number(name: Any, final_alpha_one: bool, steps: int) -> None:
    sampler = SamplerSpec(name=name, variance="learned", final_alpha_one=final_alpha_one, clip=1, eta=1)
    for name, column in sampler_table(DiffusionSpec(), sampler, steps).items():
        assert column.shape == (steps,)
        assert np.isfinite(column).all(), name


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_a_number_of_steps_that_the_model_was_not_trained_for_is_refused(steps: int) -> None:
    with pytest.raises(InputError, match=rf"steps must be 2 to 1000, .*found {steps}; set --steps"):
        sampler_table(DiffusionSpec(), SamplerSpec(), steps)


def test_an_offset_past_the_last_timestep_is_refused() -> None:
    assert timesteps(SamplerSpec(spacing="leading", offset=19), 50, 1000)[0] == 999
    with pytest.raises(InputError, match=r"offset 20 moves the first timestep to 1000, past 999"):
        timesteps(SamplerSpec(spacing="leading", offset=20), 50, 1000)


def test_a_learned_variance_needs_a_network_that_learned_it() -> None:
    with pytest.raises(InputError, match=r"no learned variance; choose variance fixed-small or fixed-large"):
        sampler_table(DiffusionSpec(learned_sigma=False), SamplerSpec(name="ddpm", variance="learned"), 10)
