"""The ground of `benchmarks/growth.py`: exponents, and bundles at another batch."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ditc.bundle import Bundle
from ditc.speed.roofline import footprints_here

ROOT = Path(__file__).parents[2]


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return __import__("growth")


def test_an_exponent_is_the_slope_of_logarithms(growth: Any) -> None:
    fit = growth.exponent([1, 2, 4], [3, 12, 48])
    assert fit["exponent"] == pytest.approx(2)
    assert fit["residual"] == pytest.approx(0, abs=1e-12)
    bent = growth.exponent([1, 2, 4], [1, 2, 8])
    assert bent["between_neighbours"] == pytest.approx([1, 2])
    assert bent["exponent"] == pytest.approx(1.5)
    assert bent["residual"] == pytest.approx(np.log(2) / np.sqrt(18))


def test_a_bundle_for_more_images_at_a_time_has_that_much_more_work(growth: Any, tmp_path: Path) -> None:
    single, twice = (growth.compiled(tmp_path, 1, 16, 2, batch) for batch in (1, 2))
    assert [bundle.manifest.batch for bundle in (single, twice)] == [1, 2]
    operations = [footprints_here(bundle)["full"].int8_operations for bundle in (single, twice)]
    assert operations[1] == 2 * operations[0]


def test_operations_of_a_run_are_those_of_its_calls(growth: Any, bundles: dict[str, Bundle]) -> None:
    rates = growth.Rates(
        name="unit", int8_operations=1, float_operations=1, bandwidth=1, memory_bytes=1, source="made up"
    )
    operations = growth.predicted(bundles["cached"].path, rates)["operations"]
    work = {
        name: need.int8_operations + need.float_operations for name, need in footprints_here(bundles["cached"]).items()
    }
    assert operations["step"] == work["full"]
    assert operations["run"] == work["condition"] + 3 * (work["full"] + work["reuse"])
