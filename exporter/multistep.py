"""Schedulers of diffusers as a sampler's columns: those that a name stands for, and those that a model brings.

Making them takes diffusers; running a bundle doesn't.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.choices import ProcessPrediction, Sigmas, Spacing, names_of
from ditc.diffusion import alphas_cumprod
from ditc.errors import InputError
from ditc.exporter.recurrence import MakeScheduler, Recurrence, read_recurrence
from ditc.sampler_checks import sampler_contradictions
from ditc.scheduler_samplers import SCHEDULER_SAMPLERS
from ditc.spec import DiffusionSpec, SamplerSpec, SchedulerSpec
from ditc.tables import history_columns

__all__ = ["multistep_recurrence", "multistep_table", "scheduler_maker", "scheduler_of"]

Array = NDArray[np.float64]

PREDICTIONS: dict[ProcessPrediction, str] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "sample": "sample",
    "flow": "flow_prediction",
}
# prediction -> the clean sample as a combination of x and the network's output, of the shares of signal and noise
CLEAN_SAMPLE: dict[ProcessPrediction, Callable[[Array, Array], tuple[Array, Array]]] = {
    "epsilon": lambda signal, noise: (1 / signal, -noise / signal),
    "v": lambda signal, noise: (signal, -noise),
    "sample": lambda signal, _: (0 * signal, 0 * signal + 1),
    "flow": lambda signal, noise: (0 * signal + 1, -noise),
}
# classes over betas that another class stands for where the model predicts a flow; others have flow sigmas, or no form
FLOW_FORMS = {"EulerDiscreteScheduler": "FlowMatchEulerDiscreteScheduler"}
# how often a class calls the network beside its steps; those of ditc are calls
FURTHER_CALLS = {"PNDMScheduler": 1}
# classes that spread the levels of a flow over both ends; the others take equal strides from the noise by themselves
OVER_BOTH_ENDS = {"FlowMatchEulerDiscreteScheduler"}
# classes that can't even be driven -> why
NOT_DRIVEN = {
    "DPMSolverSDEScheduler": "it calls the network more often than it has steps, and draws noise from a tree of its own"
}
ADVICE = "choose a sampler for the same betas, for example --sampler dpm++2m or --sampler ddim"
ADVICE_OF_FLOW = "choose a sampler for the same flow, for example --sampler euler or --sampler dpm++2m"


def scheduler_of(sampler: SamplerSpec, prediction: ProcessPrediction) -> SchedulerSpec:
    """Return the scheduler that a sampler is read off: the model's own, or the one that its name stands for."""
    if sampler.scheduler is not None:
        return sampler.scheduler
    kind, config = SCHEDULER_SAMPLERS[sampler.name]
    return SchedulerSpec(kind=FLOW_FORMS.get(kind, kind) if prediction == "flow" else kind, config=dict(config))


def multistep_recurrence(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int) -> Recurrence:
    """Read the sampler's scheduler off for so many steps. Raises InputError where that can't be done."""
    if not 2 <= steps <= diffusion.train_steps:
        raise InputError(
            f"steps must be 2 to {diffusion.train_steps}, the model's training steps, found {steps}; set --steps"
        )
    with _refused_in_one_line(sampler, diffusion.prediction):
        make = scheduler_maker(diffusion, sampler, steps)
        return read_recurrence(_called(sampler), make, steps, flow=diffusion.prediction == "flow")


def _called(sampler: SamplerSpec) -> str:
    """Return what messages call a sampler: by its options, or by the class of the model's own scheduler."""
    return sampler.told if sampler.scheduler else f"{sampler.told} with --spacing {sampler.spacing}"


def scheduler_maker(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int) -> MakeScheduler:
    """Return a function that makes the scheduler at the start of a run of so many calls of the network."""
    wanted, flow = scheduler_of(sampler, diffusion.prediction), diffusion.prediction == "flow"
    kind = _class_of(sampler, wanted)
    known = inspect.signature(kind.__init__).parameters.keys()
    if sampler.spacing not in _spacings(known, flow):
        raise InputError(f"{wanted.kind} picks its timesteps itself, found --spacing {sampler.spacing}; leave it out")
    settings = {
        "num_train_timesteps": diffusion.train_steps,
        "prediction_type": PREDICTIONS[diffusion.prediction],
        "timestep_spacing": sampler.spacing,
        "steps_offset": sampler.offset,
        **wanted.config,
        **(_of_flow if flow else _of_betas)(diffusion, sampler, wanted.kind, known),
    }

    trails = sampler.spacing == "trailing" and wanted.kind in OVER_BOTH_ENDS
    levels = {"sigmas": np.linspace(1, 1 / steps, steps)} if trails else {}

    def scheduler() -> Any:
        ready = kind(**{key: value for key, value in settings.items() if key in known})
        ready.set_timesteps(steps - FURTHER_CALLS.get(wanted.kind, 0), **levels, **_dynamic(settings))
        if hasattr(ready, "set_begin_index"):
            ready.set_begin_index(0)  # else it looks the first timestep up, which rounding may have made the second too
        return ready

    return scheduler


