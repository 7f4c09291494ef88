"""Peers in torch: the model that was compiled, run eagerly, in bfloat16, compiled by torch, and cached by cache-dit.

They compute the conditioning at every step, as a user's loop does.
"""

from __future__ import annotations

import copy
from typing import Any

from ditc.errors import InputError
from ditc.speed.peer import Peer
from ditc.speed.peer_task import PeerTask

__all__ = ["cached_by_cache_dit", "torch_bf16", "torch_compile", "torch_f32"]


def torch_f32(task: PeerTask) -> Peer:
    """Return the model run eagerly in float32."""
    return _torch_peer(task, task.model, "eager float32")


def torch_bf16(task: PeerTask) -> Peer:
    """Return the model run eagerly, with weights and products in bfloat16."""
    return _torch_peer(task, in_bfloat16(copy.deepcopy(task.model)), "eager bfloat16")


def torch_compile(task: PeerTask) -> Peer:
    """Return the model in float32 through torch.compile with its defaults; it needs a C++ compiler on a CPU."""
    import torch

    return _torch_peer(task, torch.compile(task.model, dynamic=False), "torch.compile float32")


def cached_by_cache_dit(task: PeerTask) -> Peer:
    """Return diffusers' DiT, eager float32; cache-dit computes at the bundle's own steps and reuses in between."""
    import cache_dit
    import diffusers
    import torch

    from ditc.exporter.diffusers_copy import diffusers_from_dit

    program = task.bundle.manifest.program
    computes = [program.segment(step.segment).compute for step in program.steps]
    if any(any(row) and not all(row) for row in computes):
        raise InputError("cache-dit computes all blocks or reuses all; this bundle's schedule mixes them in a step")
    model = diffusers_from_dit(task.model)
    settings = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,  # the fewest it takes
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        num_inference_steps=len(computes),
        steps_computation_mask=[int(all(row)) for row in computes],
        steps_computation_policy="static",
        enable_separate_cfg=False,  # both guidance halves are one batch
    )
    cache_dit.enable_cache(model, cache_config=settings)
    what = f"cache-dit {cache_dit.__version__} (F1B0, {sum(map(all, computes))} steps computed)"
    peer = _torch_peer(task, lambda x, t, y: model(x, t, y, return_dict=False)[0], "eager float32", torch.float32)
    return Peer(
        forward=peer.forward,
        what=f"{what}, diffusers {diffusers.__version__}, {peer.what}",
        begin=lambda: cache_dit.refresh_context(model, cache_config=settings),
    )


def in_bfloat16(model: Any) -> Any:
    """Give a model bfloat16 weights and products; what float32 arithmetic is left between them is cast back."""
    import torch

    model = model.to(torch.bfloat16)
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16),))
    return model


def _torch_peer(task: PeerTask, model: Any, what: str, kind: Any = None) -> Peer:
    import torch

    from ditc.speed.eager import eager_forward

    kind = kind or next(model.parameters()).dtype
    forward = eager_forward(model, task.run.columns["t"], task.conditions, kind)
    return Peer(forward=forward, what=f"torch {torch.__version__}, {what}")
