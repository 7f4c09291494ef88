"""Schedulers of diffusers: every class that there is, every key of those that are taken, held to diffusers itself."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import trajectory_table
from ditc.diffusion import alphas_cumprod
from ditc.errors import CheckpointError, InputError
from ditc.exporter.schedulers import ABSENT, REFUSED, SCHEDULERS, process_from_scheduler
from ditc.runtime.samplers import adds_noise, needs_noise, no_pairs, sampler_table, update
from ditc.spec import DiffusionSpec, SamplerSpec, SchedulerSpec

# diffusers hands torch tensors to NumPy in a way that NumPy 2 deprecates
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

Settings = dict[str, Any]

EXACT = sorted(name for name, row in SCHEDULERS.items() if row.exact)
OWN = sorted(name for name, row in SCHEDULERS.items() if not row.exact)
# that can't be read off with any settings -> the reason
NO_RECURRENCE = {
    "DPMSolverSDEScheduler": "more often than it has steps",
    "HeunDiscreteScheduler": "calls the network 15 times in 8 steps",
    "KDPM2DiscreteScheduler": "calls the network 15 times in 8 steps",
    "KDPM2AncestralDiscreteScheduler": "calls the network 15 times in 8 steps",
}
SOURCES = Path(diffusers.__file__).parent / "schedulers"
STEPS, OTHER_STEPS = 8, 7  # one that divides 1000 and one that doesn't
SHAPE = (2, 3, 4, 4)


def signatures() -> dict[str, Settings]:
    """class -> the defaults of its __init__, of all schedulers in diffusers' sources; none is imported.

    Some classes can't be imported without packages of their own.
    """
    defaults: dict[str, Settings] = {}
    for path in sorted(SOURCES.rglob("scheduling_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any("ConfigMixin" in ast.unparse(base) for base in node.bases):
                defaults[node.name] = _defaults(node)
    return defaults


def _defaults(node: ast.ClassDef) -> Settings:
    (init,) = (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    names = [argument.arg for argument in init.args.args][1:]
    values = [None] * (len(names) - len(init.args.defaults)) + list(init.args.defaults)
    return {name: None if value is None else ast.unparse(value) for name, value in zip(names, values, strict=True)}


SIGNATURES = signatures()


def written(path: Path, kind: str, **settings: Any) -> Path:
    """A scheduler's configuration with nothing in it but these settings."""
    path.write_text(json.dumps({"_class_name": kind, "_diffusers_version": "0.12.0", **settings}))
    return path


def read(path: Path, *, learned_sigma: bool = False) -> tuple[DiffusionSpec, SamplerSpec, tuple[str, ...]]:
    return process_from_scheduler(path, learned_sigma=learned_sigma)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 400
    return message


def test_every_class_of_diffusers_is_in_one_of_the_tables() -> None:
    assert len(SIGNATURES) > 45
    exported = {name for name in dir(diffusers) if name.endswith("Scheduler") and name[0].isupper()}
    unknown = (SIGNATURES.keys() | exported) - SCHEDULERS.keys() - REFUSED.keys()
    assert unknown == set()
    assert not SCHEDULERS.keys() & REFUSED.keys()


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
def test_the_keys_of_a_class_and_their_defaults_are_its_own(kind: str) -> None:
    keys, signature = SCHEDULERS[kind].keys, SIGNATURES[kind]
    assert keys.known == signature.keys()
    defaults = {**keys.read, **{key: default for key, (default, _) in keys.fixed.items()}}
    infinite = {"lambda_min_clipped": -float("inf")} if "lambda_min_clipped" in signature else {}
    assert defaults == infinite | {key: ast.literal_eval(signature[key]) for key in defaults if key not in infinite}


@pytest.mark.parametrize("kind", sorted(set(SCHEDULERS) - {"DPMSolverSDEScheduler"}))
def test_the_sources_say_what_the_classes_have(kind: str) -> None:
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    for key, value in SCHEDULERS[kind].keys.read.items():
        assert parameters[key].default == value


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_class_of_another_kind_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "scheduler_config.json", kind))
    assert kind in message
    assert REFUSED[kind] in message


