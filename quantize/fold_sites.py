"""Sites where a factor per channel folds in front of linear layers, so that dividing their input costs nothing.

A linear layer computes the same from x / s with its weight's rows times s. The division has to vanish into constants,
and two places allow it: the rows of a table that modulate the input, of `condition` or of the timesteps, and the layer
or table of a text whose channels attention mixes over tokens. Both are recognised in the graph by what it computes.
In front of a nonlinearity, as between GELU and the second layer of an MLP, nothing can vanish, and such layers are left
alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.program import AHEAD, OF_STEP, REQUEST
from ditc.quantize.element_places import Places, moved_from, origin_of, readings, row_shape
from ditc.quantize.linears import Linear, linears_of
from ditc.quantize.output_factors import scaled_tensor

__all__ = [
    "Fold",
    "Site",
    "TableFold",
    "ValuesFold",
    "WeightFold",
    "common_sites",
    "fold_into_segment",
    "layer_bias",
    "shapes_of_rows",
    "table_factors",
]

Factors = NDArray[np.float64]

LATER = f"{AHEAD}."  # before a table's name: that of the next steps


@dataclass(frozen=True)
class TableFold:
    """1/s goes into a table: at places of one row of it, flattened, for the scale and for the shift."""

    table: str
    scale: tuple[int, ...]
    shift: tuple[int, ...]

    @property
    def places(self) -> list[int]:
        return [*self.scale, *self.shift]


@dataclass(frozen=True)
class WeightFold:
    """1/s goes into output channels of a layer: column `columns[j]` of its weight becomes channel j of the input."""

    layer: str
    columns: tuple[int, ...]


@dataclass(frozen=True)
class ValuesFold:
    """1/s goes into a table of the request, (heads, tokens, width) of a row: values that attention mixes over tokens.

    Its channel `columns[j]`, of heads * width, becomes channel j of the input.
    """

    table: str
    columns: tuple[int, ...]


Fold = TableFold | WeightFold | ValuesFold


@dataclass(frozen=True)
class Site:
    """Linear layers (`Linear.name`) that read one activation, and where a division of it can be folded."""

    layers: tuple[str, ...]
    activation: str
    fold: Fold


@dataclass(frozen=True)
class _Graph:
    """A segment as the finders see it.

    `moved` follows each table it takes. `reads` counts, for every place of a table's row, who computes with it, in the
    step's own table and in those of later steps alike; None where that can't be known.
    """

    linears: Mapping[str, Linear]
    moved: Mapping[str, Mapping[ir.Value, Places]]
    reads: Mapping[str, NDArray[np.int64] | None]

    @staticmethod
    def of(model: ir.Model) -> _Graph:
        linears = list(linears_of(model))
        times = Counter(linear.path for linear in linears)
        moved = {str(value.name): _rows_from(value) for value in model.graph.inputs}
        reads: dict[str, NDArray[np.int64] | None] = {}
        for name, followed in moved.items():
            table = name.removeprefix(LATER)
            before, counts = reads.get(table, np.zeros(1, np.int64)), _reads(followed)
            reads[table] = None if before is None or counts is None else before + counts
        own = {name: followed for name, followed in moved.items() if not name.startswith(LATER)}
        return _Graph({each.name: each for each in linears if times[each.path] == 1}, own, reads)

    def reading(self, activation: ir.Value) -> list[Linear]:
        """The linear layers that read an activation, or none where anything else reads it, or weights are shared."""
        layers = [linear for linear in self.linears.values() if linear.activation is activation]
        alone = len(activation.uses()) == len(layers) and not activation.is_graph_output()
        return layers if alone and all(_is_own(linear.weight) for linear in layers) else []


def _rows_from(table: ir.Value) -> dict[ir.Value, Places]:
    """`moved_from` with places in one row of a table.

    A table is (batch, ...) of one step or (steps, batch, ...) of several; without the batch where it is of OF_STEP.
    """
    shape = row_shape(table)
    if shape is None:
        return {}
    places = np.arange(int(np.prod(shape))) % int(np.prod(shape[_leading(str(table.name)) :]))
    return moved_from(table, places.reshape(shape))


def _leading(name: str) -> int:
    """Return the number of axes in front of a row of a table that a segment takes, its batch counted as 1."""
    return 0 if name.startswith(OF_STEP) else 1


def shapes_of_rows(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Return the shape of one row of each table that a segment takes, by name."""
    return {str(value.name): (row_shape(value) or ())[_leading(str(value.name)) :] for value in model.graph.inputs}


