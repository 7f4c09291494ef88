"""The stress variant: the same function, through activations that are harder to quantize."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ditc.exporter.dit import DiT
from ditc.exporter.models import builtin_digits, load_model
from ditc.exporter.protocol import example_inputs, relative_error
from ditc.exporter.stress import Stress, stressed


@pytest.fixture(scope="module")
def models() -> tuple[DiT, DiT]:
    """The reference model, and its variant by the name that `ditc compile` takes."""
    return builtin_digits(), load_model("ditc.exporter.stress:digits")


@torch.no_grad()
def inputs_of_readers(model: DiT) -> dict[str, torch.Tensor]:
    """Return the inputs of qkv and fc1 of every block at 12 timesteps, layer -> (timesteps, tokens, dim)."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
        for name, module in model.named_modules()
        if name.endswith(("qkv", "fc1"))
    ]
    x, t, y = example_inputs(model.spec, 12)
    model(x, t, y)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_function_does_not_change(models: tuple[DiT, DiT]) -> None:
    model, variant = models
    inputs = example_inputs(model.spec, 4)
    with torch.no_grad():
        assert relative_error(variant(*inputs), model(*inputs)) < 2e-6


def test_outliers_are_10_to_40_times_as_large(models: tuple[DiT, DiT]) -> None:
    before, after = (inputs_of_readers(model) for model in models)
    assert len(before) == 12
    for name, plain in before.items():
        ratio = (after[name].norm(dim=(0, 1)) / plain.norm(dim=(0, 1))).sort().values
        torch.testing.assert_close(ratio[:-5], torch.ones(123), rtol=1e-4, atol=0)
        assert ratio[-5] == pytest.approx(10, rel=1e-3)
        assert ratio[-1] == pytest.approx(40, rel=1e-3)


@torch.no_grad()
def test_some_outliers_are_largest_early_and_some_late(models: tuple[DiT, DiT]) -> None:
    model, variant = models
    t, labels = torch.linspace(999, 0, 50), torch.arange(10)
    sizes = model.condition(t, labels)["modulation"].square().mean(dim=1)  # (timesteps, rows, dim)
    for branch in variant.branches:
        size = sizes[:, branch.first_row : branch.first_row + 2].sum(dim=1).sqrt()
        trend = size[:25].mean(dim=0) / size[25:].mean(dim=0)
        layer = [each.blocks[branch.first_row // 6].adaLN_modulation[1].weight for each in models]
        shift = slice(branch.first_row % 6 * 128, branch.first_row % 6 * 128 + 128)
        outliers = trend[(layer[1][shift] / layer[0][shift]).median(dim=1).values > 5]
        middle = trend.quantile(torch.tensor([0.1, 0.9]))
        assert (outliers < middle[0]).any()
        assert (outliers > middle[1]).any()


def test_the_variant_is_seeded_and_leaves_the_model_alone(make_small_model: Callable[[], DiT]) -> None:
    model = make_small_model()
    first, again, other = stressed(model), stressed(model), stressed(model, Stress(seed=1))
    weights = [each.blocks[0].attn.qkv.weight for each in (first, again, other, model, make_small_model())]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[3], weights[4])
