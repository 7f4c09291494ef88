"""Peers that run the bundle's own FP reference: ONNX Runtime and OpenVINO, in float and quantized by their own tools.

Each takes the conditioning from tables, as the bundle does, and gives nothing out but the prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ditc.compiler.match import Match
from ditc.compiler.peer import Peer
from ditc.engines.onnxrt import import_onnxruntime

__all__ = ["onnxruntime_f32", "onnxruntime_quant", "openvino_bf16", "openvino_f32", "openvino_int8"]


def onnxruntime_f32(match: Match) -> Peer:
    """The CPU provider with its defaults."""
    return _onnxruntime_peer(match, match.reference, "float32")


def onnxruntime_quant(match: Match) -> Peer:
    """Static QDQ of `onnxruntime.quantization`: linear layers only, per channel, min-max ranges."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantized = match.scratch / "quantized.onnx"
    quantize_static(
        str(match.reference),
        str(quantized),
        _reader(match),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},  # attention's own products lose more than they gain
    )
    return _onnxruntime_peer(match, quantized, f"static INT8, {len(match.points)} points")


def openvino_f32(match: Match) -> Peer:
    """float32 all through, which is not OpenVINO's choice where the processor has bfloat16."""
    return _openvino_peer(match, _openvino_model(match), "f32")


def openvino_bf16(match: Match) -> Peer:
    """bfloat16 products where the processor has them."""
    return _openvino_peer(match, _openvino_model(match), "bf16")


def openvino_int8(match: Match) -> Peer:
    """NNCF's post-training INT8 for transformers; what stays float is in the type that OpenVINO chooses."""
    import nncf

    feeds = match.calibration()
    quantized = nncf.quantize(
        _openvino_model(match),
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        fast_bias_correction=True,
    )
    return _openvino_peer(match, quantized, None, f"nncf {nncf.__version__} INT8, {len(feeds)} points, rest ")


def _onnxruntime_peer(match: Match, path: Path, what: str) -> Peer:
    ort = import_onnxruntime()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return Peer(
        forward=lambda index, rows: session.run(["out"], match.feeds(index, rows))[0],
        what=f"onnxruntime {ort.__version__}, {what}",
    )


def _reader(match: Match) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Points(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.feeds: Iterator[Mapping[str, Any]] = iter(match.calibration())

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self.feeds, None)

    return Points()


def _openvino_model(match: Match) -> Any:
    import openvino

    model = openvino.Core().read_model(str(match.reference))
    feeds = match.feeds(match.index, match.run.rows(match.x))
    model.reshape({name: list(array.shape) for name, array in feeds.items()})
    return model


def _openvino_peer(match: Match, model: Any, precision: str | None, what: str = "") -> Peer:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY"} | ({} if precision is None else {"INFERENCE_PRECISION_HINT": precision})
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    kind = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return Peer(
        forward=lambda index, rows: request.infer(match.feeds(index, rows))["out"],
        what=f"openvino {openvino.__version__.split('-')[0]}, {what}{kind}",
    )
