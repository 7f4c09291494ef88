"""The target openvino: integer products in the segments that have them, the same laws, errors in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ditc.bundle import Bundle
from ditc.engines.onnxrt import OnnxRuntimeEngine
from ditc.engines.openvino_host import OpenVinoBackend, OpenVinoEngine, import_openvino, integer_layers
from ditc.errors import BundleError, InputError
from ditc.exporter.onnx_files import save_model
from ditc.runtime.pipeline import Pipeline, load
from ditc.runtime.quality import relative_error

pytest.importorskip("openvino")

NOT_QUANTIZED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 3] x) => (float[batch, 3] y) { y = Add (x, x) }
"""


@pytest.fixture
def pipe(bundles: dict[str, Bundle]) -> Pipeline:
    return load(bundles["cached"].path, target="openvino")


def test_every_linear_layer_multiplies_integers(pipe: Pipeline) -> None:
    with pipe:
        pipe.latents([1])
        full = pipe.engines["full"]
        assert isinstance(full, OpenVinoEngine)
        assert integer_layers(full) == 8  # two blocks: qkv, proj, fc1, fc2


def test_segments_without_integers_stay_with_onnxruntime(pipe: Pipeline) -> None:
    with pipe:
        assert isinstance(pipe.engines["condition"], OnnxRuntimeEngine)
        assert isinstance(pipe.engines["reuse"], OnnxRuntimeEngine)


@pytest.mark.parametrize(
    ("name", "target"), [("cached", "openvino"), ("per-step", "openvino"), ("cached", "openvino-bf16")]
)
def test_its_samples_are_those_of_the_target_cpu_but_for_rounding(
    name: str, target: str, bundles: dict[str, Bundle]
) -> None:
    with load(bundles[name].path) as cpu, load(bundles[name].path, target=target) as pipe:
        expected, found = cpu.latents([0, 3, 1]), pipe.latents([0, 3, 1])
    with load(bundles[name].path, reference=True) as reference:
        exact = reference.latents([0, 3, 1])
    assert relative_error(found, expected) < 0.05
    assert relative_error(found, exact) < 2 * relative_error(expected, exact)


def test_requests_of_another_size_and_the_same_again_give_the_same_images(pipe: Pipeline) -> None:
    with pipe:
        first = pipe.latents([2, 4, 1], seed=3)
        one = pipe.latents([2], seed=3)
        again = pipe.latents([2, 4, 1], seed=3)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(one, first[:1], atol=1e-3)


def test_permuting_a_batch_permutes_its_images(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((3, 3, 8, 8), np.float32)
    with pipe:
        forth = pipe.latents([0, 1, 2], noise=noise)
        back = pipe.latents([2, 1, 0], noise=noise[::-1])
    np.testing.assert_allclose(forth, back[::-1], atol=1e-3)


def test_a_buffer_of_the_wrong_type_or_layout_is_refused(bundles: dict[str, Bundle]) -> None:
    with OpenVinoBackend().open(bundles["cached"].segment_path("full")) as engine:
        binding = engine.binding()
        with pytest.raises(ValueError, match="takes float32, found float64"):
            binding.bind("x", np.ones((2, 3, 8, 8)))
        with pytest.raises(ValueError, match="C-contiguous"):
            binding.bind("x", np.ones((8, 8, 3, 2), np.float32).T)


def test_a_segment_that_does_not_open_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "full.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"OpenVINO failed opening full\.onnx: .*--target cpu"):
        OpenVinoBackend().open(tmp_path / "full.onnx")


def test_a_graph_without_integers_is_onnxruntimes(tmp_path: Path) -> None:
    save_model(ir.from_onnx_text(NOT_QUANTIZED), tmp_path / "plain.onnx")
    assert isinstance(OpenVinoBackend().open(tmp_path / "plain.onnx"), OnnxRuntimeEngine)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"pip install 'ditc\[openvino\]'"):
        import_openvino()
