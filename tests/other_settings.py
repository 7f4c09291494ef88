"""Another value of every setting of a compile, for tests that walk them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditc.compiler.options import CompileOptions
from ditc.errors import InputError

__all__ = ["OTHERS", "another"]

OTHERS: Mapping[str, tuple[Any, ...]] = {
    "batch": (3,),
    "caches": ("branches",),
    "cfg": (2.5,),
    "clip": (2.0,),
    "clusters": (3,),
    "correct": ("dec-quant", None),
    "eta": (0.5,),
    "float_steps": ("2:2", "none"),
    "midpoint": ("bounded", "zero"),
    "points": (9,),
    "policy": ("fora:3", "none"),
    "pool_images": (40,),
    "pool_steps": ("all", "computed"),
    "precision": ("w7a8", "w8a8", "fp16"),
    "ranges": ("max", "mse"),
    "reference": (False,),
    "reuse": ("affine", "variance", "affine:open", "learned", "hold"),
    "rotate": (8, 16, None),
    "sampler": ("ddpm",),
    "scales": ("per-step", "static"),
    "seed": (5,),
    "select": ("random", "tap"),
    "shift": (2.0,),
    "sigmas": ("karras",),
    "smooth": ("balance", "none"),
    "spacing": ("trailing",),
    "steps": (8,),
    "tap_alpha": (0.25,),
    "tap_share": (0.5,),
    "tap_subsamples": (2,),
    "tap_tau": (2.0,),
    "target": ("openvino",),
    "time_groups": (3, None),
    "variance": ("fixed-small",),
    "vc": ("lsq", "std"),
    "vc_images": (3,),
    "verify_images": (3,),
    "watch_images": (3, None),
}


def another(settings: CompileOptions, name: str) -> dict[str, Any] | None:
    """Return another value of a setting, the first that isn't refused beside the others; None where all are."""
    for value in OTHERS[name]:
        if value == getattr(settings, name):
            continue
        try:
            settings.model_copy(update={name: value})
        except InputError:
            continue
        return {name: value}
    return None
