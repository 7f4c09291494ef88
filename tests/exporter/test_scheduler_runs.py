"""Runs over the tables of DDIM and DDPM, as a scheduler's configuration has them, beside those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scheduler_files import (
    EXACT,
    OWN,
    SHAPE,
    STEPS,
    VALUES,
    Settings,
    diffusers_run,
    prediction_of,
    read,
    start,
    written,
)
from torch import Tensor

from ditc.compiler.options import CompileOptions
from ditc.diffusion import alphas_cumprod
from ditc.errors import InputError
from ditc.exporter.schedulers import SCHEDULERS
from ditc.runtime.samplers import needs_noise, sampler_table, update
from ditc.spec import DiffusionSpec, SamplerSpec

# diffusers hands torch tensors to NumPy in a way that NumPy 2 deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

OTHER_STEPS = 7  # doesn't divide 1000, as STEPS does


def own_run(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int, channels: int) -> np.ndarray[Any, Any]:
    """The same by our tables."""
    table = sampler_table(diffusion, sampler, steps)
    fresh, x, samples = torch.Generator().manual_seed(3), start().numpy(), []
    for row in ({name: float(column[i]) for name, column in table.items()} for i in range(steps)):
        out = prediction_of(torch.from_numpy(x), row["t"], channels).numpy()
        z = torch.randn(SHAPE, generator=fresh).numpy() if needs_noise(row) else None
        x = update(row, x, out[:, :3], out[:, 3:] if channels > 3 else None, z).astype(np.float32)
        samples.append(x)
    return np.stack(samples)


def variations(kind: str) -> Iterator[Settings]:
    """Nothing said; every key at every other value; the pairs of values that touch the ends of a run."""
    yield {}
    for key in SCHEDULERS[kind].keys.read:
        for value in VALUES[key]:
            yield {key: value}
    for spacing in VALUES["timestep_spacing"]:
        for key in ("set_alpha_to_one", "variance_type", "steps_offset", "prediction_type"):
            for value in VALUES[key] if key in SCHEDULERS[kind].keys.read else ():
                yield {"timestep_spacing": spacing, key: value, "clip_sample": False}
        for value in VALUES["variance_type"] if "variance_type" in SCHEDULERS[kind].keys.read else ():
            yield {"timestep_spacing": spacing, "steps_offset": 1, "variance_type": value}


@pytest.mark.parametrize("kind", EXACT)
def test_an_exact_class_samples_as_diffusers_does_or_says_what_differs(kind: str, tmp_path: Path) -> None:
    exact = said = 0
    for settings in variations(kind):
        channels = 6 if settings.get("variance_type") == "learned_range" else 3
        diffusion, sampler, assumed = read(
            written(tmp_path / "scheduler_config.json", kind, **settings), learned_sigma=channels == 6
        )
        errors = []
        for steps in (STEPS, OTHER_STEPS):
            expected = diffusers_run(getattr(diffusers, kind).from_config(settings), steps, channels)
            gap = np.abs(own_run(diffusion, sampler, steps, channels) - expected).max()
            errors.append(gap / np.abs(expected).max())
        if assumed:
            assert max(errors) > 1e-4, f"{settings}: nothing differs, and a line says it does"
            said += 1
        else:
            assert max(errors) < 1e-4, f"{settings}: {errors}"
            exact += 1
    assert exact > 15
    assert said > 1


@pytest.mark.parametrize("kind", EXACT)
def test_every_key_that_a_file_leaves_out_is_read_as_diffusers_reads_it(kind: str, tmp_path: Path) -> None:
    # values that no default is, so that a wrong default shows
    whole = {key: values[-1] for key, values in VALUES.items() if key in SCHEDULERS[kind].keys.read}
    whole |= {"timestep_spacing": "leading", "beta_schedule": "scaled_linear", "clip_sample": True}
    whole |= {"variance_type": "fixed_small_log"} if "variance_type" in whole else {}
    complete = own_run(*read(written(tmp_path / "s.json", kind, **whole))[:2], STEPS, 3)
    for key in whole:
        settings = {name: value for name, value in whole.items() if name != key}
        samples = own_run(*read(written(tmp_path / "s.json", kind, **settings))[:2], STEPS, 3)
        expected = diffusers_run(getattr(diffusers, kind).from_config(settings), STEPS, 3)
        np.testing.assert_allclose(samples, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), err_msg=key)
        if key not in ("timestep_spacing", "clip_sample", "variance_type"):  # those have their default's value
            assert np.abs(samples - complete).max() > 1e-4, key


@pytest.mark.parametrize("alpha_one", [True, False])
@pytest.mark.parametrize("kind", EXACT)
def test_an_offset_of_a_stride_or_more_ends_where_diffusers_ends(kind: str, alpha_one: bool, tmp_path: Path) -> None:
    """From so many steps on that the offset leaves room for one more; `clip_sample` off, so that each end shows."""
    own = {"set_alpha_to_one": alpha_one} if "set_alpha_to_one" in SCHEDULERS[kind].keys.read else {}
    for offset, steps in ((1, 26), (1, 30), (2, 25), (2, 24), (2, 17), (5, 10), (5, 9), (0, 50)):
        settings = {"num_train_timesteps": 50, "steps_offset": offset, "clip_sample": False, **own}
        diffusion, sampler, assumed = read(written(tmp_path / "s.json", kind, **settings))
        try:
            samples = own_run(diffusion, sampler, steps, 3)
        except InputError:  # the offset moves the first timestep out of the process
            with pytest.raises(IndexError):
                diffusers_run(getattr(diffusers, kind).from_config(settings), steps, 3)
            continue
        expected = diffusers_run(getattr(diffusers, kind).from_config(settings), steps, 3)
        assert assumed == ()
        np.testing.assert_allclose(samples, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def oracle(clean: Tensor, levels: Tensor, prediction: str) -> Any:
    """A model that knows the clean sample: what it returns for a sample of our process at a timestep, fractions too."""
    sigmas = ((1 - levels) / levels).sqrt()

    def predict(x: Tensor, t: float) -> Tensor:
        low = min(int(t), len(sigmas) - 2)
        sigma = torch.lerp(sigmas[low], sigmas[low + 1], t - low)
        signal, noise = 1 / (sigma**2 + 1).sqrt(), sigma / (sigma**2 + 1).sqrt()
        epsilon = (x - signal * clean) / noise
        return {"epsilon": epsilon, "v": signal * epsilon - noise * clean, "sample": clean.expand_as(x)}[prediction]

    return predict


CLEAN = torch.linspace(-0.9, 0.9, 48).reshape(1, 3, 4, 4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", sorted(set(OWN) - {"DPMSolverSDEScheduler"}))
def test_a_class_that_is_not_exact_has_our_noise_process(kind: str, prediction: str, tmp_path: Path) -> None:
    """A model that knows the clean sample in our process leads the class's own integrator there, and DDIM."""
    diffusion, own, about = read(written(tmp_path / "s.json", kind, prediction_type=prediction))
    sampler = CompileOptions(sampler="ddim").sampler_spec(own)
    assert about == ()
    assert sampler.name == "ddim"
    scheduler = getattr(diffusers, kind).from_config({"prediction_type": prediction})
    levels = torch.from_numpy(alphas_cumprod(diffusion))
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), levels, rtol=1e-4, atol=0)
    predict = oracle(CLEAN.double(), levels, diffusion.prediction)
    scheduler.set_timesteps(20)
    x = start().double() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), float(t)), t, x).prev_sample
    assert (x - CLEAN).abs().max() < 0.2  # integrators that add noise, or stop at the first timestep, end near it
    assert (x - CLEAN).square().mean().sqrt() < 0.06

    table = sampler_table(diffusion, sampler, 20)
    own = start().numpy()
    for row in ({name: float(column[i]) for name, column in table.items()} for i in range(20)):
        out = predict(torch.from_numpy(own).double(), row["t"]).float().numpy()
        own = update(row, own, out, None, None)
    assert np.abs(own - CLEAN.numpy()).max() < 0.06


def test_the_variance_that_is_refused_makes_no_number_in_diffusers() -> None:
    assert np.isnan(diffusers_run(DDPMScheduler(variance_type="fixed_large_log"), STEPS, 3)).any()