def _reads(moved: Mapping[ir.Value, Places]) -> NDArray[np.int64] | None:
    if not moved:
        return None
    counts = np.zeros(1 + max(int(places.max()) for places in moved.values()), np.int64)
    for reading in readings(moved):
        counts += np.bincount(reading.places.ravel(), minlength=len(counts))
    return counts


def _is_own(constant: ir.Value) -> bool:
    """Is this a constant that one node alone reads?"""
    return constant.const_value is not None and len(constant.uses()) == 1 and not constant.is_graph_output()


def modulated(graph: _Graph, activation: ir.Value) -> TableFold | None:
    """x = n * scale + shift, with both rows taken from one table (adaLN)."""
    for product, shift in _operands(activation, "Add"):
        if len(product.uses()) != 1:
            continue
        for _, scale in _operands(product, "Mul"):
            for table, moved in graph.moved.items():
                rows = [moved.get(row) for row in (scale, shift)]
                if all(row is not None and row.size == row.shape[-1] == _width(activation) for row in rows):
                    return TableFold(table, *(tuple(row.ravel().tolist()) for row in rows if row is not None))
    return None


def _operands(value: ir.Value, op_type: str) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of the operands of a commutative operator, where it made the value."""
    node = value.producer()
    if node is not None and node.op_type == op_type:
        first, second = node.inputs
        if first is not None and second is not None:
            yield first, second
            yield second, first


def _width(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None


def attended(graph: _Graph, activation: ir.Value) -> WeightFold | None:
    """x = softmax(...) @ v, channels rearranged: what mixes tokens keeps channels apart, so 1/s passes through to v."""
    mixed = origin_of(activation)
    mix = mixed.producer()
    if mix is None or mix.op_type != "MatMul" or mix.inputs[1] is None or mix.inputs[1].const_value is not None:
        return None
    projected = origin_of(mix.inputs[1])
    source = _layer_behind(graph, projected)
    if source is None:
        return None
    shape = row_shape(projected)
    if shape is None:
        return None
    columns = np.broadcast_to(np.arange(shape[-1]), shape)
    moved = moved_from(projected, columns)
    arrived = _columns_behind(mix, moved, mixed, activation)
    if arrived is None:
        return None
    for reading in readings(moved):
        if (reading.node is not mix or reading.place != 1) and np.isin(arrived, reading.places).any():
            return None
    return WeightFold(source.name, tuple(arrived.tolist()))


def attended_text(graph: _Graph, activation: ir.Value) -> ValuesFold | None:
    """The same where v is a table of the request, in heads: (batch, heads, tokens, width)."""
    mixed = origin_of(activation)
    mix = mixed.producer()
    values = mix.inputs[1] if mix is not None and mix.op_type == "MatMul" else None
    shape = None if values is None else row_shape(values)
    if mix is None or values is None or shape is None or len(shape) != 4:
        return None
    if not values.is_graph_input() or not str(values.name).startswith(REQUEST) or len(values.uses()) != 1:
        return None
    _, heads, _, width = shape
    columns = np.arange(heads)[:, None, None] * width + np.arange(width)  # whatever the token
    arrived = _columns_behind(mix, {values: np.broadcast_to(columns, shape)}, mixed, activation)
    return None if arrived is None else ValuesFold(str(values.name), tuple(arrived.tolist()))


def _layer_behind(graph: _Graph, projected: ir.Value) -> Linear | None:
    """The linear layer whose output, with its bias added, is this value."""
    node = projected.producer()
    if node is not None and node.op_type == "Add":
        product, bias = next(
            ((a, b) for a, b in _operands(projected, "Add") if b.const_value is not None), (None, None)
        )
        if product is None or bias is None or not _is_own(bias) or len(bias.shape or ()) != 1:
            return None
        if len(product.uses()) != 1:
            return None
        node = product.producer()
    layers = [linear for linear in graph.linears.values() if linear.node is node]
    return layers[0] if layers and _is_own(layers[0].weight) else None


def _columns_behind(
    mix: ir.Node, moved: Mapping[ir.Value, Places], mixed: ir.Value, activation: ir.Value
) -> Places | None:
    """The column of v's layer that each channel of the activation is a mixture of, (channels,)."""
    weights, values = mix.inputs
    columns = moved.get(values) if values is not None else None  # (batch, heads, tokens, channels of a head)
    tokens = weights.shape[-2] if weights is not None and weights.shape is not None else None
    if columns is None or columns.ndim < 2 or not isinstance(tokens, int) or (columns != columns[..., :1, :]).any():
        return None
    after = moved_from(mixed, np.repeat(columns[..., :1, :], tokens, axis=-2))
    arrived = after.get(activation)
    if arrived is None or any(reading.places is not arrived for reading in readings(after)):
        return None  # or someone else reads the mixture
    rows = arrived.reshape(-1, arrived.shape[-1])
    distinct = len(np.unique(rows[0])) == rows.shape[1]
    return rows[0] if distinct and (rows == rows[0]).all() else None


