"""`engines.trt` driven through doubles of the real TensorRT classes.

A double has the attributes of the real class and no others, and holds every call to the signatures that the bindings
document; enums, flags and the logger's base class are the real ones. So a misspelt name, a removed flag or a wrong
number of arguments fails here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import tensorrt

from ditc.engines.trt import BuildSettings, build_plan
from ditc.errors import CheckError, InputError

SIZES = {"batch": 2, "steps": 50}


def signatures(method: Any) -> list[tuple[list[str], int]]:
    """(names of the parameters, how many have no default) of each overload that a pybind docstring lists."""
    found = []
    for arguments in re.findall(r"^\s*(?:\d+\. )?\w+\((.*)\) ->", method.__doc__ or "", flags=re.MULTILINE):
        parts = re.split(r",\s*(?=\w+:)", arguments)
        names = [part.split(":")[0].strip() for part in parts if part and not part.startswith("self")]
        found.append((names, sum("=" not in part for part in parts if not part.startswith("self"))))
    return found


class Double:
    """An object with a real class's interface: calls are recorded in `calls`, answers come from `answers`."""

    def __init__(self, real: type, **answers: Any) -> None:
        self.__dict__.update(_real=real, _answers=answers, calls=[], values={})

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)  # AttributeError for a name that the real class lacks
        if isinstance(real, property):
            return self.values.get(name, self._answers.get(name))

        def call(*given: Any, **named: Any) -> Any:
            fits = [names for names, least in signatures(real) if least <= len(given) + len(named) <= len(names)]
            assert fits, f"{self._real.__name__}.{name} does not take {given} {named}: {real.__doc__}"
            assert any(named.keys() <= set(names) for names in fits)
            self.calls.append((name, *given))
            answer = self._answers.get(name)
            return answer(*given) if callable(answer) else answer

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        real = getattr(self._real, name)
        assert isinstance(real, property), f"{self._real.__name__}.{name} is not a property"
        assert real.fset is not None, f"{self._real.__name__}.{name} can't be set"
        self.values[name] = value


class Bench:
    """The real module, its classes with native parts replaced by doubles that remember what was done to them."""

    def __init__(self, *, parses: bool = True, plan: bytes | None = b"plan") -> None:
        x = Double(tensorrt.ITensor, name="x", shape=(-1, 4, 8, 8), get_dimension_name=lambda axis: "batch")
        error = Double(tensorrt.ParserError, node=3, desc="no importer for Hardmax")
        cache = Double(tensorrt.ITimingCache, serialize=b"timings")
        self.profile = Double(tensorrt.IOptimizationProfile)
        self.network = Double(tensorrt.INetworkDefinition, num_inputs=1, get_input=lambda i: x)
        self.config = Double(tensorrt.IBuilderConfig, create_timing_cache=cache, get_timing_cache=cache)
        self.parser = Double(
            tensorrt.OnnxParser, parse_from_file=parses, num_errors=0 if parses else 1, get_error=lambda i: error
        )
        self.builder = Double(
            tensorrt.Builder,
            create_network=self.network,
            create_builder_config=self.config,
            create_optimization_profile=self.profile,
            build_serialized_network=plan,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorrt, name)

    def Builder(self, log: Any) -> Double:
        assert isinstance(log, tensorrt.ILogger)
        return self.builder

    def OnnxParser(self, network: Any, log: Any) -> Double:
        assert network is self.network
        return self.parser


def test_the_bindings_are_the_real_ones_of_this_version() -> None:
    assert tensorrt.__version__ == os.environ["DITC_REAL_BINDINGS"]
    assert tensorrt.Builder.__module__.startswith("tensorrt_bindings")


def test_a_build_goes_through_the_real_interface() -> None:
    bench = Bench()
    built = build_plan(bench, Path("full.trt.onnx"), SIZES, BuildSettings(), b"before")
    assert (built.plan, built.timing_cache) == (b"plan", b"timings")
    strongly_typed = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert ("create_network", strongly_typed) in bench.builder.calls
    assert ("create_timing_cache", b"before") in bench.config.calls
    assert ("set_shape", "x", *((2, 4, 8, 8),) * 3) in bench.profile.calls


def test_no_precision_flag_is_set_on_any_version() -> None:
    bench = Bench()
    build_plan(bench, Path("full.trt.onnx"), SIZES, BuildSettings())
    assert not [call for call in bench.config.calls if call[0] == "set_flag"]


def test_every_setting_reaches_the_builder() -> None:
    bench = Bench()
    settings = BuildSettings(
        optimization_level=5, workspace_bytes=1 << 28, version_compatible=True, hardware_compatible=True, replay=True
    )
    build_plan(bench, Path("full.trt.onnx"), SIZES, settings)
    flags = {call[1] for call in bench.config.calls if call[0] == "set_flag"}
    assert flags == {tensorrt.BuilderFlag.VERSION_COMPATIBLE, tensorrt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS}
    assert ("set_memory_pool_limit", tensorrt.MemoryPoolType.WORKSPACE, 1 << 28) in bench.config.calls
    assert bench.config.values["builder_optimization_level"] == 5
    assert bench.config.values["profiling_verbosity"] == tensorrt.ProfilingVerbosity.DETAILED
    assert bench.config.values["hardware_compatibility_level"] == tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS


def test_a_segment_that_the_parser_refuses_is_named_with_its_node() -> None:
    with pytest.raises(InputError, match=r"can't read full\.trt\.onnx: node 3: no importer for Hardmax"):
        build_plan(Bench(parses=False), Path("full.trt.onnx"), SIZES, BuildSettings())


def test_a_build_that_returns_nothing_is_a_failed_check() -> None:
    with pytest.raises(CheckError, match=r"could not build full\.trt\.onnx"):
        build_plan(Bench(plan=None), Path("full.trt.onnx"), SIZES, BuildSettings())


def test_an_open_dimension_without_a_size_is_named() -> None:
    with pytest.raises(InputError, match="input x is open along 'batch'"):
        build_plan(Bench(), Path("full.trt.onnx"), {"steps": 50}, BuildSettings())


def test_a_double_refuses_what_the_real_class_does_not_have() -> None:
    config = Double(tensorrt.IBuilderConfig)
    with pytest.raises(AttributeError):
        config.set_memory_pool_limits(tensorrt.MemoryPoolType.WORKSPACE, 1)
    with pytest.raises(AssertionError, match="does not take"):
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE)
    with pytest.raises(AttributeError):
        config.builder_optimisation_level = 3
