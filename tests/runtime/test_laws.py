"""The laws of the trajectory, on compiled bundles of a small model."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import pytest

from ditc.bundle import Bundle
from ditc.engines.backend import Engine
from ditc.engines.memory_needs import memory_needs
from ditc.errors import DitcError, InputError
from ditc.exporter.onnx_files import load_graph
from ditc.runtime.closeness import relative_error
from ditc.runtime.executor import seeded_noise
from ditc.runtime.host_executor import HostExecutor
from ditc.runtime.pipeline import Pipeline, load

LABELS = [0, 3, 1, 4]
MODELS = ["", "streams-"]  # what the names of a model's bundles begin with
KINDS = ["cached", "per-step", "float-ends", "fp32-cached", "fp32-taylor", "fp32-taylor-3", "fp32-affine"]
KINDS += ["rotated", "streams", "streams-rows", "fp32-l2c", "l2c"]


def noise_for(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8), dtype=np.float32)


@pytest.mark.parametrize("model", MODELS)
def test_a_schedule_with_no_reuse_gives_the_uncached_result_bit_for_bit(pipes: dict[str, Pipeline], model: str) -> None:
    fora1, none = (pipes[f"{model}{name}"].latents(LABELS, seed=3) for name in ("fp32-fora1", "fp32-none"))
    assert np.array_equal(fora1, none)


@pytest.mark.parametrize("model", MODELS)
def test_a_schedule_with_reuse_gives_another_result(pipes: dict[str, Pipeline], model: str) -> None:
    cached, none = (pipes[f"{model}{name}"].latents(LABELS, seed=3) for name in ("fp32-cached", "fp32-none"))
    assert not np.allclose(cached, none)


@pytest.mark.parametrize("name", KINDS)
def test_permuting_the_batch_permutes_the_images(pipes: dict[str, Pipeline], name: str) -> None:
    order = [2, 0, 3, 1]
    noise = noise_for(4)
    plain = pipes[name].latents(LABELS, noise=noise)
    permuted = pipes[name].latents([LABELS[i] for i in order], noise=noise[order])
    np.testing.assert_allclose(permuted, plain[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_an_image_does_not_depend_on_its_neighbours(pipes: dict[str, Pipeline], name: str) -> None:
    noise = noise_for(4)
    together = pipes[name].latents(LABELS, noise=noise)
    alone = pipes[name].latents(LABELS[1:2], noise=noise[1:2])
    np.testing.assert_allclose(alone, together[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cached", "streams-rows", "l2c"])
def test_the_second_request_with_the_same_seed_equals_the_first(pipes: dict[str, Pipeline], name: str) -> None:
    first = pipes[name].images(LABELS, seed=5)
    pipes[name].images([1, 2], seed=6)
    assert np.array_equal(pipes[name].images(LABELS, seed=5), first)


@pytest.mark.parametrize("name", ["cached", "streams-rows", "l2c"])
def test_a_request_after_an_abandoned_one_equals_a_fresh_one(pipes: dict[str, Pipeline], name: str) -> None:
    first = pipes[name].images(LABELS, seed=5)
    abandoned = pipes[name].generate([4, 4, 4, 4], seed=9)
    for _ in range(3):
        next(abandoned)
    abandoned.close()
    assert np.array_equal(pipes[name].images(LABELS, seed=5), first)


def lost() -> None:
    raise RuntimeError("device lost")


def test_a_request_after_a_failed_one_equals_a_fresh_one(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(bundles["cached"].path) as pipe:
        first = pipe.images(LABELS, seed=5)
        binding = type(cast(Engine, pipe.engines["reuse"]).binding())
        run, calls = binding.run, itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr(binding, "run", lambda self: lost() if next(calls) == 4 else run(self))
            with pytest.raises(RuntimeError, match="device lost"):
                pipe.images(LABELS, seed=8)
        assert np.array_equal(pipe.images(LABELS, seed=5), first)


@pytest.mark.parametrize("name", ["scales", "midpoints"])
def test_every_step_takes_its_own_row_of_a_table(bundles: dict[str, Bundle], name: str) -> None:
    """Wrong scales at one step change what comes after it, and nothing before."""
    with load(bundles["per-step"].path) as pipe:
        right = [event.x for event in pipe.generate(LABELS, seed=5)]
        assert isinstance(pipe.executor, HostExecutor)
        pipe.executor.step_inputs[name][2] *= 0.5
        wrong = [event.x for event in pipe.generate(LABELS, seed=5)]
    assert [np.array_equal(a, b) for a, b in zip(right, wrong, strict=True)] == [True] * 2 + [False] * 4


def test_the_reference_of_a_bundle_with_step_scales_takes_none(bundles: dict[str, Bundle]) -> None:
    with load(bundles["per-step"].path, reference=True) as plain, load(bundles["cached"].path, reference=True) as same:
        assert np.array_equal(plain.latents(LABELS, seed=3), same.latents(LABELS, seed=3))


def test_a_step_in_floating_point_has_no_error_of_int8(bundles: dict[str, Bundle]) -> None:
    """At the first step, where nothing has diverged. What is left is of the conditioning's weights, stored in FP16."""
    first = {}
    for name in ("float-ends", "cached", "fp32-none"):
        with load(bundles[name].path) as pipe:
            first[name] = next(iter(pipe.generate(LABELS, seed=5))).x
    in_float, int8 = (relative_error(first[name], first["fp32-none"]) for name in ("float-ends", "cached"))
    assert in_float < 2e-4 < int8 / 5


