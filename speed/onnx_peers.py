"""Peers that run the bundle's own FP reference: ONNX Runtime and OpenVINO, in float and quantized by their own tools.

Each takes the conditioning from tables, as the bundle does, and gives nothing out but the prediction. On a CPU whose
integer products would saturate, the quantized ones take the form that their library has for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ditc.engines.integer_form import IntegerForm
from ditc.engines.onnxrt import exact_entries, import_onnxruntime
from ditc.engines.onnxrt_exactness import FORM_ENTRIES
from ditc.errors import InputError
from ditc.precision import INT8
from ditc.speed.peer import Peer
from ditc.speed.peer_task import PeerTask

__all__ = ["onnxruntime_f32", "onnxruntime_quant", "openvino_bf16", "openvino_f32", "openvino_int8"]


def onnxruntime_f32(task: PeerTask) -> Peer:
    """Return ONNX Runtime's CPU provider with its defaults."""
    return _onnxruntime_peer(task, task.reference, "float32")


def onnxruntime_quant(task: PeerTask) -> Peer:
    """Return `onnxruntime.quantization`'s static QDQ: linear layers only, per channel, min-max ranges."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantized = task.scratch / "quantized.onnx"
    quantize_static(
        str(task.reference),
        str(quantized),
        _reader(task),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},  # attention's own products lose more than they gain
    )
    return _onnxruntime_peer(task, quantized, f"static INT8, {len(task.points)} points")


def openvino_f32(task: PeerTask) -> Peer:
    """Return OpenVINO in float32 all through, which is not its own choice where the processor has bfloat16."""
    return _openvino_peer(task, _openvino_model(task), "f32")


def openvino_bf16(task: PeerTask) -> Peer:
    """Return OpenVINO with bfloat16 products. Raises InputError where a processor has none: it takes float32 there."""
    peer = _openvino_peer(task, _openvino_model(task), "bf16")
    if not peer.what.endswith("bf16"):
        raise InputError(f"this CPU has no bfloat16, so it would be openvino-f32 again ({peer.what})")
    return peer


def openvino_int8(task: PeerTask) -> Peer:
    """Return NNCF's post-training INT8 for transformers; what stays float is in the type that OpenVINO chooses."""
    import nncf

    from ditc.engines.openvino_host import openvino_here

    # of the half range that fits in 16 bits
    exact = openvino_here("f32").exactness.form(INT8.weights) is not None
    half = None if exact else nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    feeds = task.calibration()
    quantized = nncf.quantize(
        _openvino_model(task),
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        fast_bias_correction=True,
        advanced_parameters=half,
    )
    kind = "INT8" if exact else "INT8 with 7-bit weights"
    return _openvino_peer(task, quantized, None, f"nncf {nncf.__version__} {kind}, {len(feeds)} points, rest ")


def _onnxruntime_peer(task: PeerTask, path: Path, what: str) -> Peer:
    ort, entries = import_onnxruntime(), exact_entries(path)
    options = ort.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    switched = ", unsigned weights" if entries == FORM_ENTRIES[IntegerForm.SWITCHED] else ""
    return Peer(
        forward=lambda index, rows: session.run(["out"], task.feeds(index, rows))[0],
        what=f"onnxruntime {ort.__version__}, {what}{switched}",
    )


def _reader(task: PeerTask) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Points(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self.feeds: Iterator[Mapping[str, Any]] = iter(task.calibration())

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self.feeds, None)

    return Points()


def _openvino_model(task: PeerTask) -> Any:
    import openvino

    model = openvino.Core().read_model(str(task.reference))
    feeds = task.feeds(task.index, task.run.guidance.rows(task.x))
    model.reshape({name: list(array.shape) for name, array in feeds.items()})
    return model


def _openvino_peer(task: PeerTask, model: Any, precision: str | None, what: str = "") -> Peer:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY"} | ({} if precision is None else {"INFERENCE_PRECISION_HINT": precision})
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    kind = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return Peer(
        forward=lambda index, rows: request.infer(task.feeds(index, rows))["out"],
        what=f"openvino {openvino.__version__.split('-')[0]}, {what}{kind}",
    )
