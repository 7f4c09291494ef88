"""The choice of a form of integer products, and what a segment's file says of its weights."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir
import pytest

from ditc.bundle import Bundle
from ditc.engines import integer_form
from ditc.engines.backend import runnable_path
from ditc.engines.integer_form import (
    Exactness,
    IntegerForm,
    advise,
    find_exactness,
    once_per_process,
    weight_bits,
)
from ditc.errors import AdviceWarning, BundleError
from ditc.exporter.onnx_files import save_graph
from ditc.precision import PRECISIONS, Bits
from ditc.program import BRANCH_KEY, PATH_KEY
from ditc.quantize.qdq import insert_qdq
from ditc.quantize.scale_table import ScaleTable

PLAIN, SWITCHED = IntegerForm.PLAIN, IntegerForm.SWITCHED


def machine(plain: int, switched: int) -> tuple[Callable[[int, IntegerForm], bool], list[tuple[int, IntegerForm]]]:
    """A machine that is exact up to so many bits in each form, and what it was asked."""
    asked: list[tuple[int, IntegerForm]] = []

    def is_exact(bits: int, form: IntegerForm) -> bool:
        asked.append((bits, form))
        return bits <= {PLAIN: plain, SWITCHED: switched}[form]

    return is_exact, asked


@pytest.mark.parametrize(
    ("plain", "switched", "forms", "expected"),
    [
        (8, 8, (PLAIN, SWITCHED), Exactness(8, 0)),  # integer dot products
        (7, 8, (PLAIN, SWITCHED), Exactness(7, 8)),  # ONNX Runtime without them
        (7, 8, (PLAIN,), Exactness(7, 0)),  # OpenVINO has no switch
        (0, 7, (PLAIN, SWITCHED), Exactness(0, 7)),
        (0, 0, (PLAIN, SWITCHED), Exactness(0, 0)),
    ],
)
def test_a_machine_is_exact_up_to_the_bits_that_its_probes_are(
    plain: int, switched: int, forms: tuple[IntegerForm, ...], expected: Exactness
) -> None:
    assert find_exactness(machine(plain, switched)[0], forms) == expected


def test_where_plain_products_are_exact_nothing_else_is_run() -> None:
    is_exact, asked = machine(8, 8)
    find_exactness(is_exact, tuple(IntegerForm))
    assert asked == [(8, PLAIN)]


@pytest.mark.parametrize(
    ("exactness", "forms"),
    [
        (Exactness(8, 0), {8: PLAIN, 7: PLAIN, 4: PLAIN}),
        (Exactness(7, 8), {8: SWITCHED, 7: PLAIN, 4: PLAIN}),
        (Exactness(7, 0), {8: None, 7: PLAIN, 4: PLAIN}),
        (Exactness(0, 7), {8: None, 7: SWITCHED}),
    ],
)
def test_weights_take_the_fastest_form_that_is_exact_for_their_bits(
    exactness: Exactness, forms: dict[int, IntegerForm | None]
) -> None:
    assert {bits: exactness.form(bits) for bits in forms} == forms


@pytest.mark.parametrize(
    ("exactness", "bits", "words"),
    [
        (Exactness(8, 0), 8, "exact as it is (avx512_vnni)"),
        (Exactness(7, 8), 8, "slower: without VNNI this CPU adds two products in 16 bits; --precision w7a8 is exact"),
        (
            Exactness(7, 8),
            7,
            "exact as it is: without VNNI this CPU adds two products in 16 bits, where those of 7-bit",
        ),
        (Exactness(7, 0), 8, "refused, since it would not be exact"),
        (Exactness(0, 8), 8, "adds two products in 16 bits"),
    ],
)
def test_the_form_in_words(exactness: Exactness, bits: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_form, "integer_features", lambda: ["avx512_vnni"])
    assert words in exactness.described(bits)
    assert ("w7a8" in exactness.described(bits)) == (exactness.plain == 7 and bits == 8)


def two_layers() -> ir.Model:
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 2] x) => (float[batch, 2] y)
        <float[2, 2] v = {1.0, -2.0, 3.0, 0.5}, float[2, 2] w = {1.0, -2.0, 3.0, 0.5}> {
            h = MatMul (x, v)
            y = MatMul (h, w)
        }
        """
    )
    for node, path in zip(model.graph, ("first", "second"), strict=True):
        node.metadata_props.update({BRANCH_KEY: "a", PATH_KEY: path})
    return model


