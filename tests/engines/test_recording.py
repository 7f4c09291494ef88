"""The recording backend: it changes nothing, and keeps what was there at the time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from ditc.engines.backend import Backend, Port
from ditc.engines.fake import FakeBackend, FakeEngine
from ditc.engines.recording import RecordingBackend

PORT = Port("x", "float32", (2,))


def doubling_backend() -> FakeBackend:
    def double(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"out": 2 * inputs["x"]}

    return FakeBackend({"full": FakeEngine(double, inputs={"x": PORT}, outputs={"out": PORT})})


def run_three_times(backend: Backend) -> np.ndarray:
    x, out = np.zeros(2, np.float32), np.zeros(2, np.float32)
    with backend.open(Path("full.onnx")) as engine:
        binding = engine.binding()
        binding.bind("x", x)
        binding.bind("out", out)
        for value in (1, 2, 3):
            x[:] = value
            binding.run()
    return out


def test_chosen_runs_are_kept_as_they_were() -> None:
    backend = RecordingBackend(doubling_backend(), {"full": {0, 2}})
    run_three_times(backend)
    first, last = backend.runs["full"]
    assert (first.call, last.call) == (0, 2)
    np.testing.assert_array_equal(first.inputs["x"], [1, 1])  # the buffer holds 3 by now
    np.testing.assert_array_equal(first.outputs["out"], [2, 2])
    np.testing.assert_array_equal(last.inputs["x"], [3, 3])


@pytest.mark.parametrize("calls", [{}, {"full": {0, 1, 2}}, {"reuse": {0}}])
def test_recording_changes_no_result(calls: dict[str, set[int]]) -> None:
    np.testing.assert_array_equal(run_three_times(RecordingBackend(doubling_backend(), calls)), [6, 6])


def test_a_segment_keeps_its_name_in_a_form_of_one_backend(tmp_path: Path) -> None:
    inside = FakeBackend({"full.onnxrt": doubling_backend().engines["full"]}, name="onnxrt")
    backend = RecordingBackend(inside, {"full": {0}})
    assert backend.name == "onnxrt"
    backend.open(tmp_path / "full.onnxrt.onnx")
    assert list(backend.runs) == ["full"]
