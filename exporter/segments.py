"""A model cut into the segments of a program, as torch modules with named, typed inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ditc.exporter.protocol import (
    TrajectoryModel,
    example_inputs,
    request_tables,
    spread_over_steps,
    timestep_tables,
)
from ditc.exporter.seams import Seam, Streams, first_streams, seams_of
from ditc.program import AHEAD, CONDITION, DECODE, OF_STEP, REQUEST, REUSE_ROWS, TIMESTEPS, Program, SegmentPlan
from ditc.streams import IMAGE

__all__ = ["Excerpt", "Passing", "Segment", "Trunk", "own_names", "segments_of"]

Passed = tuple[Tensor, ...]  # from branch to branch: the streams, IMAGE first, and the sums for later steps
Parts = tuple[Any, ...]  # what branches take from the tables, of this step and of later ones
Cached = dict[str, Tensor]
Value = TypeVar("Value")


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

    def __init__(self, seam: Seam) -> None:
        super().__init__()
        self._hidden = (seam,)

    def forward(self, h: Streams, parts: Any) -> tuple[Tensor, ...]:
        return self._hidden[0].compute(h, parts)


class Residual(nn.Module):
    """One residual sub-layer, computed or taken from a cache, and merged; in a scope of its own as well.

    From one to the next pass the streams, in the order of `streams`, and with `plan.ahead` the sums for later steps.
    """

    def __init__(self, seam: Seam, streams: tuple[str, ...]) -> None:
        super().__init__()
        self._hidden = (seam,)
        self._streams = streams
        self.compute = BranchScope(seam)

    def forward(
        self, passed: Passed, cached: Sequence[Tensor | None] | None, parts: Parts
    ) -> tuple[tuple[Tensor | None, ...], Passed]:
        """(a tensor for each output of the branch, what passes on); `parts` are those of this step and of later ones.

        `cached` are the outputs where the branch doesn't compute, None for one whose stream nothing reads any more.
        """
        seam, names = self._hidden[0], self._streams
        streams, sums = dict(zip(names, passed, strict=False)), passed[len(names) :]
        outs = self.compute(streams, parts[0]) if cached is None else cached
        for output, out in zip(seam.outputs, outs, strict=True):
            if out is None:
                continue
            streams[output.stream] = seam.merge(streams[output.stream], out, parts[0], output)
            if output.stream == IMAGE:  # other streams don't reach the head of a step that reuses everything
                sums = tuple(seam.merge(h, out, own, output) for h, own in zip(sums, parts[1:], strict=True))
        return tuple(outs), (*streams.values(), *sums)


class Condition(nn.Module):
    """Timesteps (steps,) and the conditions of a batch to every table that the steps need: REQUEST's behind the steps'.

    A model without conditions takes a zero for each row (NO_CONDITION), and its tables get that many rows.
    """

    def __init__(self, model: TrajectoryModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, t: Tensor, *conditions: Tensor) -> tuple[Tensor, ...]:
        if not self.model.spec.inputs:
            tables = self.model.condition(t).values()
            return tuple(table.expand(-1, conditions[0].shape[0], *table.shape[2:]) for table in tables)
        once = request_tables(self.model, conditions)
        return (*self.model.condition(t, *conditions).values(), *once.values())


class TimelessCondition(Condition):
    """The conditions of a batch to REQUEST's tables, of a model whose other tables depend on the timestep alone."""

    def forward(self, first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return tuple(request_tables(self.model, (first, *others)).values())


class Trunk(nn.Module):
    """One pass through the network with some branches computed and the others taken from a cache.

    Inputs after x: the step's tables; with `plan.ahead` those of the next steps, each (ahead, ...); with `plan.rows`
    the step's weights; the caches.
    """

    def __init__(self, model: TrajectoryModel, plan: SegmentPlan, tables: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.tables = tables
        self.reads = (*((REUSE_ROWS,) if plan.rows else ()), *plan.reads)
        self.wiring = model.spec.wiring
        self.width = len(self.wiring.streams) + plan.ahead  # of what passes from branch to branch
        self.residual = nn.ModuleList(Residual(seam, self.wiring.streams) for seam in seams_of(model))

    def values(self, number: int) -> list[str | None]:
        """Return the names of a branch's outputs; None is one that isn't computed, and not read from a cache either."""
        names = self.wiring.outputs(self.wiring.branches[number])
        return [name if self.plan.compute[number] or name in self.plan.reads else None for name in names]

    def cached_outputs(self, number: int, cached: Cached) -> list[Tensor | None] | None:
        """Return the outputs of a branch that is skipped, as `Residual` takes them; None for one that computes."""
        if self.plan.compute[number]:
            return None
        return [None if name is None else cached[name] for name in self.values(number)]

    def begin(self, x: Tensor, rest: tuple[Tensor, ...], reads: Sequence[str]) -> tuple[Passed, Parts, Cached]:
        """The tensors that pass into the first branch, the parts of the tables, and the caches named `reads`."""
        tables, rest = _split_off(self.tables, rest)
        of_steps = [name for name in self.tables if not name.startswith(REQUEST)]
        ahead, rest = _split_off(of_steps, rest) if self.plan.ahead else ({}, rest)
        parts = self.model.unpack(own_names(tables))
        later = [
            self.model.unpack(own_names(tables | {name: table[k] for name, table in ahead.items()}))
            for k in range(self.plan.ahead)
        ]
        begun = first_streams(self.model, x, parts)
        passed = *(begun[name] for name in self.wiring.streams), *(torch.zeros(()) for _ in later)
        return passed, (parts, *later), dict(zip(reads, rest, strict=True))

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        passed, parts, cached = self.begin(x, rest, self.reads)
        if AHEAD in cached:
            return (self.model.head(passed[0] + self._reused(cached), parts[0]),)
        outputs = dict[str, Tensor]()
        for number, residual in enumerate(self.residual):
            outs, passed = residual(passed, self.cached_outputs(number, cached), parts)
            named = zip(self.values(number), outs, strict=True)
            outputs |= {name: out for name, out in named if name is not None and out is not None}
        outputs |= {f"{AHEAD}.{k}": total for k, total in enumerate(passed[len(self.wiring.streams) :], 1)}
        return self.model.head(passed[0], parts[0]), *(outputs[name] for name in self.plan.writes)

    def _reused(self, cached: Cached) -> Tensor:
        """Return the sum of all branches: the one that was cached, or cached ones by their weights and a shift."""
        if not self.plan.rows:
            return cached[AHEAD]
        weights = cached[REUSE_ROWS].unbind()
        terms = [weight * cached[name] for weight, name in zip(weights, self.plan.reads, strict=False)]
        return sum([*terms[1:], *weights[len(terms) :]], start=terms[0])


def _split_off(names: Sequence[str], rest: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The first inputs by their names, and those after them."""
    return dict(zip(names, rest[: len(names)], strict=True)), rest[len(names) :]


def own_names(tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tables under the names that the model gave them."""
    return {name.removeprefix(REQUEST).removeprefix(OF_STEP): table for name, table in tables.items()}


class Excerpt(nn.Module):
    """A trunk with some of its branches only, `chosen` by number, and with everything that passes between its parts.

    Its inputs are those of the trunk, of the caches only those that are read. Its outputs are the prediction; the
    tensors among the leaves of `parts`; what passes into the first branch; and for each branch its outputs, as far as
    there are any, and what passes on.
    """

    def __init__(self, trunk: Trunk, chosen: Sequence[int]) -> None:
        super().__init__()
        self._hidden = (trunk,)
        self.model, self.residual = trunk.model, trunk.residual  # under the trunk's names, which nodes will carry
        self.chosen = tuple(chosen)
        self.counts = [len(values) - values.count(None) for values in map(trunk.values, self.chosen)]
        own = [name for number in self.chosen for name in trunk.values(number)]
        self.reads = tuple(name for name in trunk.plan.reads if name in own)

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        trunk = self._hidden[0]
        passed, parts, cached = trunk.begin(x, rest, self.reads)
        between = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]
        between += passed
        for number in self.chosen:
            outs, passed = self.residual[number](passed, trunk.cached_outputs(number, cached), parts)
            between += [out for out in outs if out is not None]
            between += passed
        return self.model.head(passed[0], parts[0]), *between


@dataclass(frozen=True)
class Passing(Generic[Value]):
    """The values between the parts of an excerpt: leaves, what passes around the branches, the branches' outputs."""

    leaves: list[Value]
    passed: list[list[Value]]
    outs: list[list[Value]]

    @classmethod
    def of(cls, outputs: Sequence[Value], counts: Sequence[int], width: int) -> Passing[Value]:
        """Sorted from the outputs of an excerpt whose branches have `counts` outputs and pass on `width` tensors."""
        first = len(outputs) - width - sum(count + width for count in counts)
        leaves, passed, outs = list(outputs[1:first]), [list(outputs[first : first + width])], []
        place = first + width
        for count in counts:
            outs.append(list(outputs[place : place + count]))
            passed.append(list(outputs[place + count : place + count + width]))
            place += count + width
        return cls(leaves, passed, outs)


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
    x, t, *conditions = example_inputs(model.spec, 4)
    condition = _condition_segment(model, t[:3], conditions or [torch.zeros(len(x), dtype=torch.int64)])
    yield condition
    conditioned = dict(zip(condition.outputs, condition.module(*condition.inputs.values()), strict=True))
    once = {name: table for name, table in conditioned.items() if name.startswith(REQUEST)}
    alone = {f"{OF_STEP}{name}": table for name, table in timestep_tables(model, t[:3]).items()}
    conditioned = {name: table for name, table in conditioned.items() if name not in once} | alone
    step = {name: table[1].contiguous() for name, table in conditioned.items()} | once
    for plan in program.segments:
        generator = torch.Generator().manual_seed(1)
        cached = {
            f"cache.{name}": torch.randn(len(x), *model.spec.shape_of(name), generator=generator) for name in plan.reads
        }
        later = {f"{AHEAD}.{name}": _later_rows(table, plan.ahead) for name, table in conditioned.items() if plan.ahead}
        row = torch.randn(plan.rows, *model.spec.branch_shape[-1:], generator=generator)
        rows = {REUSE_ROWS: row} if plan.rows else {}
        inputs = {"x": x, **step, **later, **rows, **cached}
        yield Segment(
            name=plan.name,
            module=Trunk(model, plan, tuple(step)),
            inputs=inputs,
            outputs=("out", *(f"cache.{name}" for name in plan.writes)),
            open_dims={name: {1 if name in later else 0: "batch"} for name in inputs}
            | {name: {} for name in inputs if name in rows or name.removeprefix(f"{AHEAD}.") in alone},
        )
    if DECODE in program.epilogue and model.decoder is not None:
        yield Segment(DECODE, Decode(model.decoder), {"latent": x[:2]}, ("image",), {"latent": {0: "batch"}})


def _condition_segment(model: TrajectoryModel, t: Tensor, conditions: Sequence[Tensor]) -> Segment:
    """The segment that makes the tables, on example timesteps (steps,) and conditions (batch, *shape)."""
    spec = model.spec
    own = spread_over_steps(spec, conditions, len(t)) if spec.inputs else conditions
    names = [condition.name for condition in spec.network_inputs]
    fresh = {condition.name for condition in spec.network_inputs if condition.fresh}
    tables = [*model.condition(t, *(own if spec.inputs else ()))]
    once = [f"{REQUEST}{name}" for name in (request_tables(model, conditions) if spec.inputs else ())]
    timesteps = {TIMESTEPS: t} if tables else {}  # nothing else asks for them
    return Segment(
        name=CONDITION,
        module=Condition(model) if tables else TimelessCondition(model),
        inputs={**timesteps, **{name: given.contiguous() for name, given in zip(names, own, strict=True)}},
        outputs=(*tables, *once),
        open_dims={name: {0: "steps"} for name in timesteps}
        | {name: {0: "steps", 1: "batch"} if name in fresh else {0: "batch"} for name in names},
    )


def _later_rows(table: Tensor, ahead: int) -> Tensor:
    """Example tables of `ahead` later steps, all different: the two last rows of a table in turn, each scaled."""
    return torch.stack([table[1 + k % 2] * (1 + 0.1 * k) for k in range(ahead)])
