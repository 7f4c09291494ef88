"""The targets `cuda` and `ort-tensorrt`: ONNX Runtime bound to device memory. Here the CPU provider plays the GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import ditc
from ditc.engines.device import CudaDevice, open_device
from ditc.engines.onnxrt_device import CUDA, TENSORRT, OnnxRuntimeDeviceBackend, Provider
from ditc.errors import InputError

pytestmark = pytest.mark.any_version


class WaitingDevice(CudaDevice):
    """Waits after every copy, since the CPU provider knows nothing of the stream."""

    def _copy(self, *arguments: Any) -> None:
        super()._copy(*arguments)
        self.synchronize()


@dataclass(frozen=True)
class OnHost(OnnxRuntimeDeviceBackend):
    @contextmanager
    def device(self) -> Iterator[CudaDevice]:
        device = open_device()
        yield WaitingDevice(device._core, device._stream)


def played(provider: Provider) -> Provider:
    return Provider("CPUExecutionProvider", memory="cpu", session=provider.session, takes_stream=False)


@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
@pytest.mark.parametrize("name", ["small", "learned-noise", "odd-addresses"])
def test_sessions_on_device_memory_make_the_images_of_the_cpu(provider: Provider, name: str, built: Any) -> None:
    with ditc.load(built[name], target="cpu") as cpu, ditc.load(built[name], backend=OnHost(played(provider))) as gpu:
        expected, found = (pipe.latents([0, 3, 4], seed=3) for pipe in (cpu, gpu))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.05  # FP16 against FP32


def test_the_cuda_target_unfolds_the_weights_when_it_opens(built: Any, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    for key, value in CUDA.session.items():
        options.add_session_config_entry(key, value)
    segment = built["small"] / "segments" / "full.trt.onnx"
    onnxruntime.InferenceSession(str(segment), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(str(tmp_path / "optimized.onnx")).graph
    weights = {value.name for value in graph.initializer}
    assert not [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
    assert not [n for n in graph.node if "Integer" in n.op_type]


@pytest.mark.parametrize("target", ["cuda", "ort-tensorrt"])
def test_a_provider_that_is_missing_is_named(target: str, built: Any) -> None:
    with pytest.raises(InputError, match=r"this onnxruntime has no \w+ExecutionProvider"):
        ditc.load(built["small"], target=target).__enter__()
