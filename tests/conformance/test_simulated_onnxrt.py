"""The targets `cuda` and `ort-tensorrt`: ONNX Runtime bound to device memory. Here the CPU provider plays the GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cuda.core import Device

import ditc
from ditc.engines.device import CudaDevice, DeviceTensor
from ditc.engines.onnxrt_device import CUDA, TENSORRT, OnnxRuntimeDeviceBackend, Provider
from ditc.errors import BundleError, InputError

pytestmark = pytest.mark.any_version


class WaitingDevice(CudaDevice):
    """Waits after every copy, since the CPU provider knows nothing of the stream."""

    def upload(self, array: Any, tensor: DeviceTensor) -> None:
        super().upload(array, tensor)
        self.synchronize()

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        super().copy(source, target)
        self.synchronize()


@dataclass(frozen=True)
class OnHost(OnnxRuntimeDeviceBackend):
    @contextmanager
    def device(self) -> Iterator[CudaDevice]:
        core = Device()
        core.set_current()
        yield WaitingDevice(core, core.create_stream())


def played(provider: Provider) -> Provider:
    """On the processor, whose integer products are switched to exact ones: a GPU saturates nowhere."""
    session = {**provider.session, "session.x64quantprecision": "1"}
    return Provider("CPUExecutionProvider", memory="cpu", session=session, takes_stream=False)


@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
@pytest.mark.parametrize("name", ["small", "learned-noise", "odd-addresses", "per-step"])
def test_sessions_on_device_memory_make_the_images_of_the_cpu(provider: Provider, name: str, built: Any) -> None:
    with ditc.load(built[name], target="cpu") as cpu, ditc.load(built[name], backend=OnHost(played(provider))) as gpu:
        expected, samples = (pipe.latents([0, 3, 4], seed=3) for pipe in (cpu, gpu))
    error = np.linalg.norm(samples - expected) / np.linalg.norm(expected)
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


def test_a_bundle_in_float32_runs_on_the_cuda_target(unbuilt: Path) -> None:
    bundle = unbuilt / "fp32"
    with ditc.load(bundle) as cpu, ditc.load(bundle, backend=OnHost(played(CUDA))) as gpu:
        expected, samples = (pipe.latents([0, 3, 4], seed=3) for pipe in (cpu, gpu))
    assert np.linalg.norm(samples - expected) / np.linalg.norm(expected) < 1e-5


def test_every_network_and_shape_has_an_engine_cache_of_its_own(unbuilt: Path, tmp_path: Path) -> None:
    """ONNX Runtime's cache looks at file names and graphs, not at weights."""
    caching = replace(played(TENSORRT), caches_engines=True)
    for number, name in enumerate(("digits", "small", "small"), start=1):
        # the CPU provider has no such options, so the session opens or is refused; the folder is made before
        with suppress(BundleError), ditc.load(unbuilt / name, backend=OnHost(caching, cache=tmp_path / "store")):
            pass
        folders = {path.name for path in (tmp_path / "store").glob("ort-condition-*")}
        assert len(folders) == min(number, 2)


@pytest.mark.parametrize("target", ["cuda", "ort-tensorrt"])
def test_a_provider_that_is_missing_is_named(target: str, built: Any) -> None:
    with pytest.raises(InputError, match=r"this onnxruntime has no \w+ExecutionProvider"):
        ditc.load(built["small"], target=target).__enter__()
