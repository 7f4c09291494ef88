"""The ONNX Runtime backend: binding without copies, and errors in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from ditc.bundle import Bundle, open_bundle
from ditc.engines.onnxrt import OnnxRuntimeBackend, kernel_census
from ditc.errors import BundleError
from ditc.exporter.onnx_files import save_graph

DOUBLE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 3] x) => (float[batch, 3] y) { y = Add (x, x) }
"""


SUMS = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 3] x) => (float[batch, 3] out, float[batch, 3] kept) {
    a = Sin (x)
    first = Add (x, a)
    b = Cos (a)
    second = Add (first, b)
    c = Sin (b)
    kept = Add (second, c)
    out = Cos (c)
}
"""


@pytest.fixture
def segment(tmp_path: Path) -> Path:
    save_graph(ir.from_onnx_text(DOUBLE), tmp_path / "double.onnx")
    return tmp_path / "double.onnx"


def test_outputs_land_in_the_bound_buffer(segment: Path) -> None:
    x, y = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    with OnnxRuntimeBackend().open(segment) as engine:
        binding = engine.binding()
        binding.bind("x", x)
        binding.bind("y", y)
        binding.run()
        assert np.array_equal(y, np.full((2, 3), 2, np.float32))
        x[...] = 5
        binding.run()
    assert np.array_equal(y, np.full((2, 3), 10, np.float32))


def test_a_rebound_buffer_of_another_size_is_used(segment: Path) -> None:
    with OnnxRuntimeBackend().open(segment) as engine:
        binding = engine.binding()
        for rows in (2, 5):
            y = np.zeros((rows, 3), np.float32)
            binding.bind("x", np.ones((rows, 3), np.float32))
            binding.bind("y", y)
            binding.run()
            assert y.sum() == 6 * rows


def test_operators_run_in_the_order_of_the_graph_so_that_sums_free_what_they_add(tmp_path: Path) -> None:
    save_graph(ir.from_onnx_text(SUMS), tmp_path / "sums.onnx")
    session = OnnxRuntimeBackend().session(tmp_path / "sums.onnx", profile_prefix=str(tmp_path / "profile"))
    session.run(None, {"x": np.ones((2, 3), np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
    assert ran == ["Sin", "Add", "Cos", "Add", "Sin", "Add", "Cos"]


def test_threads_of_a_session_sleep_between_its_runs(segment: Path) -> None:
    """By default they wait in a busy loop for some 40 ms, and hold a core that the next segment needs."""
    x, y = np.ones((1 << 18, 3), np.float32), np.empty((1 << 18, 3), np.float32)
    with OnnxRuntimeBackend(threads=2).open(segment) as engine:
        binding = engine.binding()
        binding.bind("x", x)
        binding.bind("y", y)
        binding.run()
        start = time.process_time()
        time.sleep(0.03)
        assert time.process_time() - start < 0.01


def test_ports_tell_type_and_open_dimensions(segment: Path) -> None:
    with OnnxRuntimeBackend().open(segment) as engine:
        assert engine.inputs["x"].shape == ("batch", 3)
        assert engine.inputs["x"].dtype == "float32"
        assert list(engine.outputs) == ["y"]


def test_a_buffer_of_the_wrong_type_or_layout_is_refused(segment: Path) -> None:
    with OnnxRuntimeBackend().open(segment) as engine:
        binding = engine.binding()
        with pytest.raises(ValueError, match="takes float32, found float64"):
            binding.bind("x", np.ones((2, 3)))
        with pytest.raises(ValueError, match="C-contiguous"):
            binding.bind("x", np.ones((3, 2), np.float32).T)


def test_a_damaged_segment_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a protobuf")
    with pytest.raises(BundleError, match=r"ONNX Runtime failed opening broken\.onnx") as caught:
        OnnxRuntimeBackend().open(broken)
    assert "\n" not in str(caught.value)


def test_a_census_leaves_the_folder_of_its_segment_alone(bundles: dict[str, Bundle]) -> None:
    """Another process may open the bundle meanwhile, and refuses files that nobody listed."""
    digests = []

    class Watched(OnnxRuntimeBackend):
        def session(self, segment: Path, *given: Any, **named: Any) -> Any:
            session = super().session(segment, *given, **named)
            digests.append(open_bundle(bundles["cached"].path).digest)
            return session

    assert kernel_census(Watched(), bundles["cached"].segment_path("full"))
    assert digests
