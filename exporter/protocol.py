"""The seams that a model must show so that its trajectory can be compiled.

A user's own diffusion transformer fits by having these members; nothing has to be inherited or registered. The whole
network at one step is then

    step = {name: table[i] for name, table in model.condition(t, *conditions).items()}
    parts = model.unpack(step)
    h = model.embed(x)
    for branch in model.branches:
        h = branch.merge(h, branch.compute(h, parts), parts)
    out = model.head(h, parts)

and has to equal `model(x, t, *conditions)`; `check_decomposition` holds a model to that. The conditions are those that
`spec.inputs` lists, in its order: for most models a class, `y`. What of them depends on no timestep, as the keys and
values of a text, a model may compute apart, once for a request, in a method of its own:

    def request_tables(self, *conditions) -> dict[str, Tensor]      # (batch, ...) each

`unpack` gets these beside the step's. What depends on the timestep alone, as the modulation of most models of texts, is
computed when a model is compiled: the tables lie in the bundle, and the weights that make them don't.

    def timestep_tables(self, t) -> dict[str, Tensor]               # (steps, ...) each

`unpack` gets a row of each without a batch axis, to be broadcast. A model of conditions other than a class may say what
typical ones are:

    def example_conditions(self, count) -> dict[str, Tensor]        # (count, *shape) each, but for classes

Joint attention passes on more than the image's tokens. The branches that `spec.streams` lists are `StreamBranch`es:
they take streams by name, and return a tensor for each of their outputs. `context` begins the streams beside the
image's:

    h = {"image": model.embed(x), **model.context(parts)}
    outs = branch.compute({name: h[name] for name in reads}, parts)
    h[stream] = branch.merge(h[stream], out, parts, name)           for each output's name, stream and tensor
    out = model.head(h["image"], parts)

A model whose conditions are texts may bring its encoders beside its decoder, `text` (`exporter.text_encoders`): then a
bundle takes prompts. What it is typically asked for it may say as well; else prompts that come with ditc are taken:

    def example_prompts(self) -> Sequence[str]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ditc.errors import CheckpointError
from ditc.exporter.seams import first_streams, seams_of
from ditc.exporter.stream_checks import check_context, checked_merge, checked_outputs
from ditc.program import AHEAD, OF_STEP, REQUEST, TIMESTEPS
from ditc.spec import Condition, ModelSpec
from ditc.streams import IMAGE
from ditc.tables import STEP_INPUTS

__all__ = [
    "Branch",
    "StreamBranch",
    "TrajectoryModel",
    "branches_add",
    "check_decomposition",
    "example_inputs",
    "relative_error",
    "request_tables",
    "spread_over_steps",
    "step_tables",
    "timestep_tables",
]


class Branch(Protocol):
    """One residual sub-layer: the unit of caching. `name` is its path in the model, like "blocks.3.attn"."""

    @property
    def name(self) -> str: ...

    def compute(self, h: Tensor, parts: Any) -> Tensor:
        """The sub-layer's output before its gate, shaped (batch, *spec.branch_shape)."""
        ...

    def merge(self, h: Tensor, out: Tensor, parts: Any) -> Tensor:
        """The residual stream with `out` added through the gate of the current step."""
        ...


class StreamBranch(Protocol):
    """A branch that `spec.streams` lists: of other streams than the image's, or with several outputs."""

    @property
    def name(self) -> str: ...

    def compute(self, h: Mapping[str, Tensor], parts: Any) -> Sequence[Tensor]:
        """The outputs before their gates, in the order of the spec, from the streams that the branch reads, by name."""
        ...

    def merge(self, h: Tensor, out: Tensor, parts: Any, output: str) -> Tensor:
        """The stream `h` of an output, given by its name, with `out` added through its gate of the current step."""
        ...


@runtime_checkable
class TrajectoryModel(Protocol):
    """A diffusion transformer taken apart where a trajectory needs seams. Must also be a `torch.nn.Module`."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def branches(self) -> Sequence[Branch | StreamBranch]: ...

    @property
    def decoder(self) -> nn.Module | None:
        """Latents (batch, channels, h, w) to images in [-1, 1], None for a model of pixels."""
        ...

    def condition(self, t: Tensor, *conditions: Tensor) -> dict[str, Tensor]:
        """Everything that depends on (steps,) timesteps and the conditions alone, each (steps, batch, ...).

        Conditions are (batch, *shape), a label (batch,), and fresh noise (steps, batch, *shape). Of a model without
        conditions the tables are (steps, 1, ...).
        """
        ...

    def unpack(self, step: dict[str, Tensor]) -> Any:
        """One step's tables, each (batch, ...), in the form that the branches want."""
        ...

    def embed(self, x: Tensor) -> Tensor:
        """(batch, channels, *space) to the residual stream."""
        ...

    def head(self, h: Tensor, parts: Any) -> Tensor:
        """The residual stream to (batch, out_channels, *space)."""
        ...