def _spacings(known: Collection[str], flow: bool) -> tuple[str, ...]:
    """Return the spacings that a class with these settings may be asked for; "linspace" is what it does unasked."""
    if flow:
        return "linspace", "trailing"
    return names_of(Spacing) if "timestep_spacing" in known else ("linspace",)


def _of_betas(diffusion: DiffusionSpec, sampler: SamplerSpec, kind: str, known: Collection[str]) -> dict[str, Any]:
    """Return a class's settings about betas, and of the noise levels where they are not its own."""
    if sampler.shift is not None:
        raise InputError(f"--shift {sampler.shift:g} is for a model that predicts a flow; leave it out")
    products = alphas_cumprod(diffusion)
    settings: dict[str, Any] = {"trained_betas": 1 - products / np.append(1.0, products[:-1])}
    if sampler.sigmas is None:
        return settings
    if f"use_{sampler.sigmas}_sigmas" not in known:
        raise InputError(f"{kind} has no {sampler.sigmas} sigmas; leave --sigmas out, or choose another --sampler")
    return settings | {f"use_{rule}_sigmas": rule == sampler.sigmas for rule in names_of(Sigmas)}


def _of_flow(diffusion: DiffusionSpec, sampler: SamplerSpec, kind: str, known: Collection[str]) -> dict[str, Any]:
    """Return a class's settings about a flow. Raises InputError for a class that has no form for one."""
    if sampler.sigmas is not None:
        raise InputError(f"--sigmas {sampler.sigmas} is for a process over betas, and the model predicts a flow")
    if not {"use_flow_sigmas", "shift"} & set(known):
        raise InputError(f"{kind} has no form for a flow; choose --sampler euler, dpm++2m, unipc or deis")
    shifted = {} if sampler.shift is None else {"flow_shift": sampler.shift, "shift": sampler.shift}
    return {"use_flow_sigmas": True, **shifted}


def _dynamic(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the number in which a class with a dynamic shift is told the shift; nothing for any other."""
    if not settings.get("use_dynamic_shifting"):
        return {}
    shift: float = settings.get("shift", 1.0)
    return {"mu": shift if settings.get("time_shift_type") == "linear" else log(shift)}


def _class_of(sampler: SamplerSpec, wanted: SchedulerSpec) -> Any:
    if wanted.kind in NOT_DRIVEN:
        raise InputError(f"{wanted.kind} can't be taken: {NOT_DRIVEN[wanted.kind]}")
    try:
        import diffusers
    except ImportError as e:
        raise InputError(f"{sampler.told} is read off diffusers; install it with: pip install 'ditc[export]'") from e
    if not hasattr(diffusers, wanted.kind):
        raise InputError(f"{wanted.kind} is no class of diffusers {diffusers.__version__}; install a newer one")
    return getattr(diffusers, wanted.kind)


@contextmanager
def _refused_in_one_line(sampler: SamplerSpec, prediction: ProcessPrediction) -> Iterator[None]:
    """Turn what a scheduler raises into an InputError, with advice where it is the model's own; silence its remarks."""
    remarks = logging.getLogger("diffusers")
    advice = ADVICE_OF_FLOW if prediction == "flow" else ADVICE
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy, about how diffusers takes arrays, and of what it will drop
            yield
    except InputError as e:
        if sampler.scheduler is None:
            raise
        raise InputError(f"{e}; {advice}") from e
    except Exception as e:  # whatever settings that don't go together lead to in code of others
        said = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
        scheduler = scheduler_of(sampler, prediction).told
        raise InputError(f"{_called(sampler)} can't be taken: {scheduler} says {said}; {advice}") from e
    finally:
        remarks.setLevel(level)


def multistep_table(diffusion: DiffusionSpec, sampler: SamplerSpec, steps: int) -> dict[str, Array]:
    """The sampler's columns, name -> (steps,), as `runtime.samplers.sampler_table` has them, and those of its history.

    Its own step is in `prev_x` and `prev_out`, so `prev_x0` is 0; `x0_x` and `x0_out` still say what the sample holds.
    Raises InputError where that can't be read off, or does not fit the process: a bundle of it would be refused.
    """
    read = multistep_recurrence(diffusion, sampler, steps)
    zero = np.zeros(steps)
    x0_x, x0_out = CLEAN_SAMPLE[diffusion.prediction](read.signal, read.noise)
    table = {
        "t": read.t,
        "clip": np.full(steps, np.inf),
        "x0_x": x0_x,
        "x0_out": x0_out,
        "prev_x0": zero,
        "prev_x": read.a[:, 0],
        "prev_out": read.b[:, 0],
        "sigma": read.c,
    }
    for k, (of_x, of_out) in enumerate(history_columns(read.memory), 1):
        table |= {of_x: read.a[:, k], of_out: read.b[:, k]}
    over = "this flow" if diffusion.prediction == "flow" else "these betas"
    for contradiction in sampler_contradictions(table, diffusion.prediction):
        raise InputError(
            f"{_called(sampler)} can't be taken over {over}, it is inexact even with exact predictions, or its own "
            f"tables in float32 are too rough: {contradiction}; choose another sampler or spacing"
        )
    return table
