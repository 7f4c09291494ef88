"""The ground of `benchmarks/quality/two_regions.py`: what two regions stand for, and the products of their integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.exporter.models import builtin_digits

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(QUALITY))
    return __import__("two_regions")


def gelu_by_definition(x: np.ndarray, below: float, above: float, half: int) -> np.ndarray:
    low = np.clip(np.round(x / below), -half, 0) * below
    return np.where(x < 0, low, np.clip(np.round(x / above), 0, half - 1) * above)


def softmax_by_definition(x: np.ndarray, fine: float, half: int) -> np.ndarray:
    return np.where(x < half * fine, np.clip(np.round(x / fine), 0, half - 1) * fine, np.round(x * half) / half)


@pytest.mark.parametrize("bits", [4, 8])
def test_two_integer_products_are_the_product_of_the_definition(study: Any, bits: int) -> None:
    rng, half = np.random.default_rng(0), 2 ** (bits - 1)
    weight = rng.integers(-127, 128, (64, 8)).astype(np.int32)
    x = rng.normal(size=(32, 64))
    x[0, :3] = [0, -100, 100]  # the middle, and what clips
    regions = study.gelu_regions(x, 0.002, 0.03, bits)
    defined = gelu_by_definition(x, 0.002, 0.03, half)
    np.testing.assert_array_equal(study.dequantized(regions), defined)
    np.testing.assert_allclose(study.product(regions, weight), defined @ weight, rtol=1e-12, atol=1e-9)
    shares = rng.dirichlet(np.full(64, 0.1), 32)
    shares[0] = np.eye(64)[0]  # one key takes all
    regions = study.softmax_regions(shares, 0.0004, bits)
    defined = softmax_by_definition(shares, 0.0004, half)
    np.testing.assert_array_equal(study.dequantized(regions), defined)
    np.testing.assert_allclose(study.product(regions, weight), defined @ weight, rtol=1e-12, atol=1e-9)


def test_a_value_is_in_one_region_alone(study: Any) -> None:
    x = np.linspace(-1, 1, 1001)
    low, high = (integers for integers, _ in study.gelu_regions(x, 0.01, 0.01, 8))
    assert not ((low != 0) & (high != 0)).any()
    low, high = (integers for integers, _ in study.softmax_regions(np.abs(x), 0.001, 8))
    assert not ((low != 0) & (high != 0)).any()


def test_what_is_searched_is_nearer_than_one_range_about_zero(study: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 256))
    gelu = (x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))) / 2).astype(np.float32)
    shares = rng.dirichlet(np.full(64, 0.1), 256).astype(np.float32)
    for values, search in ((gelu, study.searched_gelu), (shares, study.searched_softmax)):
        one, two = (form(values) for form in (study.searched_range(values, 8, None), search(values, 8)))
        assert _error(study, values, two) < 0.7 * _error(study, values, one)


def test_what_is_watched_are_the_products_that_the_model_makes(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "PICTURES", 2)
    model, read = builtin_digits().eval(), []
    block = model.blocks[0]
    block.attn.proj.register_forward_pre_hook(lambda _, args: read.append(args[0].numpy()))
    block.mlp.fc2.register_forward_hook(lambda layer, _, out: read.append((out - layer.bias).numpy()))
    seen = study.products(model)
    assert len(seen["gelu"]) == len(seen["softmax"]) == len(model.blocks)
    (shares, values), (left, weight) = seen["softmax"][0], seen["gelu"][0]
    mixed = (shares @ values).swapaxes(1, 2).reshape(read[0].shape)
    np.testing.assert_allclose(mixed, read[0], atol=1e-5)
    np.testing.assert_allclose(left @ weight, read[1], atol=1e-4)


def _error(study: Any, values: np.ndarray, regions: Any) -> float:
    return float(np.square(values - study.dequantized(regions)).sum())
