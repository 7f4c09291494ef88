"""Parser, network, configuration and builder, played in Python: a plan is the ONNX with its shapes fixed."""

from __future__ import annotations

import json
import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import simulation
import tensorrt_bindings as real
from tensorrt_bindings import __version__

from tensorrt.interface import MAGIC, HostMemory, Played, at, numpy_type_of, platform, session_of


class Tensor(Played):
    REAL = real.ITensor

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self._dims = value.type.tensor_type.shape.dim
        object.__setattr__(self, "name", value.name)
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in self._dims)
        object.__setattr__(self, "shape", shape)

    def get_dimension_name(self, index: int) -> str:
        return self._dims[index].dim_param


class Layer(Played):
    REAL = real.ILayer

    def __init__(self, node: onnx.NodeProto) -> None:
        kind = real.LayerType.NORMALIZATION if "Normalization" in node.op_type else real.LayerType.ELEMENTWISE
        object.__setattr__(self, "type", kind)
        self._set: dict[str, Any] = {}


class Network(Played):
    REAL = real.INetworkDefinition

    def __init__(self, strongly_typed: bool) -> None:
        self._strongly_typed = strongly_typed
        self._model: onnx.ModelProto | None = None
        self._layers: list[Layer] = []
        self._name = ""

    @property
    def num_inputs(self) -> int:
        return len(self._model.graph.input)

    def get_input(self, index: int) -> Tensor:
        return Tensor(self._model.graph.input[index])

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> Layer:
        return self._layers[index]


class Problem(Played):
    REAL = real.ParserError

    def __init__(self, node: int, text: str) -> None:
        self._node, self._text = node, text

    def node(self) -> int:
        return self._node

    def desc(self) -> str:
        return self._text


class OnnxParser(Played):
    REAL = real.OnnxParser

    def __init__(self, network: Network, log: Any) -> None:
        assert isinstance(log, real.ILogger)
        self._network, self._problems = network, []

    def parse_from_file(self, model: str) -> bool:
        path = Path(model)
        self._network._name = path.name.split(".")[0]
        if simulation.plays("parse", self._network._name):
            self._problems.append(Problem(3, "no importer registered for op: Hardmax"))
            return False
        loaded = onnx.load(str(path))
        quantized = any(node.op_type == "QuantizeLinear" for node in loaded.graph.node)
        if quantized and not self._network._strongly_typed:
            self._problems.append(Problem(0, "explicit quantization in a network that is calibrated"))
            return False
        if self._network._strongly_typed:
            onnx.checker.check_model(onnx.shape_inference.infer_shapes(loaded, check_type=True, strict_mode=True))
        self._network._model = loaded
        self._network._layers = [Layer(node) for node in loaded.graph.node]
        return True

    @property
    def num_errors(self) -> int:
        return len(self._problems)

    def get_error(self, index: int) -> Problem:
        return self._problems[index]


class TimingCacheOfConfig(Played):
    REAL = real.ITimingCache

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def serialize(self) -> HostMemory:
        return HostMemory(json.dumps(self._content).encode())


class Profile(Played):
    REAL = real.IOptimizationProfile

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = (min, opt, max)


