"""The target openvino: integer products in the segments that have them, the same laws, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ditc.bundle import Bundle
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines import openvino_host
from ditc.engines.integer_form import Exactness, advise
from ditc.engines.onnxrt import OnnxRuntimeEngine
from ditc.engines.openvino_host import (
    MOST_SHAPES,
    OpenVinoBackend,
    OpenVinoEngine,
    OpenVinoHere,
    import_openvino,
    integer_layers,
    openvino_here,
    reason,
    type_around,
)
from ditc.errors import AdviceWarning, BundleError, InputError
from ditc.exporter.dit import DiT
from ditc.exporter.onnx_files import save_graph
from ditc.runtime.closeness import relative_error
from ditc.runtime.fingerprint import PORTABLE, Fingerprint
from ditc.runtime.pipeline import Pipeline, load

pytest.importorskip("openvino")

NOT_QUANTIZED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, 3] x) => (float[batch, 3] y) { y = Add (x, x) }
"""


WITHOUT_VNNI = OpenVinoHere(Exactness(7), "f32")


@pytest.fixture(scope="module")
def runnable(
    bundles: dict[str, Bundle],
    tmp_path_factory: pytest.TempPathFactory,
    make_small_model: Callable[..., DiT],
    quick_options: CompileOptions,
    exports: Path,
) -> dict[str, Bundle]:
    """Bundles that OpenVINO runs here: of 8-bit weights, or of 7 where those of 8 are refused."""
    if OpenVinoBackend().arithmetic(8).integers is not None:
        return bundles
    folder = tmp_path_factory.mktemp("seven")
    options = quick_options.model_copy(update={"policy": "fora:2", "precision": "w7a8"})
    per_step = options.model_copy(update={"scales": "per-step", "midpoint": "bounded", "vc": "none"})
    return {
        name: compile_model(make_small_model(), folder / name, changed, exports=exports)
        for name, changed in (("cached", options), ("per-step", per_step))
    }


@pytest.fixture
def pipe(runnable: dict[str, Bundle]) -> Pipeline:
    return load(runnable["cached"].path, target="openvino")


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
    name: str, target: str, runnable: dict[str, Bundle]
) -> None:
    with load(runnable[name].path) as cpu, load(runnable[name].path, target=target) as pipe:
        expected, samples = cpu.latents([0, 3, 1]), pipe.latents([0, 3, 1])
    with load(runnable[name].path, reference=True) as reference:
        exact = reference.latents([0, 3, 1])
    assert relative_error(samples, expected) < 0.05
    assert relative_error(samples, exact) < 2 * relative_error(expected, exact)


def test_requests_of_another_size_and_the_same_again_give_the_same_images(pipe: Pipeline) -> None:
    with pipe:
        first = pipe.latents([2, 4, 1], seed=3)
        alone = pipe.latents([2], seed=3)
        again = pipe.latents([2, 4, 1], seed=3)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(alone, first[:1], atol=1e-3)


