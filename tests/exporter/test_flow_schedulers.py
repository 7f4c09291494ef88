"""Schedulers of a flow in a folder: they sample as in diffusers, or are refused by key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers_folders import transformer
from scheduler_files import FLOW, SHAPE, STEPS, Settings, prediction_of, read, refusal, start, written

from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import trajectory_table
from ditc.errors import InputError
from ditc.exporter.diffusers_folder import dit_from_diffusers
from ditc.exporter.model_facts import ModelFacts
from ditc.exporter.models import load_model
from ditc.exporter.schedulers import FLOWS, SCHEDULERS, process_from_scheduler
from ditc.runtime.pipeline import load
from ditc.runtime.samplers import adds_noise, no_pairs, update
from ditc.runtime.starting import noise_shares
from ditc.spec import DiffusionSpec, SamplerSpec, SchedulerSpec

# diffusers hands torch tensors to NumPy in a way that NumPy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
CALLS = 2 * STEPS  # DEIS' tables in float32 are too rough for fewer
# keys -> other values than the default
VALUES: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (400,),
    "shift": (3.0, 0.5),
    "flow_shift": (3.0, 0.5),
    "use_karras_sigmas": (True,),
    "use_exponential_sigmas": (True,),
    "use_beta_sigmas": (True,),
    "shift_terminal": (0.1,),
    "stochastic_sampling": (True,),
    "solver_order": (1, 3),
    "algorithm_type": ("sde-dpmsolver++",),
    "solver_type": ("heun",),
    "final_sigmas_type": ("sigma_min",),
    "euler_at_final": (True,),
    "disable_corrector": ([0, 3],),
    "predictor_order": (1,),
    "corrector_order": (1,),
    "sigma_min": (0.01,),
    "sigma_max": (200.0,),
}
NEEDED: dict[str, Settings] = {"sigma_min": {"use_karras_sigmas": True}, "sigma_max": {"use_karras_sigmas": True}}
# what of that a class doesn't have in diffusers either
NOT_THERE = {"DEISMultistepScheduler": ("algorithm_type",), "SASolverScheduler": ("algorithm_type",)}


def base(kind: str) -> Settings:
    return FLOW if kind in SCHEDULERS else {}


def variations(kind: str) -> Iterator[Settings]:
    """Nothing said; every key at every other value; the ends of noise levels that are of the betas."""
    yield {}
    for key in FLOWS[kind].keys.read:
        if key not in NOT_THERE.get(kind, ()):
            yield from ({**NEEDED.get(key, {}), key: value} for value in VALUES.get(key, ()))
    if "final_sigmas_type" in FLOWS[kind].own:
        yield {"final_sigmas_type": "sigma_min", "beta_start": 1e-3, "beta_schedule": "scaled_linear"}
    if kind == EULER:
        yield {"shift": 2.0, "use_karras_sigmas": True, "shift_terminal": 0.05}


def diffusers_run(kind: str, settings: Settings, calls: int, **given: Any) -> np.ndarray[Any, Any]:
    """The last sample of a run of diffusers' own class on a stand-in for a network, and fresh noise if it draws any."""
    scheduler = getattr(diffusers, kind).from_config({**base(kind), **settings})
    scheduler.set_timesteps(calls, **given)
    fresh, x = torch.Generator().manual_seed(3), start()
    for t in scheduler.timesteps:
        more = {"generator": fresh} if kind not in ("DEISMultistepScheduler", "UniPCMultistepScheduler") else {}
        x = scheduler.step(prediction_of(x, float(t), 3), t, x, return_dict=False, **more)[0]
    return x.numpy()


def own_run(diffusion: DiffusionSpec, sampler: SamplerSpec, calls: int) -> np.ndarray[Any, Any]:
    table = trajectory_table(diffusion, sampler, calls)
    fresh, x, pairs = torch.Generator().manual_seed(3), start().numpy(), no_pairs(table)
    for row in ({name: float(column[i]) for name, column in table.items()} for i in range(calls)):
        z = torch.randn(SHAPE, generator=fresh).numpy() if adds_noise(table) else None
        out = prediction_of(torch.from_numpy(x), row["t"], 3).numpy()
        before, x = x, update(row, x, out, None, z, pairs).astype(np.float32)
        pairs.appendleft((before, out))
    return x


@pytest.mark.parametrize("kind", sorted(set(FLOWS) - {HEUN}))
def test_a_flow_is_sampled_as_diffusers_does_from_its_own_configuration(kind: str, tmp_path: Path) -> None:
    samples = []
    for settings in variations(kind):
        diffusion, sampler, about = read(written(tmp_path / "s.json", kind, **base(kind), **settings))
        assert about == ()
        assert diffusion == DiffusionSpec(
            prediction="flow", learned_sigma=False, train_steps=settings.get("num_train_timesteps", 1000)
        )
        assert sampler.scheduler is not None
        assert sampler.scheduler.config == {key: settings[key] for key in settings if key in FLOWS[kind].own}
        assert sampler.shift == settings.get("shift", settings.get("flow_shift"))
        samples.append(own_run(diffusion, sampler, CALLS))
        expected = diffusers_run(kind, settings, CALLS)
        gap = np.abs(samples[-1] - expected).max() / np.abs(expected).max()
        assert gap < 2e-5, f"{settings}: {gap}"
    assert len({sample.tobytes() for sample in samples}) > len(samples) / 2  # the keys say something


