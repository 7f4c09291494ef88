"""The graph of the `update` segment: guidance, the sampler's update and the compensation of one step.

On a GPU this keeps the sample on the device between steps. It is the arithmetic of `Guidance.combine`, of
`runtime.samplers.update` and of `runtime.compensation` in the same order, FP32; the coefficients of a step are an
input, one row of a table.

    inputs   x    (rows, channels, *space)          the sample, once per guidance half
             out  (rows, out_channels, *space)      what the network returned
             row  (width,)                          `row_columns`, then K and mu per channel
             z    (images, channels, *space)        fresh noise, only where the sampler adds any
             x.k, out.k                             those of k steps ago, only for a sampler with memory; x as it is,
                                                    out (images, channels, *space) as it was kept
    outputs  next (rows, channels, *space)          the next sample, once per guidance half
             predicted (images, channels, *space)   the prediction after guidance, only for a sampler with memory
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from ditc.guidance import Guidance
from ditc.program import UPDATE
from ditc.spec import ModelSpec
from ditc.tables import history_columns
from ditc.update_form import PREDICTED, UpdateForm, row_columns

__all__ = ["update_model"]


@dataclass
class _Writer:
    """Appends nodes to a graph; values are named after what they hold."""

    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)

    def node(self, kind: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        return self.many(kind, inputs, [name], **attributes)[0]

    def many(self, kind: str, inputs: list[ir.Value], names: list[str], **attributes: int) -> list[ir.Value]:
        node = ir.node(kind, inputs, attributes=attributes, num_outputs=len(names), name=f"{UPDATE}/{names[0]}")
        for value, name in zip(node.outputs, names, strict=True):
            value.name, value.dtype = name, ir.DataType.FLOAT
        self.nodes.append(node)
        return list(node.outputs)

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.constants.append(value)
        return value

    def pieces(self, value: ir.Value, sizes: list[int], names: list[str], axis: int) -> list[ir.Value]:
        """A value cut along an axis."""
        if len(sizes) == 1:
            return [value]
        lengths = self.constant(f"{names[0]}.sizes", np.array(sizes, np.int64))
        return self.many("Split", [value, lengths], names, axis=axis)

    def times(self, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        return self.node("Mul", [a, b], name)

    def plus(self, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        return self.node("Add", [a, b], name)


def _input(name: str, shape: list[int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def update_model(spec: ModelSpec, form: UpdateForm, images: int) -> ir.Model:
    """The segment for a batch of `images`."""
    guidance = Guidance.of(spec, form.guidance)
    channels, halves, latent = spec.in_channels, guidance.halves, spec.latent_shape
    x = _input("x", [images * halves, *latent])
    out = _input("out", [images * halves, *spec.prediction_shape])
    row = _input("row", [len(row_columns(form.memory)) + 2 * channels])
    z = _input("z", [images, *latent])
    write = _Writer()
    past = [
        (_input(of_x, [images * halves, *latent]), _input(of_out, [images, *latent]))
        for of_x, of_out in history_columns(form.memory)
    ]
    parts = _row_parts(write, row, form.memory, channels)
    sample = write.pieces(x, [images] * halves, ["sample", "sample_again"][:halves], 0)[0]
    prediction, raw_variance = _guided(write, guidance, out, images)
    after = _stepped(write, form, parts, sample, prediction)
    for pair in past:
        after = _with_past(write, parts, after, pair, [images] * halves)
    if form.adds_noise:
        after = _noised(write, form, parts, after, raw_variance, z)
    after = _compensated(write, parts, after, (1, channels, *(1 for _ in spec.space)))
    if halves == 2:
        after = write.node("Concat", [after, after], "next", axis=0)
    else:
        after = write.node("Identity", [after], "next")
    after.shape = ir.Shape([images * halves, *latent])
    outputs = [after]
    if past:
        outputs.append(write.node("Identity", [prediction], PREDICTED))
        outputs[-1].shape = ir.Shape([images, *latent])
    inputs = [x, out, row, *([z] if form.adds_noise else []), *(value for pair in past for value in pair)]
    return _model(write, inputs, outputs)


def _row_parts(write: _Writer, row: ir.Value, memory: int, channels: int) -> dict[str, ir.Value]:
    """Return the coefficients of a step by column, and "k" and "mu", (channels,)."""
    names = [*row_columns(memory), "k", "mu"]
    sizes = [1] * (len(names) - 2) + [channels, channels]
    pieces = write.pieces(row, sizes, [f"row.{name}" if "." in name else name for name in names], 0)
    return dict(zip(names, pieces, strict=True))


def _model(write: _Writer, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    """Return the graph that was written, with the shapes of its inner values: memory is planned by them."""
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=write.nodes,
        initializers=write.constants,
        opset_imports={"": 20},
        name=UPDATE,
    )
    model = ir.Model(graph, ir_version=10, producer_name="ditc")
    ShapeInferencePass()(model)
    return model


def _guided(write: _Writer, guidance: Guidance, out: ir.Value, images: int) -> tuple[ir.Value, ir.Value | None]:
    """(prediction after guidance, raw variance or None), as `Guidance.combine` has them."""
    channels, guided = guidance.channels, guidance.guided_channels
    if guidance.halves == 1:
        conditional, unconditional = out, None
    else:
        conditional, unconditional = write.pieces(out, [images, images], ["conditional", "unconditional"], 0)
    variance = [channels] if guidance.learned_variance else []
    rest = [channels - guided] if channels > guided else []
    sizes = [guided, *rest, *variance]
    names = ["guided", *(["unguided"] if rest else []), *(["raw_variance"] if variance else [])]
    own = write.pieces(conditional, sizes, [f"conditional.{name}" for name in names], 1)
    raw_variance = own[-1] if variance else None
    prediction = own[0]
    if unconditional is not None:
        free = write.pieces(unconditional, sizes, [f"unconditional.{name}" for name in names], 1)[0]
        weight = write.constant("guidance", np.array(guidance.weight, np.float32))
        difference = write.node("Sub", [own[0], free], "difference")
        prediction = write.plus(free, write.times(weight, difference, "weighted"), "prediction.guided")
    if rest:
        prediction = write.node("Concat", [prediction, own[1]], "prediction", axis=1)
    return prediction, raw_variance


def _stepped(write: _Writer, form: UpdateForm, parts: Mapping[str, ir.Value], x: ir.Value, out: ir.Value) -> ir.Value:
    """The sampler's update without its noise."""
    clean = write.plus(write.times(parts["x0_x"], x, "x0.x"), write.times(parts["x0_out"], out, "x0.out"), "x0")
    if form.clips:
        low = write.node("Neg", [parts["clip"]], "clip.low")
        clean = write.node("Max", [write.node("Min", [clean, parts["clip"]], "x0.below"), low], "x0.clipped")
    near = write.plus(write.times(parts["prev_x0"], clean, "prev.x0"), write.times(parts["prev_x"], x, "prev.x"), "mix")
    return write.plus(near, write.times(parts["prev_out"], out, "prev.out"), "prev")