@pytest.mark.parametrize("kind", ["MyScheduler", "", "ddim", None, 7, ["module", "MyScheduler"]])
def test_an_unknown_class_is_refused(kind: Any, tmp_path: Path) -> None:
    assert "no scheduler that ditc knows" in refusal(written(tmp_path / "scheduler_config.json", kind))


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
def test_keys_of_former_releases_are_harmless_at_one_value_and_else_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    expected = read(written(path, kind))
    assert read(written(path, kind, predict_epsilon=True, timestep_values=None)) == expected
    for value in (False, 1, None, "true"):
        assert 'write "prediction_type": "sample" instead' in refusal(written(path, kind, predict_epsilon=value))
    assert "timestep_values is [1]" in refusal(written(path, kind, timestep_values=[1]))


def prediction_of(x: Tensor, t: float, channels: int) -> Tensor:
    """A smooth stand-in for a network, (n, 3, h, w) -> (n, channels, h, w)."""
    out = torch.tanh(1.3 * x + 0.1 * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape) + t / 700)
    return out if channels == x.shape[1] else torch.cat([out, torch.cos(3 * x)], dim=1)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def diffusers_run(scheduler: Any, steps: int, channels: int) -> np.ndarray[Any, Any]:
    """All samples of a run of diffusers' own class, noise seeded."""
    scheduler.set_timesteps(steps)
    fresh, x, samples = torch.Generator().manual_seed(3), start(), []
    for t in scheduler.timesteps:
        x = scheduler.step(prediction_of(x, float(t), channels), int(t), x, generator=fresh).prev_sample
        samples.append(x.numpy())
    return np.stack(samples)


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


# key -> other values than the default, each a file of its own
VALUES: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (400,),
    "beta_start": (0.002,),
    "beta_end": (0.03,),
    "beta_schedule": ("scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("v_prediction", "sample"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "steps_offset": (1,),
    "clip_sample": (False,),
    "clip_sample_range": (0.3,),
    "set_alpha_to_one": (False,),
    "variance_type": ("fixed_small_log", "fixed_large", "learned_range"),
}


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


def test_a_config_without_clip_sample_clips_as_diffusers_does(tmp_path: Path) -> None:
    _, sampler, _ = read(written(tmp_path / "s.json", "DDIMScheduler", beta_schedule="linear"))
    assert sampler.clip == 1.0
    assert DDIMScheduler.from_config({}).config.clip_sample


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


@pytest.mark.parametrize("kind", OWN)
def test_what_concerns_thresholds_and_flows_that_are_off_changes_nothing(kind: str, tmp_path: Path) -> None:
    plain = read(written(tmp_path / "s.json", kind))
    for key in SCHEDULERS[kind].keys.harmless:
        assert read(written(tmp_path / "s.json", kind, **{key: True})) == plain


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
def test_a_key_that_has_to_have_one_value_is_refused_with_another(kind: str, tmp_path: Path) -> None:
    fixed = SCHEDULERS[kind].keys.fixed
    assert "trained_betas" in fixed
    for key, (_, wanted) in fixed.items():
        for value in (not wanted, [0.1, 0.2], "other", 1):
            assert f"{key} is " in refusal(written(tmp_path / "s.json", kind, **{key: value}))


def test_the_betas_of_a_long_list_are_not_all_in_the_message(tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "s.json", "DDIMScheduler", trained_betas=[0.001] * 1000))
    assert "trained_betas is [0.001, 0.001" in message