def table(bits: int) -> ScaleTable:
    scales = {"first": 0.1, "second": 0.1}
    return ScaleTable(method="max", segment_sha256="", calibration_digest="", scales=scales, bits=Bits(weights=bits))


def quantized(*bits: int) -> ir.Model:
    """Both layers with weights of so many bits, or each with its own."""
    model = two_layers()
    for layer, weights in zip(("first", "second"), bits * 2, strict=False):
        assert insert_qdq(model, table(weights), {layer})
    return model


@pytest.mark.parametrize("bits", [8, 7, 4])
def test_a_quantized_segment_says_how_many_bits_its_weights_have(bits: int, tmp_path: Path) -> None:
    save_graph(quantized(bits), tmp_path / "full.onnx")
    assert weight_bits(tmp_path / "full.onnx") == bits


def test_a_segment_that_does_not_say_so_is_taken_for_eight_bits(tmp_path: Path) -> None:
    model = quantized(7)
    model.metadata_props.clear()
    save_graph(model, tmp_path / "full.onnx")
    assert weight_bits(tmp_path / "full.onnx") == 8


@pytest.mark.parametrize("bits", [(8, 7), (7, 8), (4, 7)])
def test_a_segment_quantized_in_parts_says_the_most_bits_of_any(bits: tuple[int, int], tmp_path: Path) -> None:
    save_graph(quantized(*bits), tmp_path / "full.onnx")
    assert weight_bits(tmp_path / "full.onnx") == max(bits)


def test_a_segment_in_floating_point_has_no_bits(tmp_path: Path) -> None:
    save_graph(two_layers(), tmp_path / "full.onnx")
    assert weight_bits(tmp_path / "full.onnx") is None


def test_the_segments_of_a_bundle_say_what_they_hold(bundles: dict[str, Bundle]) -> None:
    bits_of = {}
    for name, bundle in bundles.items():
        for part in bundle.manifest.program.segments:
            bits = PRECISIONS[bundle.manifest.precision]
            expected = bits.weights if bits and part.quantizes else None
            for path in {bundle.segment_path(part.name), runnable_path(bundle.segment_path(part.name), "onnxrt")}:
                bits_of[name, path.name] = weight_bits(path), expected
    assert all(bits == expected for bits, expected in bits_of.values()), bits_of
    assert {bits for bits, _ in bits_of.values()} == {8, 4, None}


def test_no_integers_are_where_graphs_are_not_optimized(bundles: dict[str, Bundle]) -> None:
    """The switch is a graph transformer; `condition` is opened with none."""
    assert {weight_bits(bundle.segment_path("condition")) for bundle in bundles.values()} == {None}


def test_a_segment_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"can't read .*full\.onnx: No such file"):
        weight_bits(tmp_path / "full.onnx")


def test_threads_that_ask_at_once_wait_for_one_answer() -> None:
    asked = []

    @once_per_process
    def slow(name: str) -> str:
        asked.append(name)
        time.sleep(0.05)
        return name

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(slow, ["a"] * 8))
    assert answers == ["a"] * 8
    assert asked == ["a"]
    assert slow("b") == "b"


def test_what_failed_is_tried_again() -> None:
    asked = []

    @once_per_process
    def failing() -> None:
        asked.append(1)
        raise BundleError("no")

    for _ in range(2):
        with pytest.raises(BundleError):
            failing()
    assert len(asked) == 2


def test_advice_is_given_once_per_process() -> None:
    advise.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("slower", "slower", "another type", "slower"):
            advise(text)
    assert [str(each.message) for each in caught] == ["slower", "another type"]
    assert {each.category for each in caught} == {AdviceWarning}
