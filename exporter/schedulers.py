"""Schedulers of diffusers as a process and a sampler: every key of a configuration is read, or refused by its name.

DDIM and DDPM have formulas of their own. Other classes, over betas or a flow, are taken as they are, read off when a
compile plans its steps (`exporter.multistep`): one that can't be read off is refused there, unless another sampler is
chosen for its process. Refused here is a class whose process is another one, or is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ditc.errors import CheckpointError
from ditc.exporter.config_files import DEFAULTED, Config, class_named, config_of, read_json, spelled
from ditc.exporter.scheduler_classes import DYNAMIC, FLOWS, REFUSED, SCHEDULERS, SIGMAS, SchedulerClass
from ditc.spec import DiffusionSpec, SamplerSpec, SchedulerSpec

__all__ = ["FLOWS", "REFUSED", "SCHEDULERS", "SchedulerClass", "process_from_scheduler"]

Assumed = tuple[str, ...]
NOTHING: Assumed = ()

BETA_SCHEDULES: dict[str, Literal["linear", "scaled-linear", "squared-cosine"]] = {
    "linear": "linear",
    "scaled_linear": "scaled-linear",
    "squaredcos_cap_v2": "squared-cosine",
}
PREDICTIONS: dict[str, Literal["epsilon", "v", "sample"]] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
}
SPACINGS: dict[str, Literal["linspace", "leading", "trailing"]] = {
    "linspace": "linspace",
    "leading": "leading",
    "trailing": "trailing",
}
# not fixed_large_log: diffusers takes the root of a logarithm there, so that its samples are NaN
VARIANCES: dict[str, Literal["learned", "fixed-small", "fixed-large"]] = {
    "learned_range": "learned",
    "fixed_small": "fixed-small",
    "fixed_small_log": "fixed-small",
    "fixed_large": "fixed-large",
}

# of a class that has no such key
ABSENT = {"timestep_spacing": "linspace", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": False}
# every key of a class that is taken: diffusers leaves out those that are not the named class's own
ANY_CLASS = {key for row in (*SCHEDULERS.values(), *FLOWS.values()) for key in row.keys.known} | {"tensor_format"}
# keys that classes had once -> the value that changes nothing, and what to do about another one
FORMER: dict[str, tuple[Any, str]] = {
    "predict_epsilon": (True, 'of a model that predicts the clean sample write "prediction_type": "sample" instead'),
    "timestep_values": (None, "diffusers left them out of the sampling"),
}


def process_from_scheduler(
    path: Path, *, learned_sigma: bool, loaded_as: str | None = None, tokens: int | None = None
) -> tuple[DiffusionSpec, SamplerSpec, Assumed]:
    """(diffusion process, default sampler, what was assumed) of a scheduler's configuration file.

    `loaded_as` is the class that a pipeline's index names: diffusers takes it, whatever the file says. `tokens` are
    those of one image, on which a dynamic shift of a flow hangs. Raises CheckpointError for a class, a key or a value
    that can't be had.
    """
    entries = _without_former(path, read_json(path, "the scheduler's configuration"))
    kind = class_named(entries)
    about: Assumed = ()
    if loaded_as not in (None, kind):
        about = (f"the scheduler is of {loaded_as}, as model_index.json has it, not of {kind} ({path.name})",)
        kind, entries = str(loaded_as), {**entries, "_class_name": loaded_as}
    if kind not in SCHEDULERS.keys() | FLOWS.keys():
        reason = REFUSED.get(kind, "no scheduler that ditc knows")
        raise CheckpointError(
            f"{path} is of {kind}: {reason}; expected a diffusion over betas or a flow, like DDIMScheduler or "
            "FlowMatchEulerDiscreteScheduler (docs/models.md)"
        )
    if kind in FLOWS and (kind not in SCHEDULERS or _samples_a_flow(entries)):
        config = config_of(path, entries, FLOWS[kind].keys, ANY_CLASS)
        diffusion, sampler, about_shift = _flow(config, FLOWS[kind], learned_sigma, tokens)
        return diffusion, sampler, (*about, *about_shift)
    row = SCHEDULERS[kind]
    config = config_of(path, entries, row.keys, ANY_CLASS)
    diffusion, sampler = _diffusion(config, learned_sigma), _sampler(config, row)
    return diffusion, sampler, (*about, *_assumed(kind, sampler))


def _samples_a_flow(entries: Mapping[str, Any]) -> bool:
    """Do the keys of a class over betas say that its model predicts a flow, or its noise levels are those of one?"""
    defaulted = entries.get(DEFAULTED) or ()
    given = {key: value for key, value in entries.items() if key not in defaulted}
    return given.get("prediction_type") == "flow_prediction" or given.get("use_flow_sigmas") is True


def _flow(
    config: Config, row: SchedulerClass, learned_sigma: bool, tokens: int | None
) -> tuple[DiffusionSpec, SamplerSpec, Assumed]:
    """(process, sampler, what was assumed) of a class that samples a flow."""
    steps = config.whole("num_train_timesteps", least=2)
    diffusion = DiffusionSpec(train_steps=steps, prediction="flow", learned_sigma=learned_sigma)
    scheduler = _scheduler(config, row)
    shift, about = config.number("flow_shift" if "flow_shift" in config.values else "shift", above=0), NOTHING
    if DYNAMIC.keys() <= row.keys.read.keys() and config.flag("use_dynamic_shifting"):
        shift, dynamic, about = _dynamic_shift(config, tokens)
        scheduler = scheduler.model_copy(update={"config": {**scheduler.config, **dynamic}})
    sampler = SamplerSpec(name="scheduler", scheduler=scheduler, shift=None if shift == 1 else shift)
    return diffusion, sampler, about


# what a dynamic shift takes for the number that hangs on the tokens -> the shift that this amounts to
TIME_SHIFTS: Mapping[str, Callable[[float], float]] = {"exponential": math.exp, "linear": float}


def _dynamic_shift(config: Config, tokens: int | None) -> tuple[float, dict[str, Any], Assumed]:
    """(shift, the keys that tell the class of it, a line about it): diffusers' `calculate_shift` of its pipelines."""
    if tokens is None:
        raise config.error("use_dynamic_shifting", "false: the number of tokens, which the shift hangs on, isn't known")
    least, most = config.whole("base_image_seq_len"), config.whole("max_image_seq_len")
    if most <= least:
        raise config.error("max_image_seq_len", f"more than base_image_seq_len, {least}")
    of_least, of_most = config.number("base_shift"), config.number("max_shift")
    shift_of = config.one_of("time_shift_type", TIME_SHIFTS)
    mu = of_least + (tokens - least) * (of_most - of_least) / (most - least)
    try:
        shift = shift_of(mu)
    except OverflowError:
        shift = math.inf
    if not 0 < shift < math.inf:
        raise config.error("max_shift", f"one that gives {tokens} tokens a shift above 0, found {shift:g}")
    names = ("use_dynamic_shifting", "time_shift_type")
    about = f"noise levels of the flow shifted by {shift:.4g}, as use_dynamic_shifting has it for {tokens} tokens"
    return shift, {key: config.values[key] for key in names if config.values[key] != DYNAMIC[key]}, (about,)


