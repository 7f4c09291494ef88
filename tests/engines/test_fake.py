"""The fake backend: it behaves as an engine does, on plain functions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from ditc.engines.backend import Backend, Engine, Port
from ditc.engines.device import ALIGNMENT, Device
from ditc.engines.fake import FakeBackend, FakeDevice, FakeEngine


def port(name: str) -> Port:
    return Port(name, "float32", ("batch", 2))


def doubling_engine() -> FakeEngine:
    def double(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"out": 2 * inputs["x"], "unasked": np.zeros(1)}

    return FakeEngine(double, inputs={"x": port("x")}, outputs={"out": port("out")})


def test_a_run_reads_the_bound_inputs_and_writes_the_bound_outputs() -> None:
    x, out = np.array([[1, 2]], np.float32), np.zeros((1, 2), np.float32)
    with doubling_engine() as engine:
        binding = engine.binding()
        binding.bind("x", x)
        binding.bind("out", out)
        binding.run()
    np.testing.assert_array_equal(out, [[2, 4]])


def test_what_is_bound_once_is_read_again_at_every_run() -> None:
    x, out = np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)
    with doubling_engine() as engine:
        binding = engine.binding()
        binding.bind("x", x)
        binding.bind("out", out)
        binding.run()
        x[:] = 5
        binding.run()
        assert engine.runs == 2
    np.testing.assert_array_equal(out, [[10, 10]])


def test_binding_again_leaves_the_first_buffer_alone() -> None:
    first, second = np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)
    with doubling_engine() as engine:
        binding = engine.binding()
        binding.bind("x", np.ones((1, 2), np.float32))
        binding.bind("out", first)
        binding.bind("out", second)
        binding.run()
    assert not first.any()
    assert (second == 2).all()


def test_a_name_that_the_engine_does_not_have_is_refused() -> None:
    with doubling_engine() as engine, pytest.raises(KeyError, match="cache"):
        engine.binding().bind("cache", np.zeros(2))


def test_running_with_an_unbound_name_fails() -> None:
    with doubling_engine() as engine, pytest.raises(KeyError, match="x"):
        engine.binding().run()


def test_a_buffer_of_the_wrong_shape_fails_as_on_a_real_engine() -> None:
    with doubling_engine() as engine:
        binding = engine.binding()
        binding.bind("x", np.ones((3, 2), np.float32))
        binding.bind("out", np.zeros((1, 2), np.float32))
        with pytest.raises(ValueError, match="broadcast"):
            binding.run()


def test_two_bindings_of_an_engine_share_no_buffers() -> None:
    outs = [np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)]
    with doubling_engine() as engine:
        bindings = [engine.binding(), engine.binding()]
        for value, (binding, out) in enumerate(zip(bindings, outs, strict=True), start=1):
            binding.bind("x", np.full((1, 2), value, np.float32))
            binding.bind("out", out)
        for binding in bindings:
            binding.run()
    assert [out.tolist() for out in outs] == [[[2, 2]], [[4, 4]]]


def test_a_backend_opens_engines_by_the_name_of_their_segment() -> None:
    engines = {"full": doubling_engine(), "reuse": doubling_engine()}
    backend: Backend = FakeBackend(engines)
    opened: Engine = backend.open(Path("anywhere/segments/reuse.onnx"))
    assert opened is engines["reuse"]
    assert backend.name == "fake"


def test_a_segment_without_an_engine_is_refused() -> None:
    with pytest.raises(KeyError, match="row-1"):
        FakeBackend({"full": doubling_engine()}).open(Path("row-1.onnx"))


def test_a_fake_device_keeps_what_is_uploaded_in_aligned_memory() -> None:
    device: Device = FakeDevice()
    tensor, values = device.empty((3, 2), "float32"), np.arange(6, dtype=np.float32).reshape(3, 2)
    assert tensor.pointer % ALIGNMENT == 0
    device.upload(values, tensor)
    device.copy(tensor.row(0), tensor.row(2))
    assert device.download(tensor).tolist() == [[0, 1], [2, 3], [0, 1]]
    assert device.download(tensor.rows(1, 2)).tolist() == [[2, 3], [0, 1]]
    values[:] = 9
    assert device.download(tensor).max() == 3
    with pytest.raises(ValueError, match="to upload"):
        device.upload(values[:2], tensor)


def test_a_graph_of_a_fake_device_queues_its_work_when_it_is_launched() -> None:
    device: Device = FakeDevice()
    tensor = device.empty((2,), "float32")
    graph = device.capture(lambda: device.upload(np.ones(2, np.float32), tensor))
    device.upload(np.zeros(2, np.float32), tensor)
    assert device.download(tensor).tolist() == [0, 0]
    graph.launch()
    assert device.download(tensor).tolist() == [1, 1]
