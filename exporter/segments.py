"""A model cut into the segments of a program, as torch modules with named, typed inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditc.exporter.protocol import Branch, TrajectoryModel, example_inputs
from ditc.program import AHEAD, CONDITION, DECODE, Program, SegmentPlan

__all__ = ["Segment", "segments_of"]


@dataclass(frozen=True)
class Segment:
    """A torch module with example inputs, and names for its inputs, outputs and open dimensions."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    open_dims: dict[str, dict[int, str]]  # input -> axis -> name


class BranchScope(nn.Module):
    """Runs one branch inside a scope of its own, so that every node of it can be traced back to the branch.

    The branch is kept out of the module tree: its parameters belong to the model, and keep the model's names.
    """

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self._hidden = (branch,)

    def forward(self, h: Tensor, parts: Any) -> Tensor:
        return self._hidden[0].compute(h, parts)


class Condition(nn.Module):
    """Timesteps (steps,) and labels (batch,) to every table that the steps need."""

    def __init__(self, model: TrajectoryModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.condition(t, y).values())


class Trunk(nn.Module):
    """One pass through the network with some branches computed and the others taken from a cache.

    Inputs after x: the step's tables; with `plan.ahead` those of the next steps, each (ahead, ...); the caches.
    """

    def __init__(self, model: TrajectoryModel, plan: SegmentPlan, tables: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.tables = tables
        self.branch = nn.ModuleList(BranchScope(branch) for branch in model.branches)

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        tables, rest = self._tables(rest)
        ahead, rest = self._tables(rest) if self.plan.ahead else ({}, rest)
        cached = dict(zip(self.plan.reads, rest, strict=True))
        parts = self.model.unpack(tables)
        later = [self.model.unpack({n: t[k] for n, t in ahead.items()}) for k in range(self.plan.ahead)]
        h = self.model.embed(x)
        if AHEAD in cached:
            return (self.model.head(h + cached[AHEAD], parts),)
        made = {f"{AHEAD}.{k + 1}": torch.zeros(()) for k in range(len(later))}
        for branch, scope, computes in zip(self.model.branches, self.branch, self.plan.compute, strict=True):
            made[branch.name] = out = scope(h, parts) if computes else cached[branch.name]
            h = branch.merge(h, out, parts)
            for k, then in enumerate(later):
                made[f"{AHEAD}.{k + 1}"] = branch.merge(made[f"{AHEAD}.{k + 1}"], out, then)
        return self.model.head(h, parts), *(made[name] for name in self.plan.writes)

    def _tables(self, rest: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The tables by name, and the inputs after them."""
        count = len(self.tables)
        return dict(zip(self.tables, rest[:count], strict=True)), rest[count:]


class Decode(nn.Module):
    """Latents to images."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.model = decoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.model(latent)  # type: ignore[no-any-return]


@torch.no_grad()
def segments_of(model: TrajectoryModel, program: Program) -> Iterator[Segment]:
    """Every segment that a program calls, one at a time."""
    x, t, y = example_inputs(model.spec, 4)
    conditioned = model.condition(t[:3], y)
    yield Segment(
        name=CONDITION,
        module=Condition(model),
        inputs={"t": t[:3], "y": y},
        outputs=tuple(conditioned),
        open_dims={"t": {0: "steps"}, "y": {0: "batch"}},
    )
    step = {name: table[1].contiguous() for name, table in conditioned.items()}
    for plan in program.segments:
        generator = torch.Generator().manual_seed(1)
        cached = {
            f"cache.{name}": torch.randn(len(x), *model.spec.branch_shape, generator=generator) for name in plan.reads
        }
        later = {f"{AHEAD}.{name}": _later_rows(table, plan.ahead) for name, table in conditioned.items() if plan.ahead}
        inputs = {"x": x, **step, **later, **cached}
        yield Segment(
            name=plan.name,
            module=Trunk(model, plan, tuple(step)),
            inputs=inputs,
            outputs=("out", *(f"cache.{name}" for name in plan.writes)),
            open_dims={name: {1 if name in later else 0: "batch"} for name in inputs},
        )
    if DECODE in program.epilogue and model.decoder is not None:
        yield Segment(DECODE, Decode(model.decoder), {"latent": x[:2]}, ("image",), {"latent": {0: "batch"}})


def _later_rows(table: Tensor, ahead: int) -> Tensor:
    """Example tables of `ahead` later steps, all different: the two last rows of a table in turn, each scaled."""
    return torch.stack([table[1 + k % 2] * (1 + 0.1 * k) for k in range(ahead)])