@torch.no_grad()
def branches_add(model: TrajectoryModel, tolerance: float = 1e-4) -> bool:
    """Does every branch add to the stream that the head reads something that doesn't depend on it, in its own shape?

    Then what a step reuses is one sum over the branches, which an earlier step can make. Outputs to other streams never
    reach a step that reuses everything, so they may do more than add.
    """
    x, t, *conditions = example_inputs(model.spec, 2)
    parts = model.unpack(step_tables(model, t[:1], conditions))
    h = model.embed(x)
    if not model.branches or h.shape[1:] != model.spec.branch_shape:
        return False
    generator = torch.Generator().manual_seed(2)
    to_image = [(seam, out) for seam in seams_of(model) for out in seam.outputs if out.stream == IMAGE]
    for seam, output in to_image:
        out = torch.randn(len(x), *(output.shape or model.spec.branch_shape), generator=generator)
        try:
            term = seam.merge(torch.zeros(()), out, parts, output)
        except (RuntimeError, IndexError, TypeError):
            return False
        merged = seam.merge(h, out, parts, output)
        if term.shape != h.shape or not relative_error(merged, h + term) < tolerance:
            return False
    return True


# names of ports, and how those of some begin
PORTS = (TIMESTEPS, "x", "out", *STEP_INPUTS)
PREFIXES = (f"{AHEAD}.", "cache.", REQUEST, OF_STEP)
MEMBERS = ("spec", "branches", "decoder", "condition", "unpack", "embed", "head")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; 0 where both are all zeros."""
    gap = (actual.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    return float(gap if size == 0 else gap / size)


def example_inputs(spec: ModelSpec, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Seeded (x, t, *conditions) for a batch: unit noise, spread timesteps, different labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *spec.latent_shape, generator=generator)
    t = torch.linspace(spec.diffusion.train_steps - 1, 1, batch)
    return x, t, *(_example_of(condition, batch, generator) for condition in spec.inputs)


def _example_of(condition: Condition, batch: int, generator: torch.Generator) -> Tensor:
    """A condition of a batch, (batch, *shape): different integers, or unit noise."""
    if condition.classes is None:
        return torch.randn(batch, *condition.shape, generator=generator)
    return (torch.arange(batch * prod(condition.shape)) * 7 % condition.classes).reshape(batch, *condition.shape)


def spread_over_steps(spec: ModelSpec, conditions: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Return conditions (batch, *shape) as `condition` takes them: fresh noise has a row for each of the steps."""
    pairs = zip(spec.inputs, conditions, strict=True)
    return [given.expand(steps, *given.shape) if each.fresh else given for each, given in pairs]


