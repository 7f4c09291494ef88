"""Rotated forms of segments: the same function, whose linear layers read x R and have R^-1 W (`rotation`).

R^-1 goes into the weights always. R vanishes where attention mixes over tokens the channels of a layer whose columns
can take it (`fold_sites`), as long as a group of channels stays within a head. Elsewhere one product with the matrix
is put in front of the layers, for all that read one tensor together: modulation and GELU treat channels apart, so
nothing in front of them can take R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.errors import DitcError, InputError
from ditc.quantize.activation_pairs import add_constant
from ditc.quantize.element_places import moved_from, origin_of, row_shape
from ditc.quantize.fold_sites import Site, WeightFold, common_sites, layer_bias
from ditc.quantize.linears import ROLE_KEY, ROTATES, Linear, linears_of
from ditc.quantize.rotation import Matrix, Rotation, columns_turned, hadamard, inverse, rows_turned

__all__ = ["check_groups", "check_rotated", "foldable_layers", "rotate"]

ROTATED_KEY = "ditc.rotated"  # metadata of a segment: the size of the groups
MATRIX = "rotation"  # a constant of the segment

Turn = Callable[[Matrix], Matrix]


def check_groups(model: ir.Model, size: int) -> None:
    """Raise InputError where groups of `size` channels don't divide what a linear layer reads."""
    widths = {linear.name: _width(linear) for linear in linears_of(model)}
    whole = int(np.gcd.reduce(list(widths.values()))) if widths else size
    largest = whole & -whole
    for layer, width in widths.items():
        if width % size:
            advice = f"give at most --rotate {largest}" if largest > 1 else "leave --rotate out"
            raise InputError(
                f"--rotate {size} needs inputs of linear layers that {size} divides, found {width} channels at "
                f"{layer}; {advice}"
            )


def _width(linear: Linear) -> int:
    assert linear.weight.shape is not None
    return int(linear.weight.shape[0])  # type: ignore[arg-type]


def foldable_layers(models: Mapping[str, ir.Model], size: int) -> tuple[str, ...]:
    """Return the layers (`Linear.name`) whose input can be rotated at no cost, in every segment that computes them."""
    return tuple(
        layer
        for site in common_sites(models)
        if isinstance(site.fold, WeightFold) and all(_stays_in_heads(model, site, size) for model in models.values())
        for layer in site.layers
    )


def _stays_in_heads(model: ir.Model, site: Site, size: int) -> bool:
    """Is every group of channels mixed by one attention matrix, so that it can be rotated before?"""
    readers = [linear for linear in linears_of(model) if linear.name == site.layers[0]]
    return all(_mixed_alike(linear.activation, size) for linear in readers)


def _mixed_alike(activation: ir.Value, size: int) -> bool:
    mixed = origin_of(activation)
    shape = row_shape(mixed)
    if shape is None or len(shape) < 2:
        return False
    mixers = np.arange(int(np.prod(shape[:-2]))).reshape(*shape[:-2], 1, 1)
    arrived = moved_from(mixed, np.broadcast_to(mixers, shape)).get(activation)
    if arrived is None or arrived.shape[-1] % size:
        return False
    groups = arrived.reshape(-1, size)
    return bool((groups == groups[:, :1]).all())


def rotate(model: ir.Model, rotation: Rotation) -> bool:
    """Rotate the inputs of all linear layers of a segment in place, the same function. Returns whether any changed.

    Layers that read the same tensor share one product. Raises DitcError where a layer named as folded can't be.
    """
    linears = list(linears_of(model))
    if not linears or rotated_by(model):
        return False
    matrix = hadamard(rotation.size)
    layers = {linear.name: linear for linear in linears}
    sources = _sources(model, rotation)
    for weight in dict.fromkeys(linear.weight for linear in linears):
        _turn(_own(model, weight, linears), partial(rows_turned, matrix=inverse(matrix)))
    for fold in sources.values():
        for constant in filter(None, (layers[fold.layer].weight, layer_bias(layers[fold.layer]))):
            _turn(constant, partial(columns_turned, matrix=matrix, columns=fold.columns))
    products: dict[ir.Value, ir.Value] = {}
    for linear in linears:
        activation = linear.activation
        if linear.name in sources:
            continue
        if activation not in products:
            products[activation] = _rotated(model, linear, matrix)
        linear.node.replace_input_with(0, products[activation])
    model.metadata_props[ROTATED_KEY] = str(rotation.size)
    return True


