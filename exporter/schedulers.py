"""Schedulers of diffusers: an allow-list with the defaults of each class, and what is sampled with for it here.

DDIM and DDPM have formulas of their own. Other classes over betas are taken as they are, read off when a compile
plans its steps (`exporter.multistep`): one that can't be read off is refused there, unless another sampler is chosen
for its betas. Refused here is a class whose process is another one, or is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ditc.errors import CheckpointError
from ditc.exporter.config_files import Config, Keys, class_named, config_of, read_json, spelled
from ditc.spec import DiffusionSpec, SamplerSpec, SchedulerSpec

__all__ = ["REFUSED", "SCHEDULERS", "SchedulerClass", "process_from_scheduler"]

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

PROCESS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
SPACING = {"timestep_spacing": "linspace", "steps_offset": 0}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}

TRAINED = {"trained_betas": (None, None)}
NO_ZERO_SNR = {"rescale_betas_zero_snr": (False, False)}
NO_THRESHOLD = {"thresholding": (False, False)}
NO_FLOW = {"use_flow_sigmas": (False, False)}

OF_THRESHOLDING = dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value"), "thresholding is off")
OF_FLOWS = dict.fromkeys(
    ("flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"), "flow sigmas are off"
)
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
SOLVER = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "lambda_min_clipped": -math.inf,
}


@dataclass(frozen=True)
class SchedulerClass:
    """A class and its keys. `sampler` gives what it gives; "scheduler" is the class itself, with its `own` keys."""

    sampler: Literal["ddim", "ddpm", "scheduler"]
    keys: Keys
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Is there a formula here for the class?"""
        return self.sampler != "scheduler"


def _formula(sampler: Literal["ddim", "ddpm"], **read: Any) -> SchedulerClass:
    keys = Keys(
        read={**PROCESS, **SPACING, "timestep_spacing": "leading", **CLIP, **read},
        fixed={**TRAINED, **NO_ZERO_SNR, **NO_THRESHOLD},
        harmless=OF_THRESHOLDING,
    )
    return SchedulerClass(sampler, keys)


def _own(
    own: Mapping[str, Any],
    read: Mapping[str, Any] = SPACING,
    fixed: Mapping[str, Any] = {},
    flows: tuple[str, ...] = (),
) -> SchedulerClass:
    """A class that is read off; `own` are the defaults of its keys about how it integrates."""
    harmless = OF_THRESHOLDING if "thresholding" in fixed else {}
    harmless = harmless | {key: OF_FLOWS[key] for key in flows}
    return SchedulerClass("scheduler", Keys({**PROCESS, **read, **own}, {**TRAINED, **fixed}, harmless), own)


SHIFT = ("flow_shift", "use_dynamic_shifting", "time_shift_type")
MULTISTEP = {**NO_THRESHOLD, **NO_FLOW}
PREDICTED_VARIANCE = {"variance_type": (None, None)}  # is not linear
LATENT = {"beta_start": 8.5e-4, "beta_end": 1.2e-2}
END = {"final_sigmas_type": "zero"}
BOUNDS = {"sigma_min": None, "sigma_max": None}

SCHEDULERS: dict[str, SchedulerClass] = {
    "DDIMScheduler": _formula("ddim", set_alpha_to_one=True),
    "DDIMParallelScheduler": _formula("ddim", set_alpha_to_one=True),
    "DDPMScheduler": _formula("ddpm", variance_type="fixed_small"),
    "DDPMParallelScheduler": _formula("ddpm", variance_type="fixed_small"),
    "DPMSolverMultistepScheduler": _own(
        {**SOLVER, **SIGMAS, "use_lu_lambdas": False, "euler_at_final": False, **END},
        fixed={**MULTISTEP, **NO_ZERO_SNR, **PREDICTED_VARIANCE},
        flows=SHIFT,
    ),
    "DPMSolverSinglestepScheduler": _own(
        {**SOLVER, "lower_order_final": False, **SIGMAS, **END},
        read={},
        fixed={**MULTISTEP, **PREDICTED_VARIANCE},
        flows=SHIFT,
    ),
    "DPMSolverSDEScheduler": _own({**SIGMAS, "noise_sampler_seed": None}, read={**SPACING, **LATENT}),
    "DEISMultistepScheduler": _own(
        {
            "solver_order": 2,
            "algorithm_type": "deis",
            "solver_type": "logrho",
            "lower_order_final": True,
            **SIGMAS,
        },
        fixed=MULTISTEP,
        flows=SHIFT,
    ),
    "UniPCMultistepScheduler": _own(
        {
            "solver_order": 2,
            "solver_type": "bh2",
            "lower_order_final": True,
            "predict_x0": True,
            "disable_corrector": [],
            **SIGMAS,
            **END,
            **BOUNDS,
        },
        fixed={**MULTISTEP, **NO_ZERO_SNR, "solver_p": (None, None)},
        flows=(*SHIFT, "shift_terminal"),
    ),
    "SASolverScheduler": _own(
        {
            "predictor_order": 2,
            "corrector_order": 2,
            "algorithm_type": "data_prediction",
            "lower_order_final": True,
            **SIGMAS,
            "lambda_min_clipped": -math.inf,
        },
        fixed={**MULTISTEP, **PREDICTED_VARIANCE, "tau_func": (None, None)},
        flows=("flow_shift",),
    ),
    "EulerDiscreteScheduler": _own(
        {**SIGMAS, "interpolation_type": "linear", **BOUNDS, **END},
        fixed={"timestep_type": ("discrete", "discrete"), **NO_ZERO_SNR},
    ),
    "EulerAncestralDiscreteScheduler": _own({}, fixed=NO_ZERO_SNR),
    "HeunDiscreteScheduler": _own(SIGMAS, read={**SPACING, **LATENT, **CLIP, "clip_sample": False}),
    "KDPM2DiscreteScheduler": _own(SIGMAS, read={**SPACING, **LATENT}),
    "KDPM2AncestralDiscreteScheduler": _own(SIGMAS, read={**SPACING, **LATENT}),
    "LMSDiscreteScheduler": _own(SIGMAS),
    "PNDMScheduler": _own(
        {"skip_prk_steps": False, "set_alpha_to_one": False}, read={**SPACING, "timestep_spacing": "leading"}
    ),
}