def test_permuting_a_batch_permutes_its_images(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((3, 3, 8, 8), np.float32)
    with pipe:
        forth = pipe.latents([0, 1, 2], noise=noise)
        back = pipe.latents([2, 1, 0], noise=noise[::-1])
    np.testing.assert_allclose(forth, back[::-1], atol=1e-3)


def test_a_buffer_of_the_wrong_type_or_layout_is_refused(runnable: dict[str, Bundle]) -> None:
    with OpenVinoBackend().open(runnable["cached"].segment_path("full")) as engine:
        binding = engine.binding()
        with pytest.raises(ValueError, match="takes float32, found float64"):
            binding.bind("x", np.ones((2, 3, 8, 8)))
        with pytest.raises(ValueError, match="C-contiguous"):
            binding.bind("x", np.ones((8, 8, 3, 2), np.float32).T)


def test_eight_bits_are_refused_where_their_products_saturate(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_host, "openvino_here", lambda rest: WITHOUT_VNNI)
    advice = "run it with --target cpu, or compile with --precision w7a8"
    with pytest.raises(InputError, match=rf"^full\.onnx: OpenVINO's products with 8-bit weights .*{advice}$"):
        load(bundles["cached"].path, target="openvino").__enter__()
    assert OpenVinoBackend().arithmetic(8).integers is None
    assert OpenVinoBackend().arithmetic(7).integers == "plain"


def test_floating_point_runs_where_products_saturate(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_host, "openvino_here", None)
    with load(bundles["fp32-cached"].path, target="openvino") as pipe:
        assert isinstance(pipe.engines["full"], OnnxRuntimeEngine)


@pytest.mark.parametrize(("rest", "around", "said"), [("bf16", "f32", 1), ("bf16", "bf16", 0), ("f32", "f32", 0)])
def test_a_type_that_this_machine_does_not_compute_in_is_said_once(
    rest: str,
    around: str,
    said: int,
    bundles: dict[str, Bundle],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(openvino_host, "openvino_here", lambda _: OpenVinoHere(Exactness(8), around))
    advise.cache_clear()
    for _ in range(2):
        OpenVinoBackend(rest=rest).open(bundles["cached"].segment_path("full"))
    messages = [str(each.message) for each in recwarn if each.category is AdviceWarning]
    assert len(messages) == said
    assert all(text.startswith("this CPU has no bf16, so --target openvino-bf16 computes in f32") for text in messages)
    arithmetic = OpenVinoBackend(rest=rest).arithmetic(8)
    assert arithmetic.rest == around
    assert ("since this CPU has no bf16" in arithmetic.text) == bool(said)


@pytest.mark.parametrize("rest", ["f32", "bf16"])
def test_what_an_engine_computes_in_is_what_the_probe_found(rest: str, runnable: dict[str, Bundle]) -> None:
    with load(runnable["cached"].path, backend=OpenVinoBackend(rest=rest)) as pipe:
        pipe.latents([1])
        full = pipe.engines["full"]
        assert isinstance(full, OpenVinoEngine)
        assert type_around(full) == openvino_here(rest).rest


@pytest.fixture(scope="module")
def dynamic(
    compiled_once: Callable[..., Bundle], make_small_model: Callable[..., DiT], quick_options: CompileOptions
) -> Bundle:
    """A bundle whose activation scales are measured as the tensors come; of seven bits, which run everywhere."""
    changes = {"scales": "dynamic", "policy": "fora:2", "vc": "none", "precision": "w7a8"}
    return compiled_once(make_small_model(), quick_options.model_copy(update=changes))


@pytest.mark.parametrize("target", ["openvino", "openvino-bf16"])
@pytest.mark.parametrize("name", ["cached", "per-step"])
def test_its_segments_give_what_they_gave_where_they_were_compiled(
    name: str, target: str, runnable: dict[str, Bundle]
) -> None:
    with load(runnable[name].path, target=target, check=True) as pipe:
        assert all(difference.is_rounding for difference in pipe.differences())


def test_scales_measured_at_run_time_are_held_to_the_portable_form(dynamic: Bundle) -> None:
    with load(dynamic.path, target="openvino", check=True) as pipe:
        assert isinstance(pipe.engines["full"], OpenVinoEngine)


def test_scales_measured_at_run_time_are_refused_beside_bfloat16_when_they_open(dynamic: Bundle) -> None:
    with (
        pytest.raises(InputError, match=r"^full\.onnx: OpenVINO has no bf16 beside .*; run it with --target openvino$"),
        load(dynamic.path, target="openvino-bf16"),
    ):
        pass


def test_what_onnxruntime_runs_is_held_to_float32(runnable: dict[str, Bundle]) -> None:
    with load(runnable["cached"].path, target="openvino-bf16") as pipe:
        differences = pipe.differences()
    tolerances = Fingerprint.of(runnable["cached"].path).forms[PORTABLE].tolerances
    allowed = {difference.call: difference.tolerance for difference in differences}
    assert allowed["condition"] == tolerances["condition"]["f32"]
    assert allowed["full@0"] == tolerances["full@0"][openvino_here("bf16").rest]


def test_floating_point_is_held_to_float32_and_makes_nobody_probe(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_host, "openvino_here", None)
    with load(bundles["fp32-cached"].path, target="openvino-bf16", check=True) as pipe:
        assert all(difference.tolerance < 1e-3 for difference in pipe.differences())


def test_sizes_that_alternate_are_compiled_once_each(
    runnable: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    for most in (MOST_SHAPES, 2):
        monkeypatch.setattr(openvino_host, "MOST_SHAPES", most)
        with load(runnable["cached"].path, target="openvino") as pipe:
            full = pipe.engines["full"]
            assert isinstance(full, OpenVinoEngine)
            for images in (*range(1, 7), *range(1, 7)):
                pipe.latents([1] * images)
            compiled.append(len(full.shapes))
            first = full.compiled_for(full.shapes[0])
            assert full.compiled_for(full.shapes[-1]) is first
    assert compiled == [6, 2]


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (
            "Exception from core.cpp:1:\nCheck 'a != b' failed at x.cpp:3:\nNo such precision.\n\n\n",
            "No such precision.",
        ),
        ("Exception from core.cpp:1:\nCheck 'a' failed at x.cpp:3\n", "Check 'a' failed at x.cpp:3"),
        ("Out of memory", "Out of memory"),
        ("", "it gives no reason"),
    ],
)
def test_the_line_that_says_why_is_the_one_that_is_shown(message: str, why: str) -> None:
    assert reason(RuntimeError(message)) == why


def test_a_segment_that_does_not_open_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "full.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"OpenVINO failed opening full\.onnx: .*--target cpu"):
        OpenVinoBackend().open(tmp_path / "full.onnx")


def test_a_graph_without_integers_is_onnxruntimes(tmp_path: Path) -> None:
    save_graph(ir.from_onnx_text(NOT_QUANTIZED), tmp_path / "plain.onnx")
    assert isinstance(OpenVinoBackend().open(tmp_path / "plain.onnx"), OnnxRuntimeEngine)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"pip install 'ditc\[openvino\]'"):
        import_openvino()