def test_two_requests_can_be_walked_in_turn(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["cached"]
    alone = [pipe.latents(LABELS, seed=seed) for seed in (1, 2)]
    for events in zip(pipe.generate(LABELS, seed=1), pipe.generate(LABELS, seed=2), strict=True):
        last = events
    assert np.array_equal(last[0].x, alone[0])
    assert np.array_equal(last[1].x, alone[1])


def guided(bundle: Bundle, guidance: float) -> list[np.ndarray]:
    """Return the samples after each step of a bundle's segments under another guidance weight."""
    spec, program = bundle.manifest.model, bundle.manifest.program
    with load(bundle.path) as pipe:
        executor = HostExecutor(spec, program, bundle.tables(), cast(Any, pipe.engines), guidance)
        return [event.x for event in executor.run(pipe.request([1, 2]), *seeded_noise(0, 0, 2, spec.latent_shape))]


@pytest.mark.parametrize("name", ["fp32-cached", "streams-fp32-branches", "fp32-l2c"])
def test_conditional_and_unconditional_halves_share_no_cache(bundles: dict[str, Bundle], name: str) -> None:
    """With weight close to 1 guidance nearly vanishes, so the image nears that of the conditional half alone."""
    bundle = bundles[name]
    alone = guided(bundle, 1.0)[-1]
    assert relative_error(guided(bundle, 1.0 + 1e-6)[-1], alone) < 1e-4
    assert relative_error(guided(bundle, 4.0)[-1], alone) > 1e-2


def test_guidance_leaves_the_unguided_channel_conditional(bundles: dict[str, Bundle]) -> None:
    """The original release guides three of four channels, this model two of three: the last is conditional."""
    conditional, strong = (guided(bundles["fp32-none"], weight)[0] for weight in (1.0, 4.0))
    np.testing.assert_allclose(strong[:, 2], conditional[:, 2], atol=1e-5)
    assert not np.allclose(strong[:, :2], conditional[:, :2], atol=1e-3)


@pytest.mark.parametrize(("model", "slots"), [("", 4), ("streams-", 8)])
def test_sums_made_ahead_give_what_the_branches_give(
    bundles: dict[str, Bundle], pipes: dict[str, Pipeline], model: str, slots: int
) -> None:
    """The same trajectory, one sum kept for each step that reuses, up to the order of the additions."""
    names = [f"{model}{name}" for name in ("fp32-cached", "fp32-branches")]
    sums, branches = (bundles[name].manifest.program for name in names)
    assert (sums.slots, branches.slots) == (1, slots)
    for events in zip(*(pipes[name].generate(LABELS, seed=3) for name in names), strict=True):
        assert relative_error(events[0].x, events[1].x) < 1e-5


def test_a_step_that_reuses_sums_adds_once(bundles: dict[str, Bundle]) -> None:
    model = load_graph(bundles["fp32-cached"].segment_path("reuse"))
    assert [value.name for value in model.graph.inputs] == ["x", "modulation", "cache.ahead"]
    operators = [node.op_type for node in model.graph]
    assert operators.count("Mul") == 1  # the final layer's scale
    assert operators.count("Add") == 4  # positions, the sum, the final layer's shift and bias


def test_the_residual_is_applied_once_per_branch(bundles: dict[str, Bundle]) -> None:
    """`reuse` adds every cached branch to the stream once: two operations a branch, none doubled."""
    nodes = [node.op_type for node in load_graph(bundles["fp32-branches"].segment_path("reuse")).graph]
    branches = len(bundles["fp32-branches"].manifest.model.branches)
    assert nodes.count("Mul") == branches + 1  # each gate, and the final layer's scale
    assert nodes.count("MatMul") == 1  # the final layer


def test_a_step_that_reuses_everything_of_two_streams_knows_no_text(bundles: dict[str, Bundle]) -> None:
    """Nothing of the text is an input, computed or cached; both outputs to the image are read, each with its gate."""
    graph = load_graph(bundles["streams-fp32-branches"].segment_path("reuse")).graph
    names = [str(value.name) for value in graph.inputs]
    assert not [name for name in names if "text" in name or name == "tokens"]
    assert "cache.blocks.0.attn.alone" in names
    assert [node.op_type for node in graph].count("MatMul") == 1  # the final layer


def test_slots_have_the_shapes_of_what_they_hold(bundles: dict[str, Bundle]) -> None:
    with load(bundles["streams-rows"].path) as pipe:
        assert isinstance(pipe.executor, HostExecutor)
        slots = pipe.executor._lent(4).slots
        assert {buffer.shape for buffer in slots} == {(8, 16, 32), (8, 5, 32)}
        assert memory_needs(pipe.bundle).caches == 2 * sum(buffer.size for buffer in slots)  # FP16 on a device


def test_noise_of_an_image_depends_on_seed_and_place_alone() -> None:
    four, _ = seeded_noise(3, 0, 4, (1, 2, 2))
    last, _ = seeded_noise(3, 3, 1, (1, 2, 2))
    assert np.array_equal(four[3:], last)
    assert not np.array_equal(four[0], four[1])


def test_batches_of_the_bundle_size_give_the_images_of_one_batch(pipes: dict[str, Pipeline]) -> None:
    labels = [0, 1, 2, 3, 4, 0]
    split = pipes["fp32-cached"].latents(labels, seed=2)
    whole = list(pipes["fp32-cached"].generate(labels, seed=2))[-1].x
    np.testing.assert_allclose(split, whole, atol=1e-5)


def test_images_are_in_range_and_events_count_the_steps(pipes: dict[str, Pipeline]) -> None:
    events = list(pipes["cached"].generate(LABELS, seed=0))
    assert [event.index for event in events] == list(range(6))
    assert [event.segment for event in events] == ["full", "reuse"] * 3
    assert all(event.images is None for event in events[:-1])
    images = events[-1].images
    assert images is not None
    assert images.shape == (4, 3, 8, 8)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1
    assert all(event.seconds >= event.engine_seconds > 0 for event in events)


def test_the_samples_of_events_stay_what_they_were(pipes: dict[str, Pipeline]) -> None:
    events = list(pipes["cached"].generate(LABELS, seed=0))
    for earlier, later in itertools.pairwise(events):
        assert np.array_equal(earlier.x, later.before)
        assert not np.array_equal(earlier.x, later.x)


def test_a_wrong_label_is_refused_in_one_line(pipes: dict[str, Pipeline]) -> None:
    with pytest.raises(InputError, match="label 5 is not a class of small: expected 0 to 4"):
        pipes["cached"].images([1, 5])


def test_noise_of_the_wrong_shape_is_refused(pipes: dict[str, Pipeline]) -> None:
    with pytest.raises(InputError, match="noise must have"):
        pipes["cached"].images([1, 2], noise=noise_for(3)[:, :2])


def test_more_noise_than_labels_is_refused(pipes: dict[str, Pipeline]) -> None:
    with pytest.raises(InputError, match="2 images, found 3"):
        pipes["cached"].images([0, 1], noise=noise_for(3))


def test_a_pipeline_that_is_not_open_says_how_to_open_it(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(DitcError, match=r"with ditc\.load"):
        load(bundles["cached"].path).images([1])


def test_an_image_is_the_same_whichever_request_it_comes_in(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["fp32-cached"]
    whole = pipe.images([0, 1, 2, 3, 4, 0], seed=3)
    np.testing.assert_array_equal(pipe.images([2, 3, 4], seed=3, first=2), whole[2:5])
    np.testing.assert_array_equal(pipe.latents([2, 3, 4], seed=3, first=2), pipe.latents([0, 1, 2, 3, 4], seed=3)[2:])
