"""Velocities for noise alone tell which way the time of a flow runs, and from 0 to what; and noise from a flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from ditc.choices import FlowTimes, names_of
from ditc.diffusion import alphas_cumprod
from ditc.exporter.dit import DiT, DiTConfig, initialize_weights
from ditc.exporter.flow_check import FlowLook, doubts_of_flow, ends_of
from ditc.exporter.models import builtin_digits
from ditc.exporter.noise_check import doubts_about
from ditc.spec import DiffusionSpec

NAMES = names_of(FlowTimes)
SIZE, CLASSES, ROWS = (4, 4, 4), 4, 16
Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # (samples, times, classes) -> its own velocity


def clean_samples(spread: float) -> tuple[Tensor, Tensor]:
    """(the mean of each class, the standard deviation around it), as most latents have it: larger along one axis."""
    generator = torch.Generator().manual_seed(1)
    means = 0.4 * torch.randn(CLASSES, *SIZE, generator=generator)
    deviation = spread * torch.tensor([1.8, 0.7, 0.4, 0.3])
    return means, deviation.expand(SIZE)


def exact(times: FlowTimes, spread: float) -> Network:
    """The best velocity for Gaussian classes, in a model's own times and of its own direction."""
    means, deviation = clean_samples(spread)
    noise_at, data_at = ends_of(times)

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        level = ((t - data_at) / (noise_at - data_at))[:, None, None, None]
        left = x - (1 - level) * means[y]
        variance = level**2 + (1 - level) ** 2 * deviation**2
        noise, clean = level / variance * left, means[y] + (1 - level) * deviation**2 / variance * left
        return (noise - clean) * (1 if noise_at > data_at else -1)

    return velocity


@cache
def trained(times: FlowTimes) -> Network:
    """A small DiT after a second of training on four noisy classes."""
    noise_at, data_at = ends_of(times)
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=4, hidden_size=64, depth=1, num_heads=4, num_classes=4, learn_sigma=False))
    initialize_weights(model)
    means, deviation = clean_samples(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        y, level = torch.randint(0, CLASSES, (64,)), torch.rand(64)
        clean, noise = means[y] + deviation * torch.randn(64, *SIZE), torch.randn(64, *SIZE)
        share = level[:, None, None, None]
        out = model((1 - share) * clean + share * noise, data_at + (noise_at - data_at) * level, y)
        loss = (out - (noise - clean) * (1 if noise_at > data_at else -1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def look_at(network: Network, said: FlowTimes) -> FlowLook:
    """A model as one that is said to have some times."""
    noise_at, data_at = ends_of(said)

    @torch.no_grad()
    def answer(timestep: float, size: float) -> tuple[Tensor, Tensor]:
        noise = size * torch.randn(ROWS, *SIZE, generator=torch.Generator().manual_seed(0))
        time = data_at + (noise_at - data_at) * timestep / 1000
        out = network(noise, torch.full((ROWS,), time), torch.arange(ROWS) % CLASSES)
        return noise, out * (1 if noise_at > data_at else -1)

    return FlowLook(answer, (noise_at, data_at), 1000)


@pytest.mark.parametrize("said", NAMES)
@pytest.mark.parametrize("times", NAMES)
@pytest.mark.parametrize("spread", [0.2, 0.5, 1.0])
def test_exact_velocities_are_doubted_in_all_times_but_their_own(
    times: FlowTimes, said: FlowTimes, spread: float
) -> None:
    doubts = doubts_of_flow(look_at(exact(times, spread), said), "--flow-times")
    assert bool(doubts) == (said != times)
    if doubts:
        assert doubts[0].endswith(f"it seems to be no flow with times {said}, but one of {times} (--flow-times)")


@pytest.mark.parametrize("said", NAMES)
@pytest.mark.parametrize("times", NAMES)
def test_a_model_after_a_short_training_is_told_too(times: FlowTimes, said: FlowTimes) -> None:
    doubts = doubts_of_flow(look_at(trained(times), said), "--flow-times")
    assert bool(doubts) == (said != times)
    if doubts:
        assert f"no flow with times {said}, but one of {times}" in doubts[0]


def test_samples_as_white_as_noise_hide_the_direction_at_both_ends() -> None:
    """Reversed, such a flow gives the same at either end: hence a look at the middle."""
    one, other = (look_at(exact_white(times), "0:1") for times in ("0:1", "1:0"))
    for level in (0.0, 1.0):
        torch.testing.assert_close(one.velocity(one.own, level)[1], other.velocity(one.own, level)[1])


def exact_white(times: FlowTimes) -> Network:
    noise_at, data_at = ends_of(times)

    def velocity(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        level = ((t - data_at) / (noise_at - data_at))[:, None, None, None]
        return (2 * level - 1) / (level**2 + (1 - level) ** 2) * x * (1 if noise_at > data_at else -1)

    return velocity


@pytest.mark.parametrize("deviation", [0.1, 0.35, 0.5, 0.6, 0.7, 1.0])
def test_samples_of_one_variance_are_not_taken_for_noise_by_the_size_of_their_flow(deviation: float) -> None:
    def network(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        level = (t / 1000)[:, None, None, None]
        return (level - (1 - level) * deviation**2) / (level**2 + (1 - level) ** 2 * deviation**2) * x

    assert not any("predict noise" in line for line in doubts_of_flow(look_at(network, "1000:0"), ""))


def of_noise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The best predictor of noise over linear betas."""
    means, deviation = clean_samples(0.5)
    products = torch.from_numpy(alphas_cumprod(DiffusionSpec())).float()[t.clamp(0, 999).long()][:, None, None, None]
    noise = (1 - products).sqrt()
    return noise * (x - products.sqrt() * means[y]) / (noise**2 + products * deviation**2)


def test_a_predictor_of_noise_is_no_flow() -> None:
    (line,) = doubts_of_flow(look_at(of_noise, "1000:0"), "--prediction")
    assert line.endswith("the noise that it is given: it seems to predict noise, no flow (--prediction)")
    for said in ("0:1", "1:0", "0:1000"):
        assert doubts_of_flow(look_at(of_noise, said), "")


def test_the_built_in_model_is_doubted_where_it_is_said_to_predict_a_flow() -> None:
    model = builtin_digits()
    model.diffusion = DiffusionSpec(prediction="flow")
    (line,) = doubts_about(model, "--prediction")
    assert "it seems to predict noise, no flow" in line


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_model_that_returns_nothing_is_doubted(value: float) -> None:
    (line,) = doubts_of_flow(look_at(lambda x, *_: value * x, "0:1"), "x")
    assert line.endswith("it seems to be no flow with times 0:1 (x)")


def test_a_model_of_scaled_timesteps_is_looked_at_in_its_own() -> None:
    """A folder's, of 400 training steps: its times are 400:0."""
    network = exact("1000:0", 0.5)
    model = Scaled(network)
    assert doubts_about(model, "") == ()
    assert model.largest == 400
    model.sign = -1.0
    assert "points against the noise" in doubts_about(model, "")[0]


class Scaled(torch.nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.sign, self.largest = network, 1.0, 0.0
        process = DiffusionSpec(prediction="flow", train_steps=400, learned_sigma=False)
        config = DiTConfig(input_size=4, hidden_size=64, depth=1, num_heads=4, num_classes=4, learn_sigma=False)
        self.spec = DiT(config, diffusion=process).spec

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.largest = max(self.largest, float(t.max()))
        return self.sign * self.network(x, t * 2.5, y)