def request_tables(model: Any, conditions: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the tables (batch, ...) that depend on no timestep; most models have none."""
    own = getattr(model, "request_tables", None)
    fixed = [given for each, given in zip(model.spec.inputs, conditions, strict=True) if not each.fresh]
    return {} if own is None else dict(own(*fixed))


def timestep_tables(model: Any, t: Tensor) -> dict[str, Tensor]:
    """Return the tables (steps, ...) that depend on the timesteps (steps,) alone; many models have none."""
    own = getattr(model, "timestep_tables", None)
    return {} if own is None else dict(own(t))


def step_tables(model: Any, t: Tensor, conditions: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what `unpack` takes at one timestep (1,) of conditions (batch, *shape): tables (batch, ...).

    Those that depend on the timestep alone have no batch axis.
    """
    tables = model.condition(t, *spread_over_steps(model.spec, conditions, 1)) | timestep_tables(model, t)
    return {name: table[0] for name, table in tables.items()} | request_tables(model, conditions)


def composed(model: TrajectoryModel, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
    """The model from its seams, row by row since every row has a timestep of its own."""
    rows = []
    for i in range(len(x)):
        parts = model.unpack(step_tables(model, t[i : i + 1], [given[i : i + 1] for given in conditions]))
        h = first_streams(model, x[i : i + 1], parts)
        for seam in seams_of(model):
            for output, out in zip(seam.outputs, seam.compute(h, parts), strict=True):
                h[output.stream] = seam.merge(h[output.stream], out, parts, output)
        rows.append(model.head(h[IMAGE], parts))
    return torch.cat(rows)


def _checked_tables(model: Any, rows: int, conditions: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what `unpack` takes at one step. Raises CheckpointError where shapes or names of tables can't be."""
    spec: ModelSpec = model.spec
    own = rows if spec.inputs else 1
    t = torch.linspace(900, 1, 3)
    tables = model.condition(t, *spread_over_steps(spec, conditions, 3))
    wrong = {name: tuple(table.shape) for name, table in tables.items() if table.shape[:2] != (3, own)}
    if wrong:
        raise CheckpointError(f"condition() must give tables (steps, batch, ...) = (3, {own}, ...), found {wrong}")
    once = request_tables(model, conditions)
    wrong = {name: tuple(table.shape) for name, table in once.items() if table.shape[:1] != (rows,)}
    if wrong:
        raise CheckpointError(f"request_tables() must give tables (batch, ...) = ({rows}, ...), found {wrong}")
    alone = timestep_tables(model, t)
    wrong = {name: tuple(table.shape) for name, table in alone.items() if table.shape[:1] != (3,)}
    if wrong:
        raise CheckpointError(f"timestep_tables() must give tables (steps, ...) = (3, ...), found {wrong}")
    if not tables and not once:
        raise CheckpointError("condition() and request_tables() give no table; give those of timesteps in condition()")
    names = [*tables, *once, *alone]
    if shared := {name for name in names if names.count(name) > 1}:
        givers = (("condition", tables), ("request_tables", once), ("timestep_tables", alone))
        both = " and ".join(f"{giver}()" for giver, given in givers if given.keys() & shared)
        raise CheckpointError(f"{both} both give {', '.join(sorted(shared))}; rename one")
    for name in tables:  # the others have a name of their own as ports, REQUEST or OF_STEP in front
        if name in {*PORTS, *(each.name for each in spec.network_inputs)} or name.startswith(PREFIXES):
            raise CheckpointError(f"a table is called {name!r}, as a port of segments is or may be; rename it")
    return {name: table[0] for name, table in {**tables, **alone}.items()} | once


def _check_shapes(model: Any, x: Tensor, conditions: Sequence[Tensor]) -> None:
    """Raise CheckpointError where a seam gives another shape than spec and protocol promise."""
    spec: ModelSpec = model.spec
    parts = model.unpack(_checked_tables(model, len(x), conditions))
    check_context(model, parts)
    h = first_streams(model, x, parts)
    for seam in seams_of(model):
        for output, out in zip(seam.outputs, checked_outputs(seam, h, parts, spec), strict=True):
            h[output.stream] = checked_merge(seam, h[output.stream], out, parts, output)
    channels = model.head(h[IMAGE], parts).shape[1]
    if channels != spec.out_channels:
        raise CheckpointError(
            f"head() gives {channels} channels, expected {spec.out_channels} for {spec.in_channels} channels with "
            f"learned_sigma {spec.diffusion.learned_sigma}; correct spec.diffusion"
        )


@torch.no_grad()
def check_decomposition(model: Any, tolerance: float = 1e-4) -> None:
    """Raise CheckpointError unless `model` has every seam and their composition equals its forward pass."""
    missing = [name for name in MEMBERS if not hasattr(model, name)]
    is_module = isinstance(model, nn.Module)
    if missing or not is_module:
        lacks = ", ".join(missing) or "being a torch.nn.Module"
        raise CheckpointError(
            f"{type(model).__name__} does not fit TrajectoryModel, it lacks {lacks}; see docs/models.md"
        )
    spec = model.spec
    names = [branch.name for branch in model.branches]
    if tuple(names) != spec.branches:
        raise CheckpointError(
            f"spec.branches must name the model's branches in order: {names}, found {list(spec.branches)}"
        )
    x, t, *conditions = example_inputs(spec, 2)
    was_training = model.training
    model.eval()
    try:
        _check_shapes(model, x, conditions)
        composition, expected = composed(model, x, t, *conditions), model(x, t, *conditions)
    except (RuntimeError, IndexError, TypeError) as e:
        reason = str(e).splitlines()[0]
        raise CheckpointError(f"{spec.name} can't run on inputs as its spec describes them: {reason}") from e
    finally:
        model.train(was_training)
    if composition.shape != expected.shape:
        raise CheckpointError(
            f"the seams give {tuple(composition.shape)}, the forward pass {tuple(expected.shape)}; fix head()"
        )
    error = relative_error(composition, expected)
    if not error < tolerance:
        raise CheckpointError(
            f"the seams of {spec.name} don't compose to its forward pass: relative error {error:.2g}, "
            f"expected below {tolerance:g}; check compute() and merge() of each branch"
        )