FINDERS: tuple[Callable[[_Graph, ir.Value], Fold | None], ...] = (modulated, attended, attended_text)


def common_sites(models: Mapping[str, ir.Model]) -> tuple[Site, ...]:
    """The sites of segment `full` at which every other segment agrees, in graph order.

    `models` are the FP forms of all segments that take the tables of `condition`, by name. A site is left out where a
    segment computes its layers in another way, or reads the table rows for anything else.
    """
    graphs = {name: _Graph.of(model) for name, model in models.items()}
    return tuple(site for site in _sites(graphs["full"]) if all(_agrees(graph, site) for graph in graphs.values()))


def _sites(graph: _Graph) -> Iterator[Site]:
    seen = set()
    for linear in graph.linears.values():
        activation = linear.activation
        if activation in seen:
            continue
        seen.add(activation)
        layers = tuple(each.name for each in graph.reading(activation))
        fold = next((fold for finder in FINDERS if (fold := finder(graph, activation)) is not None), None)
        if layers and fold is not None:
            yield Site(layers, str(activation.name), fold)


def _agrees(graph: _Graph, site: Site) -> bool:
    """Does a segment compute a site's layers in the same way, or not at all, and nothing else with what they share?"""
    present = [name for name in site.layers if name in graph.linears]
    if isinstance(site.fold, TableFold) and not _all_read(graph, site.fold, times=bool(present)):
        return False
    if isinstance(site.fold, ValuesFold) and not present and site.fold.table in graph.reads:
        return False
    if not present:
        return True
    activation = graph.linears[present[0]].activation
    same = any(finder(graph, activation) == site.fold for finder in FINDERS)
    return same and tuple(each.name for each in graph.reading(activation)) == site.layers


def _all_read(graph: _Graph, fold: TableFold, times: int) -> bool:
    """Is each place of a fold read that many times in a segment?"""
    if fold.table not in graph.reads:
        return times == 0
    reads = graph.reads[fold.table]
    return reads is not None and bool((reads[fold.places] == times).all())


def fold_into_segment(model: ir.Model, factors: Mapping[Site, Factors]) -> bool:
    """Fit a segment's weights to inputs divided by `factors`, (channels,) for each site. Returns whether any changed.

    The rows of a site's layers are multiplied; where the division folds into another layer, its columns are divided.
    """
    linears = {linear.name: linear for linear in linears_of(model)}
    changed = False
    for site, factor in factors.items():
        if site.layers[0] not in linears:
            continue
        changed = True
        for name in site.layers:
            _multiply(linears[name].weight, factor[:, None])
        if isinstance(site.fold, WeightFold):
            source = linears[site.fold.layer]
            _divide_columns(source, site.fold.columns, factor)
    return changed


def _divide_columns(source: Linear, columns: Sequence[int], factor: Factors) -> None:
    assert source.weight.const_value is not None
    share = np.ones(source.weight.const_value.shape.numpy()[1])
    share[list(columns)] = 1 / factor
    _multiply(source.weight, share)
    bias = layer_bias(source)
    if bias is not None:
        _multiply(bias, share)


def layer_bias(linear: Linear) -> ir.Value | None:
    """Return the constant that is added to a layer's product, None where there is none."""
    after = linear.node.outputs[0].uses()
    return next((value for node, _ in after if node.op_type == "Add" for value in node.inputs if _is_bias(value)), None)


def _is_bias(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _multiply(constant: ir.Value, factor: Factors) -> None:
    assert constant.const_value is not None
    constant.const_value = scaled_tensor(constant.const_value, factor, str(constant.name))


def table_factors(factors: Mapping[Site, Factors], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Factors]:
    """Return the factors of each table by its name, in its row's shape or to be broadcast to it.

    Tables that stay are left out. `shapes` are those of the rows.
    """
    by_table: dict[str, Factors] = {}
    for site, factor in factors.items():
        if isinstance(site.fold, ValuesFold):
            heads, _, width = shapes[site.fold.table]
            values = by_table[site.fold.table] = np.ones((heads, 1, width))
            values.reshape(-1)[list(site.fold.columns)] = 1 / factor
        elif isinstance(site.fold, TableFold):
            table = by_table.setdefault(site.fold.table, np.ones(shapes[site.fold.table]))
            for places in (site.fold.scale, site.fold.shift):
                table.reshape(-1)[list(places)] = 1 / factor
    return by_table
