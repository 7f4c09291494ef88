"""Schedulers of diffusers that are taken, with the defaults of each class's keys, and why others are refused.

A class over betas may have a second form: what its keys mean where it samples a flow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ditc.exporter.config_files import Keys

__all__ = ["DYNAMIC", "FLOWS", "REFUSED", "SCHEDULERS", "SIGMAS", "SchedulerClass"]

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


def _over_a_flow(row: SchedulerClass, also: tuple[str, ...] = (), **own: Any) -> SchedulerClass:
    """Return the second form of a class over betas: its noise levels are those of a flow, shifted once.

    The class takes other sigmas from its betas there too, as if they were a flow's; `also` are those that are a flow's.
    What is left of the betas are the ends of some levels, so they are the class's `own`.
    """
    of_betas = {key: (False, False) for key in OF_BETAS if key in row.own and key not in also}
    own = {key: PROCESS[key] for key in BETAS} | {key: row.own[key] for key in row.own if key not in of_betas} | own
    flow = {"use_flow_sigmas": (False, True), "prediction_type": (PROCESS["prediction_type"], "flow_prediction")}
    dynamic = {key: (False, False) for key in ("use_dynamic_shifting",) if key in row.keys.harmless}
    keys = Keys(
        read={"num_train_timesteps": PROCESS["num_train_timesteps"], "flow_shift": 1.0, **own},
        fixed={**row.keys.fixed, **of_betas, **flow, **dynamic},
        harmless=OF_THRESHOLDING | {key: OF_SPACINGS[key] for key in OF_SPACINGS if key in row.keys.known},
    )
    return SchedulerClass("scheduler", keys, own)


BETAS = ("beta_start", "beta_end", "beta_schedule")
OF_BETAS = (*SIGMAS, "use_lu_lambdas")
OF_SPACINGS = {
    **dict.fromkeys(SPACING, "a flow's timesteps are those of its noise levels"),
    "time_shift_type": "the shift is no dynamic one",
}
# of a class whose shift hangs on the number of tokens
DYNAMIC = {
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
FLOW_EULER = {"shift_terminal": None, **SIGMAS, "stochastic_sampling": False}

# classes, where they sample a flow; those over betas are told so by their keys
FLOWS: dict[str, SchedulerClass] = {
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(
        "scheduler",
        Keys({"num_train_timesteps": 1000, "shift": 1.0, **DYNAMIC, **FLOW_EULER}, {"invert_sigmas": (False, False)}),
        FLOW_EULER,
    ),
    "FlowMatchHeunDiscreteScheduler": SchedulerClass("scheduler", Keys({"num_train_timesteps": 1000, "shift": 1.0})),
    "UniPCMultistepScheduler": _over_a_flow(
        SCHEDULERS["UniPCMultistepScheduler"], also=("use_karras_sigmas",), shift_terminal=None
    ),
    **{
        kind: _over_a_flow(SCHEDULERS[kind])
        for kind in (
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "DEISMultistepScheduler",
            "SASolverScheduler",
        )
    },
}

OWN_FLOW = "it samples a flow by rules of its own"
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
    "FlowMapEulerDiscreteScheduler": DISTILLED,
    "FlowMatchLCMScheduler": DISTILLED,
    "HeliosDMDScheduler": DISTILLED,
    "HeliosScheduler": OWN_FLOW,
    "IPNDMScheduler": "its noise process is a sine over continuous time",
    "KarrasVeScheduler": EXPLODING,
    "LCMScheduler": DISTILLED,
    "LTXEulerAncestralRFScheduler": OWN_FLOW,
    "MiniMaxH3Scheduler": OWN_FLOW,
    "PiflowScheduler": DISTILLED,
    "RFD4ProteinaScheduler": OWN_FLOW,
    "RePaintScheduler": "it fills in parts of given images",
    "SCMScheduler": DISTILLED,
    "ScoreSdeVeScheduler": EXPLODING,
    "ScoreSdeVpScheduler": "its noise process is continuous in time",
    "TCDScheduler": DISTILLED,
    "UnCLIPScheduler": "it is made for the prior and decoder of unCLIP",
    "VQDiffusionScheduler": TOKENS,
}
