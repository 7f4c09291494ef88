"""Schedulers of diffusers: an allow-list with the defaults of each class, and what stands for it here.

A class is exact where a table of ours gives what it gives; replaced where it only integrates otherwise over the same
noise process; and refused where its process is another one, or is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ditc.errors import CheckpointError
from ditc.exporter.config_files import Config, Keys, class_named, config_of, read_json, spelled
from ditc.spec import DiffusionSpec, SamplerSpec

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
# keys of an integrator that another one replaces, and the line about that says so
OWN_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SOLVER = ("solver_order", "algorithm_type", "solver_type", "lower_order_final", "lambda_min_clipped", "variance_type")


@dataclass(frozen=True)
class SchedulerClass:
    """A class and its keys. `exact` says whether `sampler` gives what it gives, else it takes its place."""

    sampler: Literal["ddim", "ddpm"]
    exact: bool
    keys: Keys


def _exact(sampler: Literal["ddim", "ddpm"], **read: Any) -> SchedulerClass:
    keys = Keys(
        read={**PROCESS, **SPACING, "timestep_spacing": "leading", **CLIP, **read},
        fixed={**TRAINED, **NO_ZERO_SNR, **NO_THRESHOLD},
        harmless=OF_THRESHOLDING,
    )
    return SchedulerClass(sampler, True, keys)


def _replaced(
    *integrator: str, read: Mapping[str, Any] = SPACING, fixed: Mapping[str, Any] = {}, flows: tuple[str, ...] = ()
) -> SchedulerClass:
    """A class that integrates otherwise; `integrator` are its keys about how."""
    harmless = dict.fromkeys(integrator, "the integrator is replaced")
    harmless |= OF_THRESHOLDING if "thresholding" in fixed else {}
    harmless |= {key: OF_FLOWS[key] for key in flows}
    return SchedulerClass("ddim", False, Keys({**PROCESS, **read}, {**TRAINED, **fixed}, harmless))


SHIFT = ("flow_shift", "use_dynamic_shifting", "time_shift_type")
MULTISTEP = {**NO_THRESHOLD, **NO_FLOW}
LATENT = {"beta_start": 8.5e-4, "beta_end": 1.2e-2}

SCHEDULERS: dict[str, SchedulerClass] = {
    "DDIMScheduler": _exact("ddim", set_alpha_to_one=True),
    "DDIMParallelScheduler": _exact("ddim", set_alpha_to_one=True),
    "DDPMScheduler": _exact("ddpm", variance_type="fixed_small"),
    "DDPMParallelScheduler": _exact("ddpm", variance_type="fixed_small"),
    "DPMSolverMultistepScheduler": _replaced(
        *SOLVER,
        *OWN_SIGMAS,
        *("use_lu_lambdas", "euler_at_final", "final_sigmas_type"),
        fixed={**MULTISTEP, **NO_ZERO_SNR},
        flows=SHIFT,
    ),
    "DPMSolverSinglestepScheduler": _replaced(
        *SOLVER, *OWN_SIGMAS, "final_sigmas_type", read={}, fixed=MULTISTEP, flows=SHIFT
    ),
    "DPMSolverSDEScheduler": _replaced(*OWN_SIGMAS, "noise_sampler_seed", read={**SPACING, **LATENT}),
    "DEISMultistepScheduler": _replaced(
        *("solver_order", "algorithm_type", "solver_type", "lower_order_final"),
        *OWN_SIGMAS,
        fixed=MULTISTEP,
        flows=SHIFT,
    ),
    "UniPCMultistepScheduler": _replaced(
        *("solver_order", "solver_type", "lower_order_final", "predict_x0", "disable_corrector", "solver_p"),
        *OWN_SIGMAS,
        *("final_sigmas_type", "sigma_min", "sigma_max"),
        fixed={**MULTISTEP, **NO_ZERO_SNR},
        flows=(*SHIFT, "shift_terminal"),
    ),
    "SASolverScheduler": _replaced(
        *("predictor_order", "corrector_order", "tau_func", "algorithm_type", "lower_order_final"),
        *OWN_SIGMAS,
        *("lambda_min_clipped", "variance_type"),
        fixed=MULTISTEP,
        flows=("flow_shift",),
    ),
    "EulerDiscreteScheduler": _replaced(
        *OWN_SIGMAS,
        *("interpolation_type", "sigma_min", "sigma_max", "final_sigmas_type"),
        fixed={"timestep_type": ("discrete", "discrete"), **NO_ZERO_SNR},
    ),
    "EulerAncestralDiscreteScheduler": _replaced(fixed=NO_ZERO_SNR),
    "HeunDiscreteScheduler": _replaced(*OWN_SIGMAS, read={**SPACING, **LATENT, **CLIP, "clip_sample": False}),
    "KDPM2DiscreteScheduler": _replaced(*OWN_SIGMAS, read={**SPACING, **LATENT}),
    "KDPM2AncestralDiscreteScheduler": _replaced(*OWN_SIGMAS, read={**SPACING, **LATENT}),
    "LMSDiscreteScheduler": _replaced(*OWN_SIGMAS),
    "PNDMScheduler": _replaced(
        "skip_prk_steps", read={**SPACING, "timestep_spacing": "leading", "set_alpha_to_one": False}
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
    return diffusion, sampler, (*about, *_assumed(kind, row, sampler))


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
    )


def _assumed(kind: str, row: SchedulerClass, sampler: SamplerSpec) -> tuple[str, ...]:
    """The line about what the sampler does otherwise than the class does; none where it does the same."""
    if not row.exact:
        return (
            f"DDIM with {sampler.spacing} spacing in place of {kind}, over the same betas and prediction (--sampler, "
            "--spacing)",
        )
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
