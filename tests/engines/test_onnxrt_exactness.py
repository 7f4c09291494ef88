"""The configuration of ONNX Runtime sessions, on machines of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ditc.bundle import Bundle
from ditc.compiler.probe_graphs import FOLDER
from ditc.engines import onnxrt
from ditc.engines.backend import runnable_path
from ditc.engines.integer_form import Exactness, advise
from ditc.engines.onnxrt import OnnxRuntimeBackend, exact_entries
from ditc.errors import AdviceWarning, InputError

WITH_VNNI, WITHOUT, NOTHING, SEVEN_ONLY = Exactness(8), Exactness(7, 8), Exactness(0), Exactness(7)
EIGHT_BITS, SEVEN_BITS = FOLDER / "onnxrt-8.onnx", FOLDER / "onnxrt-7.onnx"
SWITCHED = {"session.x64quantprecision": "1"}


PutOn = Callable[[Exactness], None]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> PutOn:
    """Puts a test on a machine of some exactness."""
    return lambda exactness: monkeypatch.setattr(onnxrt, "onnxruntime_exactness", lambda: exactness)


@pytest.mark.parametrize(
    ("exactness", "segment", "entries"),
    [
        (WITH_VNNI, EIGHT_BITS, {}),
        (WITHOUT, EIGHT_BITS, SWITCHED),
        (WITHOUT, SEVEN_BITS, {}),  # nothing to switch: it would be as exact
        (SEVEN_ONLY, SEVEN_BITS, {}),
    ],
)
def test_a_session_is_switched_where_its_products_are_not_exact_without(
    exactness: Exactness, segment: Path, entries: dict[str, str], on: PutOn
) -> None:
    on(exactness)
    assert exact_entries(segment) == entries
    config = OnnxRuntimeBackend().session(segment).get_session_options()
    assert [config.get_session_config_entry(key) for key in entries] == list(entries.values())


@pytest.mark.parametrize(("exactness", "advice"), [(NOTHING, "--precision fp32"), (SEVEN_ONLY, "--precision w7a8")])
def test_what_nothing_makes_exact_is_refused_and_says_what_to_do(exactness: Exactness, advice: str, on: PutOn) -> None:
    on(exactness)
    with pytest.raises(InputError, match=rf"^onnxrt-8\.onnx: products with 8-bit weights are not exact .*{advice}"):
        OnnxRuntimeBackend().open(EIGHT_BITS)


def test_floating_point_is_not_probed_and_runs_on_every_machine(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxrt, "onnxruntime_exactness", None)
    for name in ("condition", "full", "reuse"):
        with OnnxRuntimeBackend().open(bundles["fp32-cached"].segment_path(name)) as engine:
            assert engine.outputs


@pytest.mark.parametrize(("exactness", "advised"), [(WITH_VNNI, 0), (WITHOUT, 1), (Exactness(0, 8), 0)])
def test_a_bundle_of_eight_bits_is_advised_of_seven_where_those_are_faster(
    exactness: Exactness, advised: int, bundles: dict[str, Bundle], on: PutOn, recwarn: pytest.WarningsRecorder
) -> None:
    on(exactness)
    advise.cache_clear()
    path = runnable_path(bundles["cached"].segment_path("full"), "onnxrt")
    for _ in range(2):
        OnnxRuntimeBackend().open(path)
    OnnxRuntimeBackend().open(SEVEN_BITS)
    messages = [str(each.message) for each in recwarn if each.category is AdviceWarning]
    assert len(messages) == advised
    assert all("compile with --precision w7a8" in text for text in messages)