FLOW = "its models are trained for flow matching"
DISTILLED = "its models are distilled for sampling in few steps of its own kind"
EXPLODING = "its noise process is variance exploding"
TOKENS = "its models make discrete tokens, not noise"
EDM = "its models are preconditioned over sigmas (EDM), not over betas"
INVERSE = "it adds noise to images instead of taking it away"
SHIFTED = "it shifts the signal-to-noise ratio of its betas"

# classes that diffusers has and whose models can't be sampled here -> why
REFUSED: dict[str, str] = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "CMStochasticIterativeScheduler": DISTILLED,
    "CogVideoXDDIMScheduler": SHIFTED,
    "CogVideoXDPMScheduler": SHIFTED,
    "ConsistencyDecoderScheduler": DISTILLED,
    "CosineDPMSolverMultistepScheduler": EDM,
    "DDIMInverseScheduler": INVERSE,
    "DDPMWuerstchenScheduler": "its noise process is continuous in time",
    "DPMSolverMultistepInverseScheduler": INVERSE,
    "DiscreteDDIMScheduler": TOKENS,
    "EDMDPMSolverMultistepScheduler": EDM,
    "EDMEulerScheduler": EDM,
    "EntropyBoundScheduler": TOKENS,
    "FlowMapEulerDiscreteScheduler": FLOW,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "FlowMatchLCMScheduler": FLOW,
    "HeliosDMDScheduler": FLOW,
    "HeliosScheduler": FLOW,
    "IPNDMScheduler": "its noise process is a sine over continuous time",
    "KarrasVeScheduler": EXPLODING,
    "LCMScheduler": DISTILLED,
    "LTXEulerAncestralRFScheduler": FLOW,
    "MiniMaxH3Scheduler": FLOW,
    "PiflowScheduler": FLOW,
    "RFD4ProteinaScheduler": FLOW,
    "RePaintScheduler": "it fills in parts of given images",
    "SCMScheduler": DISTILLED,
    "ScoreSdeVeScheduler": EXPLODING,
    "ScoreSdeVpScheduler": "its noise process is continuous in time",
    "TCDScheduler": DISTILLED,
    "UnCLIPScheduler": "it is made for the prior and decoder of unCLIP",
    "VQDiffusionScheduler": TOKENS,
}

# of a class that has no such key
ABSENT = {"timestep_spacing": "linspace", "steps_offset": 0, "set_alpha_to_one": True, "clip_sample": False}
# every key of a class that is taken: diffusers leaves out those that are not the named class's own
ANY_CLASS = {key for row in SCHEDULERS.values() for key in row.keys.known} | {"tensor_format"}
# keys that classes had once -> the value that changes nothing, and what to do about another one
FORMER: dict[str, tuple[Any, str]] = {
    "predict_epsilon": (True, 'of a model that predicts the clean sample write "prediction_type": "sample" instead'),
    "timestep_values": (None, "diffusers left them out of the sampling"),
}


def process_from_scheduler(
    path: Path, *, learned_sigma: bool, loaded_as: str | None = None
) -> tuple[DiffusionSpec, SamplerSpec, tuple[str, ...]]:
    """(diffusion process, default sampler, what was assumed) of a scheduler's configuration file.

    `loaded_as` is the class that a pipeline's index names: diffusers takes it, whatever the file says. Raises
    CheckpointError for a class, a key or a value that can't be had.
    """
    entries = _without_former(path, read_json(path, "the scheduler's configuration"))
    kind = class_named(entries)
    about: tuple[str, ...] = ()
    if loaded_as not in (None, kind):
        about = (f"the scheduler is of {loaded_as}, as model_index.json has it, not of {kind} ({path.name})",)
        kind, entries = str(loaded_as), {**entries, "_class_name": loaded_as}
    if kind not in SCHEDULERS:
        reason = REFUSED.get(kind, "no scheduler that ditc knows")
        raise CheckpointError(
            f"{path} is of {kind}: {reason}; expected a diffusion over betas, like DDIMScheduler (docs/models.md)"
        )
    row = SCHEDULERS[kind]
    config = config_of(path, entries, row.keys, ANY_CLASS)
    diffusion, sampler = _diffusion(config, learned_sigma), _sampler(config, row)
    return diffusion, sampler, (*about, *_assumed(kind, sampler))


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
    "lambda_min_clipped": _lowest,
    "disable_corrector": _steps,
}


def _scheduler(config: Config, row: SchedulerClass) -> SchedulerSpec:
    """The class with what of its own keys is not its default."""
    values = {key: OWN_KEYS[key](config, key) for key in row.own}
    return SchedulerSpec(
        kind=config.kind, config={key: value for key, value in values.items() if value != row.own[key]}
    )


def _assumed(kind: str, sampler: SamplerSpec) -> tuple[str, ...]:
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
