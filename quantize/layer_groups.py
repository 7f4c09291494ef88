"""Groups of linear layers whose quantization is switched on and off together: what `ditc bisect` toggles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from ditc.errors import unknown_name
from ditc.quantize.linears import Linear, linears_of

__all__ = ["GROUPINGS", "LayerGroup", "check_grouping", "groups_of"]


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers in graph order: `names` as in `Linear.name`, their torch module paths, the branches they are in."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    branches: tuple[str, ...]


def shared_pair(linear: Linear) -> str:
    """Return the tensor whose Q/DQ pair a layer shares with its other readers, as q, k and v do."""
    return str(linear.activation.name)


def branch(linear: Linear) -> str:
    return linear.branch


def block(linear: Linear) -> str:
    """Return the branch without its last part: blocks.3.attn and blocks.3.mlp are in blocks.3."""
    return linear.branch.rpartition(".")[0] or linear.branch


GROUPINGS: dict[str, Callable[[Linear], str]] = {"layer": shared_pair, "branch": branch, "block": block}


def check_grouping(by: str) -> None:
    """Raise InputError for a grouping that is not in the table."""
    if by not in GROUPINGS:
        raise unknown_name("grouping", by, GROUPINGS)


def groups_of(model: ir.Model, by: str) -> tuple[LayerGroup, ...]:
    """Every linear layer of an FP segment in exactly one group, in graph order. `by` is a row of GROUPINGS."""
    check_grouping(by)
    members: dict[str, list[Linear]] = {}
    for linear in linears_of(model):
        members.setdefault(GROUPINGS[by](linear), []).append(linear)
    return tuple(
        LayerGroup(
            names=tuple(linear.name for linear in linears),
            paths=tuple(dict.fromkeys(linear.path for linear in linears)),
            branches=tuple(dict.fromkeys(linear.branch for linear in linears)),
        )
        for linears in members.values()
    )