def _with_past(
    write: _Writer,
    parts: Mapping[str, ir.Value],
    after: ir.Value,
    pair: tuple[ir.Value, ir.Value],
    sizes: list[int],
) -> ir.Value:
    """Add an earlier step's sample and prediction; the sample comes once per guidance half."""
    x, out = pair
    earlier = write.pieces(x, sizes, [f"{x.name}.sample", f"{x.name}.again"][: len(sizes)], 0)[0]
    after = write.plus(after, write.times(parts[str(x.name)], earlier, f"{x.name}.scaled"), f"{x.name}.added")
    return write.plus(after, write.times(parts[str(out.name)], out, f"{out.name}.scaled"), f"{out.name}.added")


def _noised(
    write: _Writer,
    form: UpdateForm,
    parts: Mapping[str, ir.Value],
    x: ir.Value,
    raw_variance: ir.Value | None,
    z: ir.Value,
) -> ir.Value:
    """Fresh noise added, with the sampler's own or the learned variance."""
    strength = parts["sigma"]
    if form.learned_variance and raw_variance is not None:
        unit, half = (write.constant(name, np.array(v, np.float32)) for name, v in (("one", 1.0), ("half", 0.5)))
        share = write.times(write.plus(raw_variance, unit, "variance.up"), half, "share")
        rest = write.node("Sub", [unit, share], "share.rest")
        log_var = write.plus(
            write.times(share, parts["log_var_max"], "log_var.max"),
            write.times(rest, parts["log_var_min"], "log_var.min"),
            "log_var",
        )
        strength = write.node("Exp", [write.times(half, log_var, "log_sigma")], "sigma.learned")
        strength = write.times(parts["noise"], strength, "sigma.used")
    return write.plus(x, write.times(strength, z, "noise.scaled"), "noised")


def _compensated(write: _Writer, parts: Mapping[str, ir.Value], x: ir.Value, per_channel: tuple[int, ...]) -> ir.Value:
    """mu + K (x - mu), a number each per channel: of the shape `per_channel`, which spreads over x."""
    shape = write.constant("per_channel", np.array(per_channel, np.int64))
    k, mu = (write.node("Reshape", [parts[name], shape], f"{name}.channels") for name in ("k", "mu"))
    return write.plus(mu, write.times(k, write.node("Sub", [x, mu], "centred"), "scaled"), "compensated")
