"""Where a bundle can run: the target's name to its backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ditc.engines.backend import Backend, DeviceBackend
from ditc.errors import InputError, unknown_name

__all__ = ["TARGETS", "backend_for"]

Opener = Callable[[Path | None], "Backend | DeviceBackend"]


def _refuse_store(target: str, store: Path | None) -> None:
    if store is not None:
        raise InputError(
            f"--engines is for the targets tensorrt and ort-tensorrt; {target} has no engines, leave it out"
        )


def _cpu(store: Path | None) -> Backend:
    _refuse_store("cpu", store)
    from ditc.engines.onnxrt import OnnxRuntimeBackend

    return OnnxRuntimeBackend()


def _openvino(store: Path | None) -> Backend:
    _refuse_store("openvino", store)
    from ditc.engines.openvino_host import OpenVinoBackend

    return OpenVinoBackend()


def _openvino_bf16(store: Path | None) -> Backend:
    _refuse_store("openvino-bf16", store)
    from ditc.engines.openvino_host import OpenVinoBackend

    return OpenVinoBackend(rest="bf16")


def _tensorrt(store: Path | None) -> DeviceBackend:
    from ditc.engines.trt_runtime import TensorRTBackend

    return TensorRTBackend(store)


def _cuda(store: Path | None) -> DeviceBackend:
    _refuse_store("cuda", store)
    from ditc.engines.onnxrt_device import CUDA, OnnxRuntimeDeviceBackend

    return OnnxRuntimeDeviceBackend(CUDA)


def _ort_tensorrt(store: Path | None) -> DeviceBackend:
    from ditc.engines.onnxrt_device import TENSORRT, OnnxRuntimeDeviceBackend

    return OnnxRuntimeDeviceBackend(TENSORRT, cache=store)


TARGETS: dict[str, Opener] = {
    "cpu": _cpu,
    "openvino": _openvino,
    "openvino-bf16": _openvino_bf16,
    "cuda": _cuda,
    "tensorrt": _tensorrt,
    "ort-tensorrt": _ort_tensorrt,
}


def backend_for(target: str, store: Path | None = None) -> Backend | DeviceBackend:
    """The backend of a target. `store` is the folder of its engines, None for the bundle's own."""
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    return TARGETS[target](store)
