"""Configurations of diffusers' schedulers as tests write them, and runs of the classes on a stand-in for a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditc.errors import CheckpointError
from ditc.exporter.schedulers import FLOWS, SCHEDULERS, SchedulerClass, process_from_scheduler
from ditc.spec import DiffusionSpec, SamplerSpec

Settings = dict[str, Any]

EXACT = sorted(name for name, row in SCHEDULERS.items() if row.exact)
OWN = sorted(name for name, row in SCHEDULERS.items() if not row.exact)
# keys of a class over betas that samples a flow
FLOW: Settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# every form in which a class is taken: what its file says at least, and the form
FORMS: dict[str, tuple[str, Settings, SchedulerClass]] = {
    **{kind: (kind, {}, row) for kind, row in SCHEDULERS.items()},
    **{f"{kind} of a flow": (kind, FLOW if kind in SCHEDULERS else {}, row) for kind, row in FLOWS.items()},
}
STEPS = 8
SHAPE = (2, 3, 4, 4)
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


def written(path: Path, kind: str, **settings: Any) -> Path:
    """A scheduler's configuration with nothing in it but these settings."""
    path.write_text(json.dumps({"_class_name": kind, "_diffusers_version": "0.12.0", **settings}))
    return path


def read(
    path: Path, *, learned_sigma: bool = False, tokens: int | None = None
) -> tuple[DiffusionSpec, SamplerSpec, tuple[str, ...]]:
    return process_from_scheduler(path, learned_sigma=learned_sigma, tokens=tokens)


def refusal(path: Path, tokens: int | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path, tokens=tokens)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 400
    return message


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
