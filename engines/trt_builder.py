"""From a typed segment to a TensorRT plan.

Networks are strongly typed, so no precision flag is set on any version. Shapes are fixed: one profile whose least,
best and largest shape are the same. With a calibrator of TensorRT 10 (`calibration` other than "explicit") the network
is weakly typed instead, starts from the FP32 form, and keeps normalization in FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditc.engines.store import EXPLICIT, BuildSettings
from ditc.engines.trt import open_builder
from ditc.errors import CheckError, InputError
from ditc.openable import Links, openable

__all__ = ["BuiltEngine", "TimingCache", "build_engine"]

Report = Callable[[str, int, int], bool]  # phase, done, of (0 inside another phase) -> go on?


@dataclass(frozen=True)
class TimingCache:
    """Measured tactics. One that is `required` and does not fit this machine is an error, else it starts anew."""

    data: bytes = b""
    origin: str = "the timing cache"
    required: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine, and the timing cache as the build left it."""

    plan: bytes
    timing_cache: bytes


def never_stop(phase: str, done: int, total: int) -> bool:
    """Report progress to nobody."""
    return True


def build_engine(
    trt: Any,
    segment: Path,
    sizes: Mapping[str, int],
    settings: BuildSettings,
    *,
    timing_cache: TimingCache | None = None,
    report: Report = never_stop,
    calibrator: Any = None,
) -> BuiltEngine:
    """Build one segment. `sizes` gives a number to each open dimension of the segment ("batch", "steps").

    `report` is told of every phase, and stops the build by returning False. Raises InputError for a segment that
    TensorRT's parser refuses, naming the node, or a timing cache of another machine, and CheckError where TensorRT
    finds no way to build it.
    """
    builder, log = open_builder(trt)
    network = builder.create_network(_network_flags(trt, settings))
    _parse(trt, network, segment, log)
    config = builder.create_builder_config()
    _configure(trt, config, settings)
    config.progress_monitor = _monitor(trt, report)
    _set_timing_cache(config, timing_cache or TimingCache())
    profile = _profile(builder, network, segment, sizes)
    config.add_optimization_profile(profile)
    if calibrator is not None:
        _configure_weak_types(trt, network, config, profile, calibrator)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CheckError(_why_no_plan(trt, segment, settings, log.last_error))
    return BuiltEngine(plan=bytes(plan), timing_cache=bytes(config.get_timing_cache().serialize()))


def _network_flags(trt: Any, settings: BuildSettings) -> int:
    """Ask for strong types: TensorRT 11 knows no others, 10 has to be told."""
    if settings.calibration != EXPLICIT:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(trt: Any, network: Any, segment: Path, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    with openable(segment, Links.NONE) as name:
        if parser.parse_from_file(name):  # by name, so that the weights beside it are found
            return
    reasons = [parser.get_error(i) for i in range(parser.num_errors)]
    first = f"node {reasons[0].node()}: {reasons[0].desc()}" if reasons else "it gave no reason"
    raise InputError(
        f"TensorRT {trt.__version__} can't read {segment.name}: {first}; `ditc inspect` shows known causes"
    )


def _configure(trt: Any, config: Any, settings: BuildSettings) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names, for whoever profiles
    config.clear_flag(trt.BuilderFlag.TF32)  # what is FP32 here is FP32 on purpose
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # an embedded runtime is host code, which we never run
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.replay:
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)


def _configure_weak_types(trt: Any, network: Any, config: Any, profile: Any, calibrator: Any) -> None:
    """Set FP16 everywhere but in normalization, INT8 where the calibrator gives scales: TensorRT 10 only.

    Segments without layers to calibrate stay FP32: sampler arithmetic and timestep phases don't survive FP16.
    """
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.NORMALIZATION:
            layer.precision = trt.DataType.FLOAT
    config.set_flag(trt.BuilderFlag.INT8)
    config.int8_calibrator = calibrator
    config.set_calibration_profile(profile)


def _monitor(trt: Any, report: Report) -> Any:
    """TensorRT's progress as calls of `report`: with a total of 0 for phases inside others. Several threads call it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            return report(phase_name, step + 1, self.steps.get(phase_name, 0))

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _set_timing_cache(config: Any, cache: TimingCache) -> None:
    attached = config.create_timing_cache(cache.data)
    if attached is not None and config.set_timing_cache(attached, False):
        return
    if cache.required:
        raise InputError(
            f"{cache.origin} was made on another GPU or by another TensorRT; "
            "make one here with a build that names a new file, or leave --timing-cache out"
        )
    config.set_timing_cache(config.create_timing_cache(b""), False)


def _why_no_plan(trt: Any, segment: Path, settings: BuildSettings, reason: str) -> str:
    text = f"TensorRT {trt.__version__} could not build {segment.name}: {reason}; "
    if settings.replay:
        return text + "with --replay every tactic has to be in the timing cache: build once without it"
    if "memory" in reason.lower():
        mib = settings.workspace_bytes >> 20
        return text + f"free memory on the GPU, or lower --workspace (now {mib} MiB)"
    return text + "a larger --workspace or a lower --optimization-level may help"


def _profile(builder: Any, network: Any, segment: Path, sizes: Mapping[str, int]) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(_size(tensor, axis, size, segment, sizes) for axis, size in enumerate(tensor.shape))
        profile.set_shape(tensor.name, shape, shape, shape)
    return profile


def _size(tensor: Any, axis: int, size: int, segment: Path, sizes: Mapping[str, int]) -> int:
    if size >= 0:
        return size
    name = tensor.get_dimension_name(axis)
    if name not in sizes:
        raise InputError(
            f"{segment.name}: input {tensor.name} is open along {name!r}; known sizes are {', '.join(sorted(sizes))}"
        )
    return sizes[name]
