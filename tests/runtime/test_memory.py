"""The laws of the trajectory where the sampler looks back at earlier steps, and where such a bundle runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ditc.bundle import Bundle
from ditc.runtime.closeness import relative_error
from ditc.runtime.executor import seeded_noise
from ditc.runtime.pipeline import Pipeline, load
from ditc.runtime.reference_run import GuidedRun
from ditc.table_checks import table_contradictions
from ditc.tables import memory_of, sampler_columns
from tests.runtime.test_executors import IN_HOST_MEMORY, PlayedDevice, request_for

LABELS = [0, 3, 1, 4]
CACHED = ["memory", "memory-int8"]


def noise_for(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8), dtype=np.float32)


def test_a_bundle_says_which_sampler_it_was_made_with(bundles: dict[str, Bundle]) -> None:
    for name, sampler, memory in (
        ("memory", "unipc", 2),
        ("memory-int8", "dpm++3m", 2),
        ("memory-noise", "dpm++2m-sde", 1),
        ("cached", "ddim", 0),
    ):
        asked = bundles[name].manifest.asked.sampler
        assert asked is not None
        assert asked.name == sampler
        assert memory_of(sampler_columns(bundles[name].tables())) == memory


def test_a_schedule_with_no_reuse_gives_the_uncached_result_bit_for_bit(pipes: dict[str, Pipeline]) -> None:
    assert np.array_equal(pipes["memory-fora1"].latents(LABELS, seed=3), pipes["memory-none"].latents(LABELS, seed=3))


@pytest.mark.parametrize("name", CACHED)
def test_permuting_the_batch_permutes_the_images(pipes: dict[str, Pipeline], name: str) -> None:
    order, noise = [2, 0, 3, 1], noise_for(4)
    plain = pipes[name].latents(LABELS, noise=noise)
    permuted = pipes[name].latents([LABELS[i] for i in order], noise=noise[order])
    np.testing.assert_allclose(permuted, plain[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CACHED)
def test_merged_requests_give_what_each_gives_alone(pipes: dict[str, Pipeline], name: str) -> None:
    noise = noise_for(4)
    together = pipes[name].latents(LABELS, noise=noise)
    alone = [pipes[name].latents(LABELS[i : i + 1], noise=noise[i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(np.concatenate(alone), together, rtol=0, atol=1e-5)


def test_merged_requests_whose_sampler_adds_noise_give_what_each_gives_alone(pipes: dict[str, Pipeline]) -> None:
    pipe, seeds = pipes["memory-noise"], [7, 5, 6, 8]
    together = pipe.latents(LABELS, seeds=seeds)
    alone = [pipe.latents([label], seed=seed) for label, seed in zip(LABELS, seeds, strict=True)]
    assert relative_error(np.concatenate(alone), together) < 1e-5
    assert relative_error(pipe.latents(LABELS, seeds=[7, 5, 6, 9]), together) > 1e-3


@pytest.mark.parametrize("backend", [None, PlayedDevice(IN_HOST_MEMORY)])
def test_noise_is_drawn_for_the_steps_that_add_any(bundles: dict[str, Bundle], backend: Any) -> None:
    drawn: list[int] = []

    def fresh(step: int) -> np.ndarray:
        drawn.append(step)
        return noise_for(4)

    path = bundles["memory-noise"]
    with load(path.path) if backend is None else Pipeline(path, backend=backend) as pipe:
        pipe.executor.last(pipe.request(LABELS), noise_for(4), fresh)
        sigma = path.tables()["sampler.sigma"]
    assert drawn == np.flatnonzero(sigma > 0).tolist() == [0, 1, 2, 3, 4]


def test_a_second_request_equals_the_first_after_an_abandoned_one(pipes: dict[str, Pipeline]) -> None:
    first = pipes["memory"].images(LABELS, seed=5)
    abandoned = pipes["memory"].generate([4, 4, 4, 4], seed=9)
    for _ in range(3):
        next(abandoned)
    abandoned.close()
    assert np.array_equal(pipes["memory"].images(LABELS, seed=5), first)


def test_threads_give_what_one_gives(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["memory"]
    alone = [pipe.latents(LABELS, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda seed: pipe.latents(LABELS, seed=seed), range(4)))
    for one, other in zip(alone, at_once, strict=True):
        assert np.array_equal(one, other)


def test_two_requests_can_be_walked_in_turn(pipes: dict[str, Pipeline]) -> None:
    alone = [pipes["memory"].latents(LABELS, seed=seed) for seed in (1, 2)]
    last = list(zip(*(pipes["memory"].generate(LABELS, seed=seed) for seed in (1, 2)), strict=True))[-1]
    assert np.array_equal(last[0].x, alone[0])
    assert np.array_equal(last[1].x, alone[1])


def test_a_run_around_another_network_keeps_the_same_past(bundles: dict[str, Bundle]) -> None:
    """A run with a network that returns its sample: what the columns make of it by hand, step by step."""
    run = GuidedRun.of(bundles["memory-none"])
    noise = noise_for(2)

    def network(index: int, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([np.tanh(rows), rows], axis=1)[:, : run.spec.out_channels]

    seen: list[Any] = [noise]
    for i in range(run.steps):
        after = run.columns["prev_x"][i] * seen[i] + run.columns["prev_out"][i] * np.tanh(seen[i])
        for back in (1, 2):
            if i >= back:
                x = seen[i - back]
                after = after + run.columns[f"x.{back}"][i] * x + run.columns[f"out.{back}"][i] * np.tanh(x)
        seen.append(after)
    assert relative_error(run.last(network, noise, lambda _: noise), seen[-1].astype(np.float32)) < 1e-5


@pytest.mark.parametrize("name", ["memory", "memory-noise"])
@pytest.mark.parametrize("graphs", ["none", "step", "trajectory"])
def test_a_device_gives_what_the_processor_gives(
    bundles: dict[str, Bundle], pipes: dict[str, Pipeline], graphs: str, name: str
) -> None:
    expected = [event.x for event in pipes[name].executor.run(*request_for(pipes[name]))]
    with Pipeline(bundles[name], backend=PlayedDevice(IN_HOST_MEMORY), graphs=graphs) as pipe:
        executor = pipe.executor
        for _ in range(3):
            events = [event.x for event in executor.run(*request_for(pipe))]
            assert max(relative_error(one, other) for one, other in zip(events, expected, strict=True)) < 1e-5
            assert np.array_equal(executor.last(*request_for(pipe)), events[-1])
            executor.last(pipe.request([1]), *seeded_noise(9, 0, 1, pipe.bundle.manifest.model.latent_shape))


def test_requests_that_take_turns_on_a_device_keep_their_own_past(bundles: dict[str, Bundle]) -> None:
    with Pipeline(bundles["memory"], backend=PlayedDevice(IN_HOST_MEMORY)) as pipe:
        executor = pipe.executor
        alone = [executor.last(*request_for(pipe, seed)) for seed in (1, 2)]
        last = list(zip(*(executor.run(*request_for(pipe, seed)) for seed in (1, 2)), strict=True))[-1]
        assert np.array_equal(last[0].x, alone[0])
        assert np.array_equal(last[1].x, alone[1])


def test_a_device_has_the_fingerprint_of_the_processor(bundles: dict[str, Bundle], pipes: dict[str, Pipeline]) -> None:
    """An update looks back at nothing there, whatever a request has left."""
    samples = {step: noise_for(1) for step in (0, 3)}
    with Pipeline(bundles["memory"], backend=PlayedDevice(IN_HOST_MEMORY)) as pipe:
        pipe.executor.last(*request_for(pipe))
        own = list(pipe.executor.outputs_at(pipe.request([1]), samples))
    for (_, call, one), (_, other_call, other) in zip(
        own, pipes["memory"].executor.outputs_at(pipe.request([1]), samples), strict=True
    ):
        assert call == other_call
        for port in one:
            assert relative_error(np.asarray(one[port]), np.asarray(other[port])) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("sampler.out.2"), "'sampler.out.2' is missing"),
        (lambda t: t["sampler.x.1"].__setitem__(0, 0.5), "'sampler.x.1' looks back to before the first step"),
        (lambda t: t["sampler.clip"].fill(1.0), "'sampler.clip' holds 1, and a sampler that looks back clips nothing"),
        (lambda t: t["sampler.out.1"].__imul__(1.1), "the sampler's columns of step 1 don't fit"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(bundles: dict[str, Bundle], change: Any, message: str) -> None:
    tables = {name: np.array(table) for name, table in bundles["memory"].tables().items()}
    assert next(table_contradictions(bundles["memory"].manifest, tables), None) is None
    change(tables)
    assert message in next(table_contradictions(bundles["memory"].manifest, tables))


def test_a_bundle_of_ddim_has_no_history(bundles: dict[str, Bundle]) -> None:
    tables = dict(bundles["cached"].tables())
    steps = len(tables["sampler.t"])
    tables |= {"sampler.x.1": np.zeros(steps), "sampler.out.1": np.zeros(steps)}
    assert "'sampler.x.1' is there" in next(table_contradictions(bundles["cached"].manifest, tables))