WRONG: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (0, 1, -5, 1000.0, "1000", True, None, [1000], 10**9),
    "beta_start": (0, -0.1, 1, "0.1", True, None, float("nan"), float("inf"), 0.5),
    "beta_end": (0, 1, 2, "0.02", False, None, float("nan"), -float("inf"), 1e-9),
    "beta_schedule": ("sigmoid", "laplace", "exp", "", None, 3, ["linear"], {}),
    "prediction_type": ("flow_prediction", "original_sample", "x0", None, 1),
    "timestep_spacing": ("karras", "", None, 2),
    "steps_offset": (-1, 0.5, "1", True, None),
    "clip_sample": ("true", 1, None, 0),
    "clip_sample_range": (0, -1, "1", None, float("nan"), True),
    "set_alpha_to_one": (1, "yes", None),
    "variance_type": ("learned", "fixed_large_log", "", None, 1),
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (1, "yes", None)),
    **dict.fromkeys(("use_lu_lambdas", "euler_at_final", "lower_order_final", "predict_x0"), (0, "no", None)),
    "skip_prk_steps": (1, "yes", None),
    **dict.fromkeys(("solver_order", "predictor_order", "corrector_order"), (0, -1, 2.0, True, "2", None)),
    **dict.fromkeys(("algorithm_type", "solver_type", "final_sigmas_type", "interpolation_type"), (1, None, ["heun"])),
    **dict.fromkeys(("sigma_min", "sigma_max", "noise_sampler_seed"), ("1", True, float("nan"), float("inf"))),
    "lambda_min_clipped": ("1", True, None, float("nan"), float("inf")),
    "disable_corrector": (None, 1, [0.5], ["0"], [True]),
}


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
def test_a_value_that_can_not_be_is_refused_by_its_key(kind: str, tmp_path: Path) -> None:
    keys = SCHEDULERS[kind].keys
    for key in keys.read:
        for value in WRONG[key]:
            message = refusal(written(tmp_path / "s.json", kind, **{"clip_sample": True, key: value}))
            assert key in message, value


def test_betas_that_fall_are_refused(tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "s.json", "DDPMScheduler", beta_start=0.02, beta_end=0.0001))
    assert "beta_start 0.02 lies above beta_end 0.0001" in message


def test_the_variance_that_is_refused_makes_no_number_in_diffusers() -> None:
    assert np.isnan(diffusers_run(DDPMScheduler(variance_type="fixed_large_log"), STEPS, 3)).any()


@pytest.mark.parametrize(
    ("kind", "foreign"),
    [
        ("DDIMScheduler", {"skip_prk_steps": True, "solver_order": 2, "use_karras_sigmas": True}),
        ("PNDMScheduler", {"clip_sample": True}),
        ("DPMSolverMultistepScheduler", {"clip_sample": True, "set_alpha_to_one": False}),
        ("DPMSolverSinglestepScheduler", {"timestep_spacing": "trailing", "steps_offset": 1}),
    ],
)
def test_keys_of_other_classes_are_left_out_as_diffusers_leaves_them_out(
    kind: str, foreign: Settings, tmp_path: Path
) -> None:
    """Files that were saved after a change of the class hold them."""
    assert read(written(tmp_path / "s.json", kind, **foreign)) == read(written(tmp_path / "t.json", kind))
    own = getattr(diffusers, kind)
    given = own.from_config({"_class_name": kind, **foreign})
    assert inspect.signature(own.__init__).parameters.keys() & foreign.keys() == set()
    assert torch.equal(given.alphas_cumprod, own().alphas_cumprod)


@pytest.mark.parametrize("kind", sorted(SCHEDULERS))
def test_a_key_that_nobody_knows_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    message = refusal(written(tmp_path / "s.json", kind, snr_gamma=5.0, _private=1))
    assert f"snr_gamma (5.0) is no key of a {kind}" in message


def test_keys_that_diffusers_takes_from_the_class_are_taken_from_it(tmp_path: Path) -> None:
    settings: Settings = {"clip_sample": False, "beta_end": 0.5, "_use_default_values": ["clip_sample", "beta_end"]}
    diffusion, sampler, _ = read(written(tmp_path / "s.json", "DDIMScheduler", **settings))
    own = DDIMScheduler.from_config(settings)
    assert (own.config.clip_sample, own.config.beta_end) == (True, 0.02)
    assert (sampler.clip, diffusion.beta_end) == (1.0, 0.02)


def test_what_a_class_has_no_key_for_is_what_it_does() -> None:
    assert ABSENT["timestep_spacing"] == "linspace"
    singlestep = diffusers.DPMSolverSinglestepScheduler()
    singlestep.set_timesteps(5)
    multistep = DPMSolverMultistepScheduler(timestep_spacing="linspace")
    multistep.set_timesteps(5)
    assert singlestep.timesteps.tolist() == multistep.timesteps.tolist()
    for scheduler in (EulerDiscreteScheduler(), DPMSolverMultistepScheduler(), PNDMScheduler()):
        assert not hasattr(scheduler.config, "clip_sample")
    assert not HeunDiscreteScheduler().config.clip_sample


