"""`ditc estimate`: work that was counted, rates that are stated, sums that add up."""

from __future__ import annotations

import json

import pytest

from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.engines.memory_needs import footprints
from ditc.footprint import Footprint
from ditc.speed.estimating import estimate_bundle
from ditc.speed.rates import DEVICES, MEASURED, Rates, segment_seconds

UNIT = Rates(
    name="unit", int8_operations=100, float_operations=10, bandwidth=1, memory_bytes=1, source="made up", float_bytes=2
)


def work(**changes: int) -> Footprint:
    counted = {"weight_bytes": 0, "activation_bytes": 0, **changes}
    return Footprint.model_validate({"inputs": {}, "outputs": {}, **counted})


@pytest.mark.parametrize(
    ("counted", "seconds"),
    [
        (work(int8_operations=200), 2),
        (work(float_operations=200), 20),
        (work(int8_operations=200, float_operations=200), 22),
        (work(int8_operations=200, weight_bytes=1), 2),  # weights stream in while the products run
        (work(int8_operations=200, weight_bytes=5), 5),
        (work(int8_operations=200, moved_bytes=7), 9),
    ],
)
def test_a_segment_takes_its_products_or_its_weights_and_then_the_rest(counted: Footprint, seconds: float) -> None:
    assert segment_seconds(counted, UNIT, MEASURED) == pytest.approx(seconds)


@pytest.mark.parametrize(("bundle", "factor"), [("cached", 2), ("fp32-cached", 1)])
def test_floats_are_as_wide_as_the_device_has_them(
    bundle: str,
    factor: int,
    bundles: dict[str, Bundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a quantized bundle the form with two-byte floats was counted, and a CPU has four; else there is one form."""
    monkeypatch.setitem(DEVICES, "cpu", UNIT.model_copy(update={"float_bytes": 4}))
    estimated = estimate_bundle(bundles[bundle].path, "cpu").segments["full"]
    assert estimated.moved_bytes == factor * footprints(bundles[bundle])["full"].moved_bytes


@pytest.mark.parametrize("device", [*DEVICES, "here"])
def test_an_image_is_the_sum_of_its_calls(
    device: str, bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bundles["cached"]
    assert run(["estimate", str(bundle.path), "--device", device, "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    rows = estimate["segments"]
    for kind in ("bound", "expected"):
        step = 3 * (rows["full"][kind] + rows["reuse"][kind]) + 6 * rows["update"][kind]
        assert estimate["seconds_per_image"][kind] == pytest.approx((rows["condition"][kind] + step) / 4)
    assert rows["full"]["int8_operations"] > rows["full"]["float_operations"] > 0
    assert rows["reuse"]["int8_operations"] == 0
    assert rows["full"]["expected"] >= rows["full"]["bound"] > rows["reuse"]["bound"]
    assert estimate["fits"]
    assert run(["estimate", str(bundle.path), "--device", device]) == 0
    assert "per image: bound" in capsys.readouterr().out


def test_linear_layers_are_counted_by_hand(bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", str(bundles["cached"].path), "--device", "l4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["segments"]
    tokens, width, blocks, batch_rows = 16, 64, 2, 8
    per_block = 3 * width * width + width * width + 2 * 4 * width * width  # q, k, v, projection, both MLP layers
    assert rows["full"]["int8_operations"] == 2 * batch_rows * tokens * blocks * per_block


def test_an_unknown_device_is_named(bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", str(bundles["cached"].path), "--device", "a100"]) == 2
    assert "unknown --device 'a100'; choose one of: agx-orin, h100, h200, here, l4, orin-nx" in capsys.readouterr().err
