"""`ditc bench --roofline`: limits from counted work and measured rates, and what bounds each segment."""

from __future__ import annotations

import json

import pytest

from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.engines.memory_needs import footprints
from ditc.footprint import Footprint, PortShape
from ditc.speed.rates import Rates
from ditc.speed.roofline import footprints_here, limit_of

UNIT = Rates(name="unit", int8_operations=100, float_operations=10, bandwidth=1, memory_bytes=1, source="made up")
PORT = PortShape(dtype="float32", shape=("batch", 3))


def work(**changes: int) -> Footprint:
    counted = {"weight_bytes": 0, "activation_bytes": 0, **changes}
    return Footprint.model_validate({"inputs": {"x": PORT}, "outputs": {"out": PORT}, **counted})


@pytest.mark.parametrize(
    ("counted", "limit", "bound_by"),
    [
        (work(int8_operations=10_000), 100, "INT8 products"),
        (work(float_operations=2_000), 200, "float products"),
        (work(int8_operations=10_000, float_operations=2_000), 300, "float products"),  # they share the cores
        (work(int8_operations=10_000, weight_bytes=52), 100, "INT8 products"),  # weights and ports stream meanwhile
        (work(int8_operations=10_000, weight_bytes=53), 101, "memory"),
        (work(), 48, "memory"),  # x and out: 2 rows of 3 float32 each
        (work(moved_bytes=1_000_000), 48, "memory"),  # what fusion can save is no limit
    ],
)
def test_the_limit_is_the_longer_of_products_and_what_must_be_moved(
    counted: Footprint, limit: float, bound_by: str
) -> None:
    line = limit_of(counted, {"batch": 2}, UNIT)
    assert line.limit == pytest.approx(limit)
    assert line.bound_by == bound_by
    assert limit_of(work(moved_bytes=7), {"batch": 2}, UNIT).unfused == pytest.approx(7)


def test_every_measured_segment_has_a_limit(bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    command = f"bench {bundles['cached'].path} --requests 2 --warmup 0 --roofline"
    assert run([*command.split(), "--json"]) == 0
    benched = json.loads(capsys.readouterr().out)
    lines = benched["roofline"]["segments"]
    assert set(lines) == {"condition", "full", "reuse"}
    for name, line in lines.items():
        assert line["measured"] == benched["segments"][name]["median"]
        assert line["share_of_limit"] == pytest.approx(line["limit"] / line["measured"])
        assert line["limit"] > 0
    assert lines["full"]["limit"] > lines["reuse"]["limit"]
    assert run(command.split()) == 0
    assert "ceilings, measured just now: INT8" in capsys.readouterr().out


def test_work_is_counted_in_the_types_that_a_cpu_computes_in(bundles: dict[str, Bundle]) -> None:
    here, typed = footprints_here(bundles["cached"]), footprints(bundles["cached"])
    assert here["full"].int8_operations == typed["full"].int8_operations > 0
    assert here["reuse"].weight_bytes > 1.5 * typed["reuse"].weight_bytes  # float32 against FP16
    assert here["full"].moved_bytes > 1.5 * typed["full"].moved_bytes


def test_conditioning_is_counted_once_for_each_label_as_it_runs(bundles: dict[str, Bundle]) -> None:
    """Four images of four classes with guidance: five labels, where an engine of fixed shapes takes eight rows."""
    here, typed = footprints_here(bundles["cached"]), footprints(bundles["cached"])
    assert here["condition"].float_operations / typed["condition"].float_operations == pytest.approx(5 / 8, rel=0.05)
