"""Building TensorRT engines from the typed segments of a bundle, with what 10.3 to 11.4 have in common.

Networks are strongly typed, so no precision flag is set on any version. Shapes are fixed: one profile whose least,
best and largest shape are the same. Nothing here has run on a GPU; every call is held to the real bindings of 10.3,
10.16 and 11.4 (tests/conformance).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from ditc.errors import CheckError, InputError
from ditc.spec import Record

__all__ = ["BuildSettings", "BuiltPlan", "build_plan", "import_tensorrt"]


class BuildSettings(Record):
    """What decides an engine beside the network. `workspace_bytes` bounds TensorRT's scratch memory.

    `replay` builds from the timing cache alone and fails where a tactic is not in it, so that a build server makes the
    engines that were measured.
    """

    optimization_level: int = Field(default=3, ge=0, le=5)
    workspace_bytes: int = Field(default=1 << 30, ge=1 << 20)
    version_compatible: bool = False
    hardware_compatible: bool = False
    replay: bool = False


@dataclass(frozen=True)
class BuiltPlan:
    """A serialized engine, and the timing cache as the build left it."""

    plan: bytes
    timing_cache: bytes


def import_tensorrt() -> Any:
    """The tensorrt module. Raises InputError where it is missing or can't load its libraries."""
    try:
        import tensorrt
    except ImportError as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"TensorRT can't be imported ({reason}); install it with: pip install 'ditc[tensorrt]'") from e
    return tensorrt


def build_plan(
    trt: Any, segment: Path, sizes: Mapping[str, int], settings: BuildSettings, timing_cache: bytes = b""
) -> BuiltPlan:
    """Build one segment. `sizes` gives a number to each open dimension of the segment ("batch", "steps").

    Raises InputError for a segment that TensorRT's parser refuses, naming the node, and CheckError where TensorRT
    finds no way to build it.
    """
    log = _collecting_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, segment, log)
    config = builder.create_builder_config()
    _configure(trt, config, settings)
    cache = config.create_timing_cache(timing_cache)
    config.set_timing_cache(cache, False)
    config.add_optimization_profile(_profile(builder, network, segment, sizes))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        last = log.errors[-1] if log.errors else "it gave no reason"
        raise CheckError(
            f"TensorRT {trt.__version__} could not build {segment.name}: {last}; "
            "a larger workspace_bytes or a lower optimization_level may help"
        )
    return BuiltPlan(plan=bytes(plan), timing_cache=bytes(config.get_timing_cache().serialize()))


def _collecting_logger(trt: Any) -> Any:
    """A logger of TensorRT's that keeps errors for our message and prints nothing."""

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip().splitlines()[0] if message.strip() else "an empty message")

    return CollectingLogger()


def _parse(trt: Any, network: Any, segment: Path, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(segment)):
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
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.replay:
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)


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
