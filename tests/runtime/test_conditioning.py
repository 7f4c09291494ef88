"""The conditioning of a request: each label once, and every step its own rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from ditc.engines.backend import Buffer, Port
from ditc.engines.fake import FakeBinding, FakeEngine
from ditc.runtime.conditioning import Conditioning, rows_at, with_later_rows
from ditc.runtime.pipeline import Pipeline

T = np.array([9, 5, 1], np.float32)
TAKING = {
    "table": Port("table", "float32", ("batch", 2)),
    "ahead.table": Port("ahead.table", "float32", (2, "batch", 2)),
}


def table_of(inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """(steps, labels, 2): the timestep and the label."""
    t, y = np.meshgrid(inputs["t"], inputs["y"].astype(np.float32), indexing="ij")
    return {"table": np.stack([t, y], axis=-1)}


class LookedAt(FakeEngine):
    """Its `last` is the newest binding."""

    last: FakeBinding

    def binding(self) -> FakeBinding:
        self.last = super().binding()
        return self.last


@pytest.fixture
def engine() -> LookedAt:
    ports = {"t": Port("t", "float32", ("steps",)), "y": Port("y", "int64", ("batch",))}
    return LookedAt(table_of, ports, {"table": Port("table", "float32", ("steps", "batch", 2))})


def rows_of(conditioning: Conditioning, step: int) -> tuple[list[list[float]], list[list[list[float]]]]:
    inputs = conditioning.inputs(step, TAKING)
    return inputs["table"].tolist(), inputs["ahead.table"].tolist()


@pytest.mark.parametrize("labels", [[3, 7, 2, 0], [7, 3, 7, 7], [4, 4, 4, 4]])
def test_every_row_is_its_label_s_whether_labels_repeat_or_not(labels: list[int], engine: LookedAt) -> None:
    conditioning = Conditioning(engine, T, rows=4, most_ahead=2)
    conditioning.compute({"y": np.array(labels)})
    own, later = rows_of(conditioning, 0)
    assert own == [[9, label] for label in labels]
    assert later == [[[5, label] for label in labels], [[1, label] for label in labels]]


def test_each_label_is_computed_once(engine: LookedAt) -> None:
    conditioning = Conditioning(engine, T, rows=6, most_ahead=0)
    conditioning.compute({"y": np.array([7, 3, 7, 10, 10, 10])})
    assert engine.last.bound["y"].tolist() == [7, 3, 10]
    assert engine.last.bound["table"].shape == (3, 3, 2)


def test_rows_past_the_last_step_are_zero_after_a_request_of_more_labels_too(engine: LookedAt) -> None:
    conditioning = Conditioning(engine, T, rows=4, most_ahead=2)
    conditioning.compute({"y": np.array([1, 2, 3, 4])})
    conditioning.compute({"y": np.array([1, 2, 2, 2])})
    _, later = rows_of(conditioning, 1)
    assert later == [[[1, label] for label in (1, 2, 2, 2)], [[0, 0]] * 4]


def test_tables_of_the_request_are_gathered_once() -> None:
    ports = {"y": Port("y", "int64", ("batch",))}
    tables = {"request.text": Port("request.text", "float32", ("batch", 2))}
    engine = LookedAt(
        lambda given: {"request.text": np.stack([given["y"]] * 2, axis=1).astype(np.float32)}, ports, tables
    )
    conditioning = Conditioning(engine, T, rows=4, most_ahead=2)
    for labels in ([7, 3, 7, 7], [5, 5, 5, 5], [1, 2, 3, 4]):
        conditioning.compute({"y": np.array(labels)})
        assert "t" not in engine.last.bound  # the engine takes none
        first, second = (conditioning.inputs(step, tables)["request.text"] for step in (0, 1))
        assert first.tolist() == [[label] * 2 for label in labels]
        assert np.shares_memory(first, second)
        first[:] = -1  # what a step sees later is what was gathered, not gathered again
        assert (conditioning.inputs(2, tables)["request.text"] == -1).all()


def test_rows_of_a_bundles_tables_are_the_step_s_own_and_later_ones() -> None:
    tables = {"step.rows": np.arange(6, dtype=np.float32).reshape(3, 2), "scales": np.ones((3, 4), np.float32)}
    ports = {
        "step.rows": Port("step.rows", "float32", (2,)),
        "ahead.step.rows": Port("ahead.step.rows", "float32", (2, 2)),
    }
    padded = with_later_rows(tables, 2)
    assert padded["scales"] is tables["scales"]
    rows = rows_at(padded, 1, ports)
    assert rows.keys() == ports.keys()
    assert rows["step.rows"].tolist() == [2, 3]
    assert rows["ahead.step.rows"].tolist() == [[4, 5], [0, 0]]
    assert rows_at(padded, 2, {}) == {}


def test_a_request_whose_labels_all_differ_copies_nothing(engine: LookedAt) -> None:
    conditioning = Conditioning(engine, T, rows=2, most_ahead=0)
    conditioning.compute({"y": np.array([5, 1])})
    assert np.shares_memory(conditioning.inputs(1, {"table": TAKING["table"]})["table"], engine.last.bound["table"])


def test_images_of_one_class_share_its_conditioning(pipes: dict[str, Pipeline]) -> None:
    """Class and noise decide an image, however often the batch asks for the class."""
    pipe = pipes["fp32-cached"]
    noise = np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32)
    repeated = pipe.latents([2, 2, 0, 2], noise=noise)
    mixed = pipe.latents([2, 1, 0, 3], noise=noise)
    np.testing.assert_allclose(repeated[[0, 2]], mixed[[0, 2]], atol=1e-5)
    assert not np.allclose(repeated[[1, 3]], mixed[[1, 3]], atol=1e-3)
