"""Checks between a bundle's manifest and the graphs that it lists: each has the ports that its calls bind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ditc.manifest import REFERENCE, SEGMENTS, Manifest
from ditc.onnx_ports import Ports, Shape
from ditc.program import AHEAD, CONDITION, DECODE, OF_STEP, REQUEST, REUSE_ROWS, TIMESTEPS, UPDATE, SegmentPlan
from ditc.tables import SAMPLER, STEP_INPUTS, Tables, history_columns, memory_of, sampler_columns
from ditc.text_spec import ATTENTION_MASK, INPUT_IDS, TEXT
from ditc.update_form import PREDICTED

__all__ = ["port_contradictions"]


@dataclass(frozen=True)
class Graphs:
    """The graphs of a bundle beside what they are held to; `ports` are by name of the file."""

    manifest: Manifest
    tables: Tables
    ports: Mapping[str, Ports]

    @property
    def latent(self) -> Shape:
        return self.manifest.model.latent_shape

    @property
    def prediction(self) -> Shape:
        return self.manifest.model.prediction_shape

    @property
    def conditioning(self) -> Mapping[str, Shape]:
        """The outputs of `condition` by name: (steps, rows, ...), of the request (rows, ...)."""
        return self.ports[f"{SEGMENTS}{CONDITION}.onnx"].outputs


def port_contradictions(manifest: Manifest, tables: Tables, ports: Mapping[str, Ports]) -> Iterator[str]:
    """A sentence for each port that is missing, that nothing binds, or that has another shape."""
    graphs = Graphs(manifest, tables, ports)
    plans = {plan.name: plan for plan in manifest.program.segments}
    for file, graph_ports in ports.items():
        folder, _, graph = file.rpartition("/")
        name = graph.split(".")[0]
        if f"{folder}/" == REFERENCE:
            problems = _reference(graphs, graph_ports)
        elif folder == TEXT:
            problems = _text(graphs, file, graph_ports)
        elif name in OTHER_CALLS:
            problems = OTHER_CALLS[name](graphs, graph_ports)
        else:
            problems = _step(graphs, plans[name], graph_ports)
        yield from (f"{file}: {text}" for text in (*_unlisted(manifest, folder, graph_ports), *problems))


def _unlisted(manifest: Manifest, folder: str, ports: Ports) -> Iterator[str]:
    """A graph keeps its larger tensors in files that the manifest vouches for, beside it."""
    for name in sorted(ports.data):
        if "/" in name or f"{folder}/{name}" not in manifest.files:
            yield f"it keeps tensors in {name!r}, and `files` doesn't list that beside it"


def _condition(graphs: Graphs, ports: Ports) -> Iterator[str]:
    conditions: dict[str, Shape] = {
        each.name: (*(("steps",) if each.fresh else ()), "batch", *each.shape)
        for each in graphs.manifest.model.network_inputs
    }
    timed = any(not name.startswith(REQUEST) for name in ports.outputs)
    yield from _differences("takes", ports.inputs, {**({TIMESTEPS: ("steps",)} if timed else {}), **conditions})
    for name, shape in ports.outputs.items():
        once = name.startswith(REQUEST)
        if shape[0 if once else 1 :][:1] != ("batch",):
            rows = "a row for each label" if once else "a row for each step and label"
            yield f"it returns {name!r} of shape {_shown(shape)}, expected {rows}"


def _decode(graphs: Graphs, ports: Ports) -> Iterator[str]:
    yield from _differences("takes", ports.inputs, {"latent": ("batch", *graphs.latent)})
    yield from _differences("returns", ports.outputs, {"image": ("batch", "channels", "height", "width")})


def _text(graphs: Graphs, file: str, ports: Ports) -> Iterator[str]:
    """A text encoder: the tokens of a prompt, and the conditions that it gives; it need not look at the mask."""
    encoder = next(each for each in graphs.manifest.text or () if file in each.files)
    conditions = {condition.name: condition.shape for condition in graphs.manifest.model.conditions}
    tokens: Shape = ("batch", encoder.length)
    yield from _differences("takes", ports.inputs, {INPUT_IDS: tokens}, {ATTENTION_MASK: tokens})
    given: dict[str, Shape] = {name: ("batch", *conditions[name]) for name in encoder.gives}
    yield from _differences("returns", ports.outputs, given)


def _update(graphs: Graphs, ports: Ports) -> Iterator[str]:
    images = graphs.manifest.batch
    rows = images * graphs.manifest.halves
    noise = {"z": (images, *graphs.latent)} if (graphs.tables[f"{SAMPLER}sigma"] > 0).any() else {}
    inputs: dict[str, Shape] = {"x": (rows, *graphs.latent), "out": (rows, *graphs.prediction), "row": ("width",)}
    memory = memory_of(sampler_columns(graphs.tables))
    for of_x, of_out in history_columns(memory):
        inputs |= {of_x: (rows, *graphs.latent), of_out: (images, *graphs.latent)}
    predicted = {PREDICTED: (images, *graphs.latent)} if memory else {}
    yield from _differences("takes", ports.inputs, inputs | noise)
    yield from _differences("returns", ports.outputs, {"next": (rows, *graphs.latent)} | predicted)


OTHER_CALLS: Mapping[str, Callable[[Graphs, Ports], Iterator[str]]] = {
    CONDITION: _condition,
    DECODE: _decode,
    UPDATE: _update,
}


def _step(graphs: Graphs, plan: SegmentPlan, ports: Ports) -> Iterator[str]:
    """A segment of a step: caches as its plan has them, and of all else what it takes."""
    needed = {"x": ("batch", *graphs.latent), **_caches(graphs, plan.reads)}
    needed |= _row_of(graphs, REUSE_ROWS, plan.rows)
    optional = _tables_of_steps(graphs, plan.ahead) | {
        name: shape for name in STEP_INPUTS if name != REUSE_ROWS for name, shape in _row_of(graphs, name).items()
    }
    yield from _differences("takes", ports.inputs, needed, optional)
    returned = {"out": ("batch", *graphs.prediction), **_caches(graphs, plan.writes)}
    yield from _differences("returns", ports.outputs, returned)


def _caches(graphs: Graphs, values: tuple[str, ...]) -> dict[str, Shape]:
    """The ports of cached values."""
    spec = graphs.manifest.model
    return {f"cache.{value}": ("batch", *spec.shape_of(value)) for value in values}


def _reference(graphs: Graphs, ports: Ports) -> Iterator[str]:
    """The FP form of a segment that computes everything; what it leaves for steps that reuse, nobody takes."""
    optional = _tables_of_steps(graphs, None)
    yield from _differences("takes", ports.inputs, {"x": ("batch", *graphs.latent)}, optional)
    out = {"out": ("batch", *graphs.prediction)}
    yield from _differences("returns", {name: shape for name, shape in ports.outputs.items() if name in out}, out)


def _tables_of_steps(graphs: Graphs, ahead: int | None) -> dict[str, Shape]:
    """A step's rows of the conditioning and of tables of timesteps, and those of so many later ones; None for any."""
    once = {name: shape for name, shape in graphs.conditioning.items() if name.startswith(REQUEST)}
    own = {name: shape[1:] for name, shape in graphs.conditioning.items() if name not in once}
    own |= {name: table.shape[1:] for name, table in graphs.tables.items() if name.startswith(OF_STEP)}
    later = {f"{AHEAD}.{name}": ("ahead" if ahead is None else ahead, *rest) for name, rest in own.items()}
    return own | once | ({} if ahead == 0 else later)


def _row_of(graphs: Graphs, name: str, rows: int = 1) -> dict[str, Shape]:
    """The input that takes a row of a table; none where a bundle has no such table, or it takes no rows."""
    table = graphs.tables.get(STEP_INPUTS[name])
    return {} if table is None or not rows else {name: table.shape[1:]}


def _differences(
    does: str, shapes: Mapping[str, Shape], needed: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None
) -> Iterator[str]:
    """Where ports differ from what is needed, and what else may be there."""
    known = {**(optional or {}), **needed}
    for name in (name for name in needed if name not in shapes):
        yield f"it {does} no {name!r}, which the manifest asks for"
    for name, shape in shapes.items():
        if name not in known:
            yield f"it {does} {name!r}, which nothing in the bundle gives or takes"
        elif not _fits(shape, known[name]):
            yield f"it {does} {name!r} of shape {_shown(shape)}, and the manifest asks for {_shown(known[name])}"


def _fits(shape: Shape, wanted: Shape) -> bool:
    """Equal, but that a named dimension stands for any number."""
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(isinstance(a, str) or isinstance(b, str) or a == b for a, b in pairs)


def _shown(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"