def rotated_by(model: ir.Model) -> int | None:
    """Return the size of the groups by which a segment's linear layers are rotated, None for none."""
    size = model.metadata_props.get(ROTATED_KEY)
    return None if size is None else int(size)


def check_rotated(model: ir.Model, rotation: Rotation | None) -> None:
    """Raise DitcError where a segment's linear layers don't read what scales were taken of."""
    wanted, own = None if rotation is None else rotation.size, rotated_by(model)
    if wanted != own and any(linears_of(model)):
        raise DitcError(f"scales are of inputs in rotated groups of {wanted}, the segment has {own}; rotate it first")


def _sources(model: ir.Model, rotation: Rotation) -> dict[str, WeightFold]:
    """Return the layer in front of attention that takes R, for each layer that is folded and is in the segment."""
    sites = common_sites({"full": model})
    folds = {layer: site.fold for site in sites for layer in site.layers if _stays_in_heads(model, site, rotation.size)}
    sources = {}
    for linear in linears_of(model):
        if linear.name in rotation.folded:
            fold = folds.get(linear.name)
            if not isinstance(fold, WeightFold):
                raise DitcError(f"nothing in front of {linear.name} can take its rotation; compile the bundle again")
            sources[linear.name] = fold
    return sources


def _own(model: ir.Model, weight: ir.Value, linears: Iterable[Linear]) -> ir.Value:
    """Return a weight that linear layers alone read: itself, or a copy for them."""
    readers = [linear.node for linear in linears if linear.weight is weight]
    if len(weight.uses()) == len(readers) and not weight.is_graph_output():
        return weight
    copy = ir.Value(name=f"{weight.name}.rotated", shape=weight.shape, type=weight.type, const_value=weight.const_value)
    model.graph.register_initializer(copy)
    for node in readers:
        node.replace_input_with(1, copy)
    return copy


def _turn(constant: ir.Value, turn: Turn) -> None:
    """Change a constant when it is written: a large model's weights are not held in memory."""
    tensor, name = constant.const_value, str(constant.name)
    assert tensor is not None

    def turned() -> ir.TensorProtocol:
        return ir.Tensor(turn(tensor.numpy().astype(np.float64)).astype(np.float32), name=name)

    constant.const_value = ir.LazyTensor(turned, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _rotated(model: ir.Model, linear: Linear, matrix: Matrix) -> ir.Value:
    """Put the product with R in front of a layer; returns its output, of the activation's shape."""
    size, activation = len(matrix), linear.activation
    assert activation.shape is not None
    leading, width = list(activation.shape)[:-1], _width(linear)
    value = activation
    if width > size:
        value = _reshaped(model, linear, value, [*leading, width // size, size], "groups")
    value = _node(model, linear, "MatMul", (value, _constant(model, MATRIX, matrix.astype(np.float32))), "turned")
    value.shape = ir.Shape([*leading, width // size, size] if width > size else [*leading, width])
    if width > size:
        value = _reshaped(model, linear, value, [*leading, width], "rotated")
    return value


def _reshaped(
    model: ir.Model, linear: Linear, value: ir.Value, shape: Sequence[int | ir.SymbolicDim], word: str
) -> ir.Value:
    """Reshape a value; 0 takes over an open dimension, which keeps its place."""
    sizes = np.array([size if isinstance(size, int) else 0 for size in shape], np.int64)
    constant = _constant(model, f"{MATRIX}.shape_{'_'.join(map(str, sizes))}", sizes)
    out = _node(model, linear, "Reshape", (value, constant), word)
    out.shape = ir.Shape(shape)
    return out


def _constant(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    known = model.graph.initializers.get(name)
    return add_constant(model, name, array) if known is None else known


def _node(model: ir.Model, linear: Linear, kind: str, inputs: tuple[ir.Value, ir.Value], word: str) -> ir.Value:
    node = ir.node(kind, inputs, name=f"{linear.name}/{kind}_{word}")
    node.metadata_props.update(linear.node.metadata_props)
    node.metadata_props[ROLE_KEY] = ROTATES
    model.graph.insert_before(linear.node, node)
    out = node.outputs[0]
    out.name, out.dtype = f"{linear.activation.name}.{word}", ir.DataType.FLOAT
    return out