def saved(scheduler: Any, folder: Path) -> Path:
    scheduler.save_pretrained(folder)
    return folder / "scheduler_config.json"


DDIM = SamplerSpec(name="ddim", spacing="leading", clip=1.0)


def scheduler(kind: str, config: Settings, **settings: Any) -> SamplerSpec:
    return SamplerSpec(name="scheduler", scheduler=SchedulerSpec(kind=kind, config=config), **settings)


SAVED: dict[str, tuple[str, Settings, Settings, SamplerSpec]] = {
    "ddim": ("DDIMScheduler", {}, {}, DDIM),
    "released DiT": ("DDIMScheduler", {"clip_sample": False}, {}, DDIM.model_copy(update={"clip": None})),
    "clip range": ("DDIMScheduler", {"clip_sample_range": 2.5}, {}, DDIM.model_copy(update={"clip": 2.5})),
    "trailing": (
        "DDIMScheduler",
        {"timestep_spacing": "trailing"},
        {},
        DDIM.model_copy(update={"spacing": "trailing"}),
    ),
    "linspace": (
        "DDIMScheduler",
        {"timestep_spacing": "linspace"},
        {},
        DDIM.model_copy(update={"spacing": "linspace"}),
    ),
    "offset": ("DDIMScheduler", {"steps_offset": 1}, {}, DDIM.model_copy(update={"offset": 1})),
    "first alpha": (
        "DDIMScheduler",
        {"set_alpha_to_one": False},
        {},
        DDIM.model_copy(update={"final_alpha_one": False}),
    ),
    "v": ("DDIMScheduler", {"prediction_type": "v_prediction"}, {"prediction": "v"}, DDIM),
    "sample": ("DDIMScheduler", {"prediction_type": "sample"}, {"prediction": "sample"}, DDIM),
    "scaled": (
        "DDIMScheduler",
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.012},
        {"beta_schedule": "scaled-linear", "beta_start": 0.001, "beta_end": 0.012},
        DDIM,
    ),
    "cosine": ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "squared-cosine"}, DDIM),
    "train steps": ("DDIMScheduler", {"num_train_timesteps": 400}, {"train_steps": 400}, DDIM),
    "ddpm": ("DDPMScheduler", {}, {}, DDIM.model_copy(update={"name": "ddpm"})),
    "learned variance": (
        "DDPMScheduler",
        {"variance_type": "learned_range", "clip_sample": False},
        {},
        SamplerSpec(name="ddpm", spacing="leading", variance="learned"),
    ),
    "large variance": (
        "DDPMScheduler",
        {"variance_type": "fixed_large"},
        {},
        DDIM.model_copy(update={"name": "ddpm", "variance": "fixed-large"}),
    ),
    "pndm": ("PNDMScheduler", {}, {}, scheduler("PNDMScheduler", {}, spacing="leading", final_alpha_one=False)),
    "dpm": (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "use_karras_sigmas": True, "timestep_spacing": "trailing", "steps_offset": 1},
        {},
        scheduler("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, spacing="trailing"),
    ),
    "heun": (
        "HeunDiscreteScheduler",
        {},
        {"beta_start": 0.00085, "beta_end": 0.012},
        scheduler("HeunDiscreteScheduler", {}),
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_diffusers_saves_is_read(name: str, tmp_path: Path) -> None:
    kind, settings, changes, expected = SAVED[name]
    diffusion, sampler, _ = read(saved(getattr(diffusers, kind)(**settings), tmp_path), learned_sigma=True)
    assert diffusion == DiffusionSpec(learned_sigma=True).model_copy(update=changes)
    assert sampler == expected


@pytest.mark.parametrize("kind", sorted(set(SCHEDULERS) - {"DPMSolverSDEScheduler"}))
def test_what_diffusers_saves_of_any_class_that_is_taken_has_no_strange_key(kind: str, tmp_path: Path) -> None:
    assert read(saved(getattr(diffusers, kind)(), tmp_path)) == read(written(tmp_path / "bare.json", kind))