class Config(Played):
    REAL = real.IBuilderConfig

    def __init__(self) -> None:
        self._flags: set[Any] = {real.BuilderFlag.TF32}  # the default
        self._limits: dict[Any, int] = {}
        self._profiles: list[Profile] = []
        self._cache = TimingCacheOfConfig({"platform": platform(), "segments": []})
        for name in ("progress_monitor", "int8_calibrator"):
            if hasattr(real.IBuilderConfig, name):
                object.__setattr__(self, name, None)

    def set_flag(self, flag: Any) -> None:
        assert isinstance(flag, real.BuilderFlag)
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        assert isinstance(flag, real.BuilderFlag)
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert isinstance(pool, real.MemoryPoolType)
        self._limits[pool] = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCacheOfConfig | None:
        if not serialized_timing_cache:
            return TimingCacheOfConfig({"platform": platform(), "segments": []})
        try:
            return TimingCacheOfConfig(json.loads(bytes(serialized_timing_cache)))
        except ValueError:
            return None

    def set_timing_cache(self, cache: TimingCacheOfConfig, ignore_mismatch: bool) -> bool:
        if cache._content["platform"] != platform() and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCacheOfConfig:
        return self._cache

    def add_optimization_profile(self, profile: Profile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_calibration_profile(self, profile: Profile) -> bool:
        self._calibration_profile = profile
        return True


class Builder(Played):
    REAL = real.Builder

    def __init__(self, log: Any) -> None:
        assert isinstance(log, real.ILogger)
        self._log = log

    def create_network(self, flags: int = 0) -> Network:
        typed = bool(flags & 1 << int(real.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        return Network(typed or __version__.startswith("11."))

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
        name = network._name
        if simulation.plays("noise", name):
            os.write(1, b"[TRT] printed by a library, no newline \xff")
            os.write(2, b"\xff\xfe not UTF-8\n" + b"x" * 100_000)
        if not self._progress(config, name):
            return None
        for fault, text in (
            ("null", "could not find any implementation for node blocks.0.attn"),
            ("out-of-memory", "[virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory"),
        ):
            if simulation.plays(fault, name):
                return self._fail(text)
        model = fixed(network._model, config._profiles[0]._shapes)
        calibrator = getattr(config, "int8_calibrator", None)
        if calibrator is not None:
            calibrate(calibrator, model)
        known = config._cache._content["segments"]
        if name not in known and real.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS in config._flags:
            return self._fail(f"timing cache miss in {name}")
        config._cache._content["segments"] = sorted({*known, name})
        header = {
            **platform(),
            "name": name,
            "strongly_typed": network._strongly_typed,
            "flags": sorted(flag.name for flag in config._flags),
            "workspace": config._limits[real.MemoryPoolType.WORKSPACE],
            "version_compatible": real.BuilderFlag.VERSION_COMPATIBLE in config._flags,
            "hardware_compatible": str(getattr(config, "hardware_compatibility_level", None)),
        }
        text = json.dumps(header).encode()
        return HostMemory(MAGIC + struct.pack("<I", len(text)) + text + model.SerializeToString())

    def _progress(self, config: Config, name: str) -> bool:
        """Two phases, one inside the other, as the real builder reports them."""
        monitor = config.progress_monitor
        assert isinstance(monitor, real.IProgressMonitor)
        monitor.phase_start("Building Engine", None, 3)
        for step in range(3):
            monitor.phase_start("Timing", "Building Engine", 2)
            monitor.step_complete("Timing", 0)
            monitor.phase_finish("Timing")
            if step == 1 and simulation.plays("kill", name):
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 1 and simulation.plays("crash", name):
                os.kill(os.getpid(), signal.SIGSEGV)
            while step == 1 and simulation.plays("hang", name):
                if not monitor.step_complete("Building Engine", step):
                    self._fail("the build was cancelled")
                    return False
                time.sleep(0.05)
            if not monitor.step_complete("Building Engine", step):
                self._fail("the build was cancelled")
                return False
        monitor.phase_finish("Building Engine")
        return True

    def _fail(self, text: str) -> None:
        self._log.log(real.ILogger.Severity.ERROR, text)


def fixed(model: onnx.ModelProto, shapes: dict[str, tuple[Any, Any, Any]]) -> onnx.ModelProto:
    """The model with the open dimensions of its inputs set, and those of its outputs by the same names."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    sizes = {}
    for value in model.graph.input:
        least, best, most = shapes[value.name]
        assert least == best == most
        for dim, size in zip(value.type.tensor_type.shape.dim, best, strict=True):
            if dim.dim_param:
                sizes[dim.dim_param] = size
            dim.dim_value = size
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    return model


def calibrate(calibrator: Any, model: onnx.ModelProto) -> None:
    """The whole protocol: a cache if there is one, else batches until there are no more, then a cache to keep."""
    header = f"TRT-{__version__.replace('.', '')}-{calibrator.get_algorithm().name}"
    assert calibrator.get_batch_size() == 1
    cache = calibrator.read_calibration_cache()
    if cache is not None and bytes(cache).decode().startswith(header):
        return
    names = [value.name for value in model.graph.input]
    probe = onnx.ModelProto.FromString(model.SerializeToString())
    wanted = sorted({node.input[0] for node in probe.graph.node if node.op_type == "MatMul"} - set(names))
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = session_of(probe)
    largest: dict[str, float] = dict.fromkeys(wanted, 0.0)
    while (pointers := calibrator.get_batch(names)) is not None:
        feeds = {}
        for port in session.get_inputs():
            pointer = pointers[names.index(port.name)]
            feeds[port.name] = at(pointer, port.shape, numpy_type_of(port.type)).copy()
        for name, values in zip(wanted, session.run(wanted, feeds), strict=True):
            largest[name] = max(largest[name], float(np.abs(values).max()))
    lines = [f"{name}: {struct.pack('>f', peak / 127).hex()}" for name, peak in largest.items()]
    calibrator.write_calibration_cache("\n".join([header, *lines, ""]).encode())
