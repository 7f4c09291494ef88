"""Shared by building and running with TensorRT: the import, the logger, the platform, the types.

Written for what 10.3 to 11.4 have in common; where they differ, features are looked for, never versions. Nothing here
has run on a GPU; every call is held to the real bindings of 10.3, 10.16 and 11.4 (tests/conformance).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from ditc.engines.device import Device
from ditc.engines.store import Platform
from ditc.errors import InputError

__all__ = ["collecting_logger", "import_tensorrt", "numpy_type", "open_builder", "open_runtime", "platform_of"]


def import_tensorrt() -> Any:
    """The tensorrt module. Raises InputError where it is missing or can't load its libraries."""
    try:
        import tensorrt
    except (ImportError, OSError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"TensorRT can't be imported ({reason}); install it with: pip install 'ditc[tensorrt]'") from e
    return tensorrt


def collecting_logger(trt: Any) -> Any:
    """A logger of TensorRT's that keeps errors for our message and prints nothing."""

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip().splitlines()[0] if message.strip() else "an empty message")

        @property
        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason"

    return CollectingLogger()


def open_builder(trt: Any) -> tuple[Any, Any]:
    """(a builder, its logger). Raises InputError where this machine makes none."""
    log = collecting_logger(trt)
    return _created(trt, trt.Builder, log), log


def open_runtime(trt: Any) -> tuple[Any, Any]:
    """(a runtime that never runs host code, its logger). Raises InputError where this machine makes none."""
    log = collecting_logger(trt)
    runtime = _created(trt, trt.Runtime, log)
    runtime.engine_host_code_allowed = False  # the default, stated: a plan never brings code of its own
    return runtime, log


def _created(trt: Any, kind: Callable[[Any], Any], log: Any) -> Any:
    """An object of TensorRT's; its bindings raise TypeError where the library returns none."""
    try:
        return kind(log)
    except TypeError as e:
        reason = log.errors[-1] if log.errors else "no GPU, or a driver that is older than it needs"
        raise InputError(f"TensorRT {trt.__version__} does not start here: {reason}; see `ditc doctor`") from e


def platform_of(trt: Any, device: Device) -> Platform:
    """Return the platform of plans made here."""
    return Platform(
        tensorrt=str(trt.__version__),
        gpu=device.name,
        compute_capability=device.compute_capability,
        system=platform.system() + ("-tegra" if platform.release().endswith("tegra") else ""),
        machine=platform.machine(),
    )


TYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "BOOL": "bool"}


def numpy_type(dtype: Any) -> str:
    """The NumPy name of a `tensorrt.DataType`."""
    if dtype.name not in TYPES:
        raise InputError(f"an engine with tensors of type {dtype.name} is not one of ditc's; build it again")
    return TYPES[dtype.name]
