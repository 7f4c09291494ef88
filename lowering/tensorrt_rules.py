"""Rules of TensorRT's ONNX parser and its explicit quantization, checked on the CPU, naming the node.

Sources: onnx-tensorrt's public operator list (docs/operators.md, TensorRT 10.15) and TensorRT's documentation of
quantized types. A check here can't prove that an engine builds; it finds what is known not to build, or to build into
something slow or wrong, before a GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["OPERATORS", "RULES", "Violation", "violations_of"]

T = ir.DataType
FLOATS = frozenset({T.FLOAT, T.FLOAT16, T.BFLOAT16})
NUMBERS = FLOATS | {T.INT32, T.INT64}
ANY = NUMBERS | {T.BOOL}

# operators that DiT segments and VAE decoders use, with the types the parser takes for their first input
OPERATORS: dict[str, frozenset[ir.DataType]] = {
    **dict.fromkeys(("Abs", "Add", "Div", "Max", "Min", "Mul", "Neg", "Pow", "Sub"), NUMBERS),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum"), NUMBERS),
    **dict.fromkeys(("Cos", "Erf", "Exp", "Reciprocal", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh"), FLOATS),
    **dict.fromkeys(("Conv", "Gelu", "Gemm", "MatMul", "Resize"), FLOATS),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"), FLOATS),
    **dict.fromkeys(("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity"), ANY),
    **dict.fromkeys(("Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where"), ANY),
    "DequantizeLinear": frozenset({T.INT8}),
    "QuantizeLinear": FLOATS,
}
QUANTIZED_CONSUMERS = ("Conv", "Gemm", "MatMul")
FP16_SCALE_OPSET = 19


@dataclass(frozen=True)
class Violation:
    """A rule that a node breaks: `rule` names it, `problem` says what was seen and what is expected."""

    node: str
    rule: str
    problem: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}: {self.problem}"


Rule = Callable[[ir.Node, int], "str | None"]  # (node, opset) -> what is wrong


def _constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())


def _is_qdq(node: ir.Node) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _is_weight(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and _constant(node.inputs[0]) is not None


def operator_known(node: ir.Node, opset: int) -> str | None:
    if node.domain not in ("", "ai.onnx"):
        return f"operator {node.domain}::{node.op_type} needs a plugin; use standard operators"
    return None if node.op_type in OPERATORS else f"operator {node.op_type} is not known to build"


def type_taken(node: ir.Node, opset: int) -> str | None:
    first = node.inputs[0] if node.inputs else None
    if first is None or first.dtype is None or node.op_type not in OPERATORS:
        return None
    known = OPERATORS[node.op_type]
    return None if first.dtype in known else f"{node.op_type} of {first.dtype.name}"


def zero_point_is_zero(node: ir.Node, opset: int) -> str | None:
    zero = _constant(node.inputs[2]) if _is_qdq(node) and len(node.inputs) > 2 else None
    return f"zero point {zero.ravel()[0]}, expected 0" if zero is not None and zero.any() else None


def quantized_type_is_int8(node: ir.Node, opset: int) -> str | None:
    zero = node.inputs[2] if _is_qdq(node) and len(node.inputs) > 2 else None
    if zero is None or zero.dtype in (None, T.INT8):
        return "no zero point, so the type is uint8" if _is_qdq(node) and len(node.inputs) < 3 else None
    return f"quantized to {zero.dtype.name}, expected INT8"


def scale_is_constant(node: ir.Node, opset: int) -> str | None:
    return "the scale is computed at run time" if _is_qdq(node) and _constant(node.inputs[1]) is None else None


def scale_is_positive(node: ir.Node, opset: int) -> str | None:
    scale = _constant(node.inputs[1]) if _is_qdq(node) else None
    if scale is None:
        return None
    numbers = scale.astype(np.float64)
    usable = np.isfinite(numbers).all() and (numbers > 0).all()
    return None if usable else f"smallest scale {numbers.min():g}, expected positive numbers"


def activations_are_per_tensor(node: ir.Node, opset: int) -> str | None:
    scale = _constant(node.inputs[1]) if _is_qdq(node) and not _is_weight(node) else None
    return f"{scale.size} scales for an activation, expected 1" if scale is not None and scale.size > 1 else None


def weights_are_per_output_channel(node: ir.Node, opset: int) -> str | None:
    if not _is_weight(node):
        return None
    scale, weight = _constant(node.inputs[1]), _constant(node.inputs[0])
    users = [use.node.op_type for use in node.outputs[0].uses()]
    if scale is None or weight is None or scale.size == 1 or "MatMul" not in users:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    outputs = weight.ndim - 1
    return None if axis % weight.ndim == outputs else f"scales along axis {axis}, expected the output axis {outputs}"


def no_blocks(node: ir.Node, opset: int) -> str | None:
    size = node.attributes["block_size"].as_int() if _is_qdq(node) and "block_size" in node.attributes else 0
    return f"INT8 in blocks of {size}; TensorRT has no INT8 block kernels" if size else None


def scale_matches_float_side(node: ir.Node, opset: int) -> str | None:
    if not _is_qdq(node) or node.inputs[1] is None:
        return None
    scale = node.inputs[1].dtype
    values = node.inputs[0].dtype if node.op_type == "QuantizeLinear" and node.inputs[0] else node.outputs[0].dtype
    return None if None in (scale, values) or scale == values else f"scale is {scale}, the float side {values}"


def half_scales_have_an_opset(node: ir.Node, opset: int) -> str | None:
    half = _is_qdq(node) and node.inputs[1] is not None and node.inputs[1].dtype in (T.FLOAT16, T.BFLOAT16)
    return (
        f"a half scale at opset {opset}, expected {FP16_SCALE_OPSET} or later"
        if half and opset < FP16_SCALE_OPSET
        else None
    )


def quantizer_is_followed_by_dequantizer(node: ir.Node, opset: int) -> str | None:
    if node.op_type != "QuantizeLinear":
        return None
    others = [use.node.op_type for use in node.outputs[0].uses() if use.node.op_type != "DequantizeLinear"]
    if others:
        return f"its output feeds {others[0]}, expected DequantizeLinear"
    return None if node.outputs[0].uses() else "nothing dequantizes its output"


def only_linear_layers_are_quantized(node: ir.Node, opset: int) -> str | None:
    if node.op_type != "DequantizeLinear":
        return None
    others = [use.node.op_type for use in node.outputs[0].uses() if use.node.op_type not in QUANTIZED_CONSUMERS]
    return f"it feeds {others[0]}, expected a linear layer; keep that operator unquantized" if others else None


def normalization_is_float32(node: ir.Node, opset: int) -> str | None:
    half = "Normalization" in node.op_type and node.inputs[0] is not None and node.inputs[0].dtype == T.FLOAT16
    return "computed in FP16, which overflows; cast to FP32 around it" if half else None


RULES: dict[str, Rule] = {
    "unknown operator": operator_known,
    "type": type_taken,
    "zero point": zero_point_is_zero,
    "quantized type": quantized_type_is_int8,
    "constant scale": scale_is_constant,
    "positive scale": scale_is_positive,
    "per-tensor activation": activations_are_per_tensor,
    "per-channel weight": weights_are_per_output_channel,
    "no blocks": no_blocks,
    "scale type": scale_matches_float_side,
    "opset": half_scales_have_an_opset,
    "Q then DQ": quantizer_is_followed_by_dequantizer,
    "quantized operator": only_linear_layers_are_quantized,
    "FP32 normalization": normalization_is_float32,
}


def violations_of(model: ir.Model) -> Iterator[Violation]:
    """Every rule that a node of the graph breaks, in graph order."""
    opset = model.graph.opset_imports.get("", 0)
    for node in model.graph:
        for name, rule in RULES.items():
            problem = rule(node, opset)
            if problem:
                yield Violation(node.name or node.op_type, name, problem)
