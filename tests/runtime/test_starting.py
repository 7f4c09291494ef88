"""Requests that begin in the middle: they are the rest of a whole run, where nothing earlier is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ditc.bundle import Bundle
from ditc.engines.backend import Backend, DeviceBackend
from ditc.errors import InputError
from ditc.passes import program_from_schedule
from ditc.program import Program
from ditc.runtime.executor import Samples, seeded_noise
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.samplers import sampler_table
from ditc.runtime.starting import first_steps, noise_shares, start_for_strength
from ditc.schedule import CacheSchedule
from ditc.spec import DiffusionSpec, SamplerSpec
from tests.runtime.test_executors import BACKENDS

LABELS, SEED, STEPS = [3, 0, 4], 5, 6
# bundles that are opened on a processor and on a device -> the steps that a request may begin with
STARTS = {
    "cached": (0, 2, 4),  # INT8, compensated, held
    "fp32-branches": (0, 2, 4),
    "fp32-none": (0, 1, 2, 3, 4, 5),
    "fp32-taylor": (0,),  # the last step extrapolates from steps 4 and 2
    "noise": (0, 2, 4),
    "memory": (0,),
    "memory-noise": (0,),
    "memory-last": (0, 5),  # the last step is of first order
}


@pytest.fixture(params=BACKENDS)
def opened(request: pytest.FixtureRequest, bundles: dict[str, Bundle]) -> Callable[[str], Pipeline]:
    backend: Callable[[], Backend | DeviceBackend] = BACKENDS[request.param]
    return lambda name: Pipeline(bundles[name], backend=backend(), graphs="step")


def whole_run(pipe: Pipeline) -> list[Samples]:
    """Return the samples in front of each step, and behind the last."""
    events = list(pipe.generate(LABELS, seed=SEED))
    return [*(np.array(event.before) for event in events), np.array(events[-1].x)]


@pytest.mark.parametrize("name", STARTS)
def test_from_what_a_whole_run_had_at_a_step_comes_the_rest_of_it_bit_for_bit(
    name: str, opened: Callable[[str], Pipeline]
) -> None:
    with opened(name) as pipe:
        assert pipe.starts == STARTS[name]
        run = whole_run(pipe)
        for start in pipe.starts:
            given: dict[str, Any] = {"seed": SEED, "latents": run[start], "start": start}
            assert np.array_equal(pipe.latents(LABELS, **given), run[-1])
            assert np.array_equal(pipe.images(LABELS, **given), np.clip(run[-1], -1, 1))
            events = list(pipe.generate(LABELS, **given))
            assert [event.index for event in events] == list(range(start, STEPS))
            assert all(np.array_equal(event.before, run[event.index]) for event in events)
        assert np.array_equal(pipe.latents(LABELS, seed=SEED), run[-1])  # and leaves nothing behind


def test_what_an_earlier_request_left_is_not_looked_back_at(opened: Callable[[str], Pipeline]) -> None:
    """Not even with a weight of nothing: what is left may be infinite."""
    with opened("memory-last") as pipe:
        run = whole_run(pipe)
        with np.errstate(all="ignore"):
            pipe.latents(LABELS, noise=np.full_like(run[0], np.inf))
        assert np.array_equal(pipe.latents(LABELS, seed=SEED, latents=run[5], start=5), run[-1])


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("cached", 1, "can't begin with step 1: step 1 takes 'ahead.1' from what step 0 left; start at 0 or 2"),
        ("cached", 5, "can't begin with step 5: step 5 takes 'ahead.1' from what step 4 left; start at 4"),
        ("fp32-taylor", 2, "step 3 takes 'ahead.3' from what step 0 left, and a bundle compiled with --reuse hold"),
        ("memory-none", 3, "can't begin with step 3: the sampler looks back from step 3 at step 2; start at 0"),
        ("cached", 6, "start must be a step of this bundle, 0 to 5, found 6"),
        ("cached", -1, "start must be a step of this bundle, 0 to 5, found -1"),
        ("cached", 1.5, "start must be whole numbers"),
    ],
)
def test_a_step_that_needs_earlier_ones_is_refused_with_the_nearest_that_does_not(
    name: str, start: int, message: str, pipes: dict[str, Pipeline]
) -> None:
    latents = np.zeros((3, 3, 8, 8), np.float32)
    for ask in (pipes[name].images, pipes[name].latents):
        with pytest.raises(InputError) as refused:
            ask(LABELS, latents=latents, start=start)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": 2}, r"start=2 needs latents, the samples in front of that step; pipe.noised"),
        ({"latents": np.zeros((3, 3, 8, 8)), "noise": np.zeros((3, 3, 8, 8))}, "or latents with start; found both"),
        ({"latents": np.zeros((2, 3, 8, 8))}, "latents must have one sample per image: 3 images, found 2"),
        ({"latents": np.zeros((3, 3, 8, 4))}, r"latents must have shape \(3, 3, 8, 8\), found \(3, 3, 8, 4\)"),
        ({"latents": [0.0]}, "latents must be a NumPy array of float32, found list"),
    ],
)
def test_what_a_request_can_not_begin_with_is_refused(
    given: dict[str, Any], message: str, pipes: dict[str, Pipeline]
) -> None:
    with pytest.raises(InputError, match=message):
        pipes["cached"].latents(LABELS, **given)


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("cached", {1: 0, 0.9: 2, 0.8: 2, 0.7: 2, 0.5: 4, 0.34: 4, 0.1: 4}),
        ("fp32-none", {1: 0, 0.9: 1, 0.8: 2, 0.7: 2, 0.5: 3, 0.34: 4, 0.1: 5}),
        ("memory-last", {1: 0, 0.5: 5, 0.34: 5}),
    ],
)
def test_a_strength_begins_with_the_nearest_step_that_may_be_the_first(
    name: str, starts: dict[float, int], pipes: dict[str, Pipeline]
) -> None:
    assert {strength: pipes[name].start_for(strength) for strength in starts} == starts


@pytest.mark.parametrize(
    ("name", "strength", "message"),
    [
        (
            "memory-last",
            0.7,
            "can't: the sampler looks back from step 2 at step 1; it may begin with: 0 (strength 1), 5 ",
        ),
        ("fp32-taylor", 0.4, "needs one step that computes; it may begin with: 0 (strength 1)"),
        ("cached", 0.0, "strength must be above 0 and at most 1, found 0"),
        ("cached", 1.1, "strength must be above 0 and at most 1, found 1.1"),
        ("cached", float("nan"), "found nan"),
    ],
)
def test_a_strength_of_which_noise_alone_would_be_left_is_refused(
    name: str, strength: float, message: str, pipes: dict[str, Pipeline]
) -> None:
    with pytest.raises(InputError) as refused:
        pipes[name].start_for(strength)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_long_list_of_steps_is_cut() -> None:
    zero = np.zeros(20)
    looks_back = {"t": zero, "x.1": zero.copy(), "out.1": zero}
    looks_back["x.1"][1:11] = 1.0
    program = no_cache(20)
    assert first_steps(program, looks_back) == (0, *range(11, 20))
    with pytest.raises(InputError, match=r"may begin with: 0 \(strength 1\), 11 \(strength 0.45\), .* 15 .*, 4 more$"):
        start_for_strength(program, looks_back, 0.95)


def no_cache(steps: int) -> Program:
    schedule = CacheSchedule(compute=tuple((True,) for _ in range(steps)))
    return program_from_schedule(schedule, [float(t) for t in range(steps)][::-1], ("a",))


def test_the_reference_program_begins_where_it_likes(bundles: dict[str, Bundle]) -> None:
    from ditc.runtime.pipeline import load

    with load(bundles["cached"].path, reference=True) as pipe:
        assert pipe.starts == tuple(range(STEPS))


def test_finished_samples_are_noised_with_the_noise_of_their_request(pipes: dict[str, Pipeline]) -> None:
    """As diffusers' `add_noise` does with x_T, whichever way the images are named; and begin a request of theirs."""
    pipe = pipes["cached"]
    finished = pipe.latents(LABELS, seed=9)
    x_t, _ = seeded_noise(SEED, 2, 3, (3, 8, 8))
    scheduler = diffusers.DDIMScheduler()
    t = torch.tensor([int(pipe.bundle.tables()["sampler.t"][2])])
    expected = scheduler.add_noise(torch.from_numpy(finished), torch.from_numpy(x_t), t).numpy()
    noised = pipe.noised(finished, start=2, seed=SEED, first=2)
    np.testing.assert_allclose(noised, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    alone = pipe.noised(finished[:1], start=2, seeds=[SEED])
    assert np.array_equal(alone, pipe.noised(finished, start=2, seed=SEED)[:1])
    images = pipe.images(LABELS, latents=noised, start=2, seed=SEED)
    assert images.shape == (3, 3, 8, 8)
    with pytest.raises(InputError, match="can't begin with step 3"):
        pipe.noised(finished, start=3)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_noise_levels_are_those_of_the_betas_whatever_is_predicted(prediction: Any) -> None:
    diffusion = DiffusionSpec(prediction=prediction)
    columns = sampler_table(diffusion, SamplerSpec(), 12)
    products = diffusers.DDIMScheduler().alphas_cumprod.numpy()[columns["t"].astype(int)]
    signal, noise = noise_shares(diffusion, columns)
    np.testing.assert_allclose(signal, np.sqrt(products), rtol=1e-4)
    np.testing.assert_allclose(noise, np.sqrt(1 - products), rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("sigmas", [None, "karras"])
def test_noise_levels_between_timesteps_are_those_of_the_scheduler(sigmas: Any) -> None:
    from ditc.exporter.multistep import multistep_table

    sampler = SamplerSpec(name="euler", sigmas=sigmas)
    shares = [
        noise_shares(diffusion, multistep_table(diffusion, sampler, 12))
        for diffusion in (DiffusionSpec(), DiffusionSpec(prediction="sample"))
    ]
    np.testing.assert_allclose(shares[0], shares[1], rtol=2e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_flow_is_noised_along_its_line() -> None:
    from ditc.exporter.multistep import multistep_table

    diffusion = DiffusionSpec(prediction="flow")
    signal, noise = noise_shares(diffusion, multistep_table(diffusion, SamplerSpec(name="euler", shift=3.0), 12))
    np.testing.assert_allclose(signal + noise, 1, rtol=1e-6)
    assert noise[0] == 1


def test_a_slot_that_is_written_again_before_it_is_read_is_no_obstacle(bundles: dict[str, Bundle]) -> None:
    program: Program = bundles["fp32-branches"].manifest.program
    assert len({slot for step in program.steps for slot in step.writes.values()}) == program.slots
    columns = sampler_table(DiffusionSpec(), SamplerSpec(), STEPS)
    assert first_steps(program, columns) == STARTS["fp32-branches"]
