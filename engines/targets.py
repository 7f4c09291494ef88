"""Targets, where a bundle can run: name to backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ditc.engines.backend import Backend, DeviceBackend
from ditc.errors import InputError, unknown_name

__all__ = ["MOST_THREADS", "TARGETS", "backend_for"]

MOST_THREADS = 4096  # more than any machine has cores

# (folder of engines or None, threads of a run or None for all cores)
Opener = Callable[[Path | None, int | None], "Backend | DeviceBackend"]


def _refuse_store(target: str, store: Path | None) -> None:
    if store is not None:
        raise InputError(
            f"--engines is for the targets tensorrt and ort-tensorrt; {target} has no engines, leave it out"
        )


def _refuse_threads(target: str, threads: int | None) -> None:
    if threads is not None:
        raise InputError(f"--threads is for processors; {target} runs on a GPU, leave it out")


def _cpu(store: Path | None, threads: int | None) -> Backend:
    _refuse_store("cpu", store)
    from ditc.engines.onnxrt import OnnxRuntimeBackend

    return OnnxRuntimeBackend(threads or 0)


def _openvino(store: Path | None, threads: int | None) -> Backend:
    _refuse_store("openvino", store)
    from ditc.engines.openvino_host import OpenVinoBackend

    return OpenVinoBackend(threads=threads or 0)


def _openvino_bf16(store: Path | None, threads: int | None) -> Backend:
    _refuse_store("openvino-bf16", store)
    from ditc.engines.openvino_host import OpenVinoBackend

    return OpenVinoBackend(rest="bf16", threads=threads or 0)


def _tensorrt(store: Path | None, threads: int | None) -> DeviceBackend:
    _refuse_threads("tensorrt", threads)
    from ditc.engines.trt_runtime import TensorRTBackend

    return TensorRTBackend(store)


def _cuda(store: Path | None, threads: int | None) -> DeviceBackend:
    _refuse_threads("cuda", threads)
    _refuse_store("cuda", store)
    from ditc.engines.onnxrt_device import CUDA, OnnxRuntimeDeviceBackend

    return OnnxRuntimeDeviceBackend(CUDA)


def _ort_tensorrt(store: Path | None, threads: int | None) -> DeviceBackend:
    _refuse_threads("ort-tensorrt", threads)
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


def backend_for(target: str, store: Path | None = None, threads: int | None = None) -> Backend | DeviceBackend:
    """The backend of a target. `store` is the folder of its engines, None for the bundle's own.

    `threads` are those of one run on a processor, None for as many as the process has cores.
    """
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise InputError(f"--threads must be 1 to {MOST_THREADS}, found {threads}; leave it out for every core")
    return TARGETS[target](store, threads)