@pytest.mark.parametrize(
    ("kind", "settings", "key"),
    [
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas is missing, which"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "prediction_type is missing, which UniPCMultistep"),
        ("UniPCMultistepScheduler", {**FLOW, "use_beta_sigmas": True}, "use_beta_sigmas is true, expected false"),
        ("UniPCMultistepScheduler", {**FLOW, "use_dynamic_shifting": True}, "use_dynamic_shifting is true, expected"),
        ("DPMSolverMultistepScheduler", {**FLOW, "use_karras_sigmas": True}, "use_karras_sigmas is true, expected"),
        ("DPMSolverMultistepScheduler", {**FLOW, "use_lu_lambdas": True}, "use_lu_lambdas is true, expected false"),
        (EULER, {"invert_sigmas": True}, "invert_sigmas is true, expected false"),
        (EULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting is true, expected false: the number of tokens"),
        (EULER, {"sigma_data": 0.5}, "sigma_data (0.5) is no key of a FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_what_a_flow_can_not_have_is_refused_by_key(kind: str, settings: Settings, key: str, tmp_path: Path) -> None:
    assert key in refusal(written(tmp_path / "s.json", kind, **settings))


def test_keys_that_diffusers_takes_from_the_class_make_no_flow(tmp_path: Path) -> None:
    settings = {**FLOW, "_use_default_values": ["use_flow_sigmas", "prediction_type"]}
    kind = "UniPCMultistepScheduler"
    assert read(written(tmp_path / "s.json", kind, **settings)) == read(written(tmp_path / "t.json", kind))
    assert not diffusers.UniPCMultistepScheduler.from_config(settings).config["use_flow_sigmas"]


def test_noise_levels_that_are_shifted_twice_are_those_of_the_class(tmp_path: Path) -> None:
    """Euler's class shifts the ends of its levels, and what it spreads between them again."""
    diffusion, sampler, _ = read(written(tmp_path / "s.json", EULER, shift=3.0))
    table = trajectory_table(diffusion, sampler, 28)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    np.testing.assert_allclose(table["t"], scheduler.timesteps.numpy(), rtol=1e-6)
    assert table["t"][-1] == pytest.approx(8.93, abs=0.005)
    signal, noise = noise_shares(diffusion, table)
    np.testing.assert_allclose(noise, scheduler.sigmas[:-1].numpy(), atol=1e-6)
    np.testing.assert_allclose(signal + noise, 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 16384])
def test_a_dynamic_shift_is_that_of_diffusers_pipelines_for_so_many_tokens(
    kind: str, tokens: int, tmp_path: Path
) -> None:
    ends = {"base_shift": 0.6, "max_shift": 1.3, "base_image_seq_len": 200, "max_image_seq_len": 4000}
    settings: Settings = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift": 7.0, **ends}
    path = written(tmp_path / "s.json", EULER, **settings)
    diffusion, sampler, about = process_from_scheduler(path, learned_sigma=False, tokens=tokens)
    mu = calculate_shift(tokens, 200, 4000, 0.6, 1.3)
    assert sampler.shift == pytest.approx(math.exp(mu) if kind == "exponential" else mu)
    assert about == (
        f"noise levels of the flow shifted by {sampler.shift:.4g}, as use_dynamic_shifting has it for {tokens} tokens",
    )
    expected = diffusers_run(EULER, settings, STEPS, mu=mu)
    assert np.abs(own_run(diffusion, sampler, STEPS) - expected).max() < 2e-5 * np.abs(expected).max()
    chosen = CompileOptions(shift=2.0).sampler_spec(sampler)
    other = {**settings, "use_dynamic_shifting": True}
    expected = diffusers_run(EULER, other, STEPS, mu=math.log(2) if kind == "exponential" else 2.0)
    assert np.abs(own_run(diffusion, chosen, STEPS) - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("settings", "tokens", "message"),
    [
        ({"max_image_seq_len": 256}, 64, "max_image_seq_len is 256, expected more than base_image_seq_len, 256"),
        (
            {"max_shift": -90.0, "time_shift_type": "linear"},
            4096,
            "expected one that gives 4096 tokens a shift above 0",
        ),
        ({"max_shift": 1e6}, 8192, "max_shift is 1000000.0, expected one that gives 8192 tokens a shift above 0"),
    ],
)
def test_a_dynamic_shift_that_can_not_be_is_refused_by_key(
    settings: Settings, tokens: int, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "s.json", EULER, use_dynamic_shifting=True, **settings)
    with pytest.raises(InputError) as refused:
        process_from_scheduler(path, learned_sigma=False, tokens=tokens)
    assert message in str(refused.value)


def test_keys_of_a_dynamic_shift_that_is_off_change_nothing(tmp_path: Path) -> None:
    plain = read(written(tmp_path / "s.json", EULER))
    off = {"base_shift": None, "max_shift": 9.0, "base_image_seq_len": 1, "time_shift_type": "linear"}
    assert read(written(tmp_path / "s.json", EULER, **off)) == plain


def test_a_flow_s_shift_stays_with_another_sampler_and_a_formula_over_betas_is_refused(tmp_path: Path) -> None:
    diffusion, own, _ = read(written(tmp_path / "s.json", EULER, shift=3.0, shift_terminal=0.1))
    assert own.scheduler == SchedulerSpec(kind=EULER, config={"shift_terminal": 0.1})
    chosen = CompileOptions(sampler="unipc").sampler_spec(own)
    assert chosen == SamplerSpec(name="unipc", shift=3.0)
    assert len(trajectory_table(diffusion, chosen, STEPS)["t"]) == STEPS
    for name in ("ddim", "ddpm"):
        with pytest.raises(InputError, match=f"--sampler {name} is for a process over betas, and the model predicts a"):
            trajectory_table(diffusion, CompileOptions(sampler=name).sampler_spec(own), STEPS)


def test_heun_s_flow_is_refused_unless_another_sampler_is_chosen(tmp_path: Path) -> None:
    diffusion, own, _ = read(written(tmp_path / "s.json", HEUN, shift=2.0))
    with pytest.raises(InputError) as refused:
        trajectory_table(diffusion, own, STEPS)
    assert f"{HEUN} can't be taken: it calls the network 15 times in 8 steps" in str(refused.value)
    assert str(refused.value).endswith(
        "choose a sampler for the same flow, for example --sampler euler or --sampler dpm++2m"
    )
    assert CompileOptions(sampler="euler").sampler_spec(own) == SamplerSpec(name="euler", shift=2.0)


SCHEDULERS_OF_FOLDERS = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, solver_order=3),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
}


def folder_of(tmp_path: Path, name: str) -> Path:
    transformer(out_channels=8).save_pretrained(tmp_path / "transformer")
    SCHEDULERS_OF_FOLDERS[name]().save_pretrained(tmp_path / "scheduler")
    return tmp_path


@pytest.mark.parametrize("name", SCHEDULERS_OF_FOLDERS)
def test_a_bundle_of_a_folder_of_a_flow_walks_as_its_transformer_and_scheduler_do(
    name: str, quick_options: CompileOptions, tmp_path: Path, compiled_once: Any
) -> None:
    folder, labels = folder_of(tmp_path, name), [1, 4]
    changes = {"policy": "none", "precision": "fp32", "vc": "none", "cfg": 3.0}
    model, options = dit_from_diffusers(folder), quick_options.model_copy(update=changes)
    noise, *fresh = np.random.default_rng(2).standard_normal((1 + options.steps, 2, 4, 8, 8), dtype=np.float32)
    with load(compiled_once(model, options).path) as pipe:
        latents = pipe.executor.last(pipe.request(labels), noise, lambda step: fresh[step])
    expected = walked_by_diffusers(folder, noise, fresh, labels, options.steps)
    assert np.abs(latents - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_folder_s_doubt_names_the_file_that_says_otherwise(tmp_path: Path) -> None:
    (line,) = load_model(str(folder_of(tmp_path, "euler"))).spec.doubts  # of random weights
    assert line.endswith("(scheduler_config.json)")


def test_a_folder_without_a_scheduler_may_be_said_to_predict_a_flow(tmp_path: Path) -> None:
    transformer().save_pretrained(tmp_path / "transformer")
    spec = dit_from_diffusers(tmp_path, ModelFacts(prediction="flow")).spec
    assert (spec.family, spec.diffusion.prediction) == ("dit", "flow")
    assert spec.sampler == SamplerSpec(name="euler", spacing="trailing")
    with pytest.raises(InputError, match="takes timesteps of 1000 at the noise to 0 at the data, found 1:0"):
        dit_from_diffusers(tmp_path, ModelFacts(prediction="flow", flow_times="1:0"))


@torch.no_grad()
def walked_by_diffusers(
    folder: Path, noise: np.ndarray, fresh: list[np.ndarray], labels: list[int], steps: int
) -> np.ndarray[Any, Any]:
    """The loop of diffusers' DiTPipeline, guidance 3 on all channels, on given noise."""
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer")
    entries = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, entries["_class_name"]).from_config(entries)
    scheduler.set_timesteps(steps)
    x, drawn = torch.from_numpy(noise), iter(fresh)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "randn", lambda *_, **__: torch.from_numpy(next(drawn)))
        for t in scheduler.timesteps:
            rows = torch.tensor([*labels, 10, 10])
            out = theirs(torch.cat([x, x]), timestep=t.expand(4), class_labels=rows).sample[:, :4]
            own, free = out.chunk(2)
            x = scheduler.step(free + 3.0 * (own - free), t, x, return_dict=False)[0]
    return x.numpy()