def _without_former(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without keys of FORMER. Raises CheckpointError for one that changes something."""
    for key, (harmless, advice) in FORMER.items():
        value = entries.get(key, harmless)
        if type(value) is not type(harmless) or value != harmless:
            raise CheckpointError(f"{path}: {key} is {spelled(value)}, expected {spelled(harmless)}; {advice}")
    return {key: value for key, value in entries.items() if key not in FORMER}


def _diffusion(config: Config, learned_sigma: bool) -> DiffusionSpec:
    try:
        return DiffusionSpec(
            train_steps=config.whole("num_train_timesteps", least=2),
            beta_schedule=config.one_of("beta_schedule", BETA_SCHEDULES),
            beta_start=config.number("beta_start", above=0, below=1),
            beta_end=config.number("beta_end", above=0, below=1),
            prediction=config.one_of("prediction_type", PREDICTIONS),
            learned_sigma=learned_sigma,
        )
    except ValidationError as e:  # each is right by itself
        raise CheckpointError(f"{config.path}: {e.errors()[0]['msg']}; expected betas that grow") from e


def _sampler(config: Config, row: SchedulerClass) -> SamplerSpec:
    full = Config(config.path, config.kind, {**ABSENT, **config.values}, config.absent)
    spacing, offset = full.one_of("timestep_spacing", SPACINGS), full.whole("steps_offset", least=0)
    clips = full.flag("clip_sample")
    return SamplerSpec(
        name=row.sampler,
        spacing=spacing,
        offset=offset if spacing == "leading" else 0,  # as diffusers has it
        variance=full.one_of("variance_type", VARIANCES) if row.sampler == "ddpm" else "fixed-small",
        final_alpha_one=full.flag("set_alpha_to_one"),
        clip=full.number("clip_sample_range", above=0) if clips else None,
        scheduler=None if row.exact else _scheduler(config, row),
    )


def _word(config: Config, key: str) -> str:
    value = config.values[key]
    if not isinstance(value, str):
        raise config.error(key, "a name")
    return value  # whether the class knows it, it says when it is read off


def _bound(config: Config, key: str) -> float | None:
    return None if config.values[key] is None else config.number(key)


def _lowest(config: Config, key: str) -> float:
    return -math.inf if config.values[key] == -math.inf else config.number(key)


def _share(config: Config, key: str) -> float | None:
    return None if config.values[key] is None else config.number(key, above=0, below=1)


def _beta(config: Config, key: str) -> float:
    return config.number(key, above=0, below=1)


def _betas(config: Config, key: str) -> str:
    config.one_of(key, BETA_SCHEDULES)
    return str(config.values[key])


def _steps(config: Config, key: str) -> list[int]:
    value = config.values[key]
    if not isinstance(value, list) or any(type(step) is not int for step in value):
        raise config.error(key, "a list of steps")
    return value


# keys about how a class integrates -> how the value of one is read
OWN_KEYS: Mapping[str, Callable[[Config, str], Any]] = {
    **dict.fromkeys((*SIGMAS, "use_lu_lambdas", "euler_at_final", "lower_order_final", "predict_x0"), Config.flag),
    **dict.fromkeys(("skip_prk_steps", "set_alpha_to_one"), Config.flag),
    **dict.fromkeys(("solver_order", "predictor_order", "corrector_order"), Config.whole),
    **dict.fromkeys(("algorithm_type", "solver_type", "final_sigmas_type", "interpolation_type"), _word),
    **dict.fromkeys(("sigma_min", "sigma_max", "noise_sampler_seed"), _bound),
    **dict.fromkeys(("beta_start", "beta_end"), _beta),
    "stochastic_sampling": Config.flag,
    "shift_terminal": _share,
    "beta_schedule": _betas,
    "lambda_min_clipped": _lowest,
    "disable_corrector": _steps,
}


def _scheduler(config: Config, row: SchedulerClass) -> SchedulerSpec:
    """The class with what of its own keys is not its default."""
    values = {key: OWN_KEYS[key](config, key) for key in row.own}
    return SchedulerSpec(
        kind=config.kind, config={key: value for key, value in values.items() if value != row.own[key]}
    )


def _assumed(kind: str, sampler: SamplerSpec) -> Assumed:
    """The line about what the sampler does otherwise than the class does; none where it does the same."""
    if sampler.name == "ddim" and sampler.spacing != "leading":
        unless = " where the steps don't divide the training steps" if sampler.spacing == "trailing" else ""
        return (
            f"each step goes to the next timestep of the list; diffusers' {kind} with {sampler.spacing} spacing "
            f"subtracts a fixed stride{unless}",
        )
    ends_late = sampler.spacing == "trailing" or sampler.offset > 0
    if sampler.name == "ddpm" and ends_late and sampler.variance != "fixed-small":
        return (f"the last step adds no noise; diffusers' {kind} adds some where the last timestep is not 0",)
    return ()
