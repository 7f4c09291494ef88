"""A bundle on a simulated GPU: device memory, one stream, CUDA graphs, the played engines of TensorRT."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from second_request import LABELS, latents

import ditc
from ditc.bundle import Bundle, open_bundle
from ditc.cli.main import run
from ditc.engines.device import CudaDevice, open_device
from ditc.engines.targets import backend_for
from ditc.engines.trt_runtime import TensorRTEngine
from ditc.errors import CheckError, DitcError, InputError
from ditc.runtime.pipeline import Pipeline
from ditc.tables import MIDPOINTS_TABLE, SCALES_TABLE

BUNDLES = (
    *("small", "learned-noise", "fixed-noise", "unguided", "fp16", "odd-addresses", "partial-rows", "per-step"),
    *("affine", "taylor", "taylor-3", "float-ends", "decoded"),
)


def relative_error(seen: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(seen - exact) / np.linalg.norm(exact))


def change_table(monkeypatch: pytest.MonkeyPatch, name: str, step: int, factor: float) -> None:
    """Let bundles be run with one row of a table multiplied by `factor`."""
    tables = Bundle.tables

    def changed(bundle: Bundle) -> dict[str, NDArray[Any]]:
        scaled = {**tables(bundle)}
        scaled[name] = scaled[name].copy()
        scaled[name][step] *= factor
        return scaled

    monkeypatch.setattr(Bundle, "tables", changed)


@pytest.mark.any_version
@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.parametrize("graphs", ["none", "step", "trajectory"])
def test_a_gpu_makes_the_images_of_the_cpu(name: str, graphs: str, built: Any) -> None:
    samples = latents(built[name], "tensorrt", graphs=graphs)
    assert relative_error(samples, latents(built[name], "cpu")) < 0.02  # FP16 against FP32 over a whole trajectory


@pytest.mark.any_version
@pytest.mark.parametrize("name", ["text", "fresh-condition", "video", "two-streams", "pixart"])
@pytest.mark.parametrize("graphs", ["none", "trajectory"])
def test_a_gpu_takes_what_models_of_a_users_own_are_given(name: str, graphs: str, built: Any) -> None:
    """Texts once per request, noise at every step, five axes, a text's stream; the last images fill no whole batch."""
    samples = []
    for target in ("cpu", "tensorrt"):
        with ditc.load(built[name], target=target, graphs=graphs, check=True) as pipe:
            for seed in (3, 4):  # graphs are captured by the second request
                samples.append(pipe.latents(pipe.bundle.examples().in_turn(seed, 6), seed=seed))
    cpu, gpu = samples[:2], samples[2:]
    assert max(relative_error(own, other) for own, other in zip(gpu, cpu, strict=True)) < 0.02


def test_the_reference_model_goes_all_the_way(built: Any, tmp_path: Path) -> None:
    for target in ("cpu", "tensorrt"):
        assert run([*f"run {built['digits']} --target {target} --labels 3,1,4,1,5 -o {tmp_path / target}".split()]) == 0
    cpu, gpu = (latents(built["digits"], target, [3, 1, 4, 1, 5]) for target in ("cpu", "tensorrt"))
    psnr = 10 * np.log10(4 / np.mean((cpu - gpu) ** 2))
    assert psnr > 40
    assert {p.name for p in (tmp_path / "cpu").iterdir()} == {p.name for p in (tmp_path / "tensorrt").iterdir()}


@pytest.mark.any_version
def test_a_decoder_gets_the_latents_on_the_device(built: Any) -> None:
    with ditc.load(built["decoded"], target="tensorrt") as gpu, ditc.load(built["decoded"], target="cpu") as cpu:
        images, expected = gpu.images(LABELS, seed=3), cpu.images(LABELS, seed=3)
        assert images.shape == (len(LABELS), 3, 8, 8)
        assert relative_error(images, expected) < 0.02
        assert np.array_equal(images, gpu.decode(gpu.latents(LABELS, seed=3)))


@pytest.mark.any_version
@pytest.mark.parametrize("name", BUNDLES)
def test_every_engine_gives_what_the_typed_form_gave_where_it_was_compiled(name: str, built: Any) -> None:
    with ditc.load(built[name], target="tensorrt", check=True) as pipe:
        differences = pipe.differences()
        assert {each.segment for each in differences} == {*pipe.program.calls, "update"}
        assert all(each.is_rounding for each in differences)
        assert np.array_equal(pipe.latents(LABELS, seed=3), latents(built[name], "tensorrt"))


@pytest.mark.any_version
def test_engines_are_compared_at_every_opening_since_they_may_be_other_ones(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    differences = Pipeline.differences
    monkeypatch.setattr(Pipeline, "differences", lambda pipe: (compared.append(pipe), differences(pipe))[1])
    for _ in range(2):
        with ditc.load(built["small"], target="tensorrt", check=True):
            pass
    assert len(compared) == 2


@pytest.mark.any_version
def test_an_engine_that_gives_something_else_is_noticed(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change_table(monkeypatch, "sampler.prev_x0", 0, 1.1)  # as if the engine of `update` took another number
    with ditc.load(built["small"], target="tensorrt") as pipe:
        assert {each.segment for each in pipe.differences() if not each.is_rounding} == {"update"}


@pytest.mark.any_version
@pytest.mark.parametrize("name", ["small", "learned-noise", "odd-addresses"])
def test_graphs_change_nothing(name: str, built: Any) -> None:
    plain = latents(built[name], "tensorrt", graphs="none")
    assert np.array_equal(latents(built[name], "tensorrt", graphs="step"), plain)
    assert np.array_equal(latents(built[name], "tensorrt", graphs="trajectory"), plain)


@pytest.mark.any_version
@pytest.mark.parametrize("table", [SCALES_TABLE, MIDPOINTS_TABLE])
@pytest.mark.parametrize("graphs", ["none", "step", "trajectory"])
def test_every_step_takes_its_own_scales(graphs: str, table: str, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong scales at one step change what comes after it and nothing before."""

    def second_request() -> list[NDArray[np.float32]]:
        with ditc.load(built["per-step"], target="tensorrt", graphs=graphs) as pipe:
            return [event.x for _ in range(2) for event in pipe.generate(LABELS, seed=3)][6:]

    right = second_request()
    change_table(monkeypatch, table, 2, 0.5)
    wrong = second_request()
    assert [np.array_equal(a, b) for a, b in zip(right, wrong, strict=True)] == [True] * 2 + [False] * 4


@pytest.mark.any_version
def test_watching_the_steps_changes_nothing(built: Any) -> None:
    with ditc.load(built["learned-noise"], target="tensorrt") as pipe:
        events = list(pipe.generate(LABELS, seed=3))
        assert np.array_equal(events[-1].x, pipe.latents(LABELS, seed=3))
        assert [event.segment for event in events] == ["full", "reuse"] * 3
        assert all(np.array_equal(a.x, b.before) for a, b in itertools.pairwise(events))
        assert events[-1].images is not None


@pytest.mark.any_version
def test_a_second_request_equals_the_first(built: Any) -> None:
    with ditc.load(built["learned-noise"], target="tensorrt") as pipe:
        first = pipe.latents(LABELS, seed=3)
        other = pipe.latents([1, 1, 1], seed=8)
        assert not np.array_equal(first, other)
        assert np.array_equal(pipe.latents(LABELS, seed=3), first)


@pytest.mark.any_version
def test_fewer_images_than_the_batch_are_filled_up_and_cut(built: Any) -> None:
    with ditc.load(built["small"], target="tensorrt") as pipe:
        whole = pipe.latents([0, 3, 4, 2], seed=3)
        part = pipe.latents([0, 3], seed=3)
        assert np.abs(part - whole[:2]).max() < 1e-5
        assert len(pipe.latents([1, 2, 3, 4, 0, 1], seed=3)) == 6


@pytest.mark.any_version
def test_a_bundle_compiled_for_tensorrt_runs_there_by_default(built: Any, tmp_path: Path) -> None:
    with ditc.load(built["fp16"]) as pipe:
        assert pipe.on_device
    shutil.rmtree(built["fp16"] / "engines")
    with pytest.raises(InputError, match=r"no engine of segment condition"), ditc.load(built.pop("fp16")):
        pass


@pytest.mark.any_version
def test_verify_compares_a_gpu_with_the_reference(built: Any, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(["verify", str(built["digits"]), "--target", "tensorrt", "--images", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["psnr_db_mean"] > 25


@pytest.mark.any_version
def test_too_many_labels_for_one_request_say_what_to_do(built: Any) -> None:
    with (
        ditc.load(built["small"], target="tensorrt") as pipe,
        pytest.raises(InputError, match=r"run 4 images at a time, found 5 images"),
    ):
        next(pipe.generate([0, 1, 2, 3, 4]))


@pytest.mark.any_version
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_an_unknown_scope_of_graphs_is_named(target: str, built: Any) -> None:
    with pytest.raises(InputError, match=r"unknown CUDA graph scope 'all'"):
        ditc.load(built["small"], target=target, graphs="all")


@pytest.mark.any_version
def test_a_model_without_an_unconditional_class_runs(built: Any, tmp_path: Path) -> None:
    bundle = open_bundle(built["unguided"])
    spec = bundle.manifest.model.model_copy(update={"null_label": None})
    manifest = bundle.manifest.model_copy(update={"model": spec})
    with Pipeline(Bundle(bundle.path, manifest), backend=backend_for("tensorrt")) as pipe:
        samples = pipe.latents(LABELS, seed=3)
    assert relative_error(samples, latents(built["unguided"], "cpu")) < 0.02


@pytest.mark.any_version
@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        *itertools.product(["small"], ["none", "step", "trajectory"]),
        *itertools.product(["learned-noise", "odd-addresses", "taylor", "decoded"], ["step"]),
    ],
)
def test_a_watched_request_goes_on_after_others_had_the_device(name: str, graphs: str, built: Any) -> None:
    with ditc.load(built[name], target="tensorrt", graphs=graphs) as pipe:
        alone = {seed: [event.x for event in pipe.generate([1], seed=seed)] for seed in (1, 2, 3)}
        watched = [pipe.generate([1], seed=seed) for seed in (1, 2)]
        for index, (*events, whole) in enumerate(zip(*watched, itertools.repeat(alone[3][-1]), strict=False)):
            assert [np.array_equal(e.x, alone[seed][index]) for e, seed in zip(events, (1, 2), strict=True)] == [
                True
            ] * 2
            if index == 2:
                abandoned = pipe.generate([4], seed=9)
                next(abandoned)
                assert np.array_equal(pipe.latents([1], seed=3), whole)
                pipe.decode(whole)
        assert index == len(alone[1]) - 1


@pytest.mark.any_version
def test_an_error_while_one_gets_its_values_back_leaves_the_others_theirs(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ditc.load(built["small"], target="tensorrt") as pipe:
        alone = [event.x for event in pipe.generate([1], seed=1)]
        watched, other = pipe.generate([1], seed=1), pipe.generate([4], seed=2)
        next(other)
        next(watched)
        upload, uploads = CudaDevice.upload, itertools.count()

        def interrupted(device: CudaDevice, array: NDArray[Any], tensor: Any) -> None:
            if next(uploads) == 2:  # some of the buffers hold the other's values by now
                raise KeyboardInterrupt
            upload(device, array, tensor)

        with monkeypatch.context() as patch:
            patch.setattr(CudaDevice, "upload", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(other)
        assert all(np.array_equal(event.x, x) for event, x in zip(watched, alone[1:], strict=True))


@pytest.mark.any_version
@pytest.mark.parametrize("graphs", ["none", "step", "trajectory"])
def test_threads_get_the_samples_of_the_same_requests_in_turn(graphs: str, built: Any) -> None:
    requests = [([n % 5, (n + 2) % 5][: 1 + n % 2], n) for n in range(24)]
    with ditc.load(built["small"], target="tensorrt", graphs=graphs) as pipe:
        pipe.latents([0], seed=0)
        expected = [pipe.latents(labels, seed=seed) for labels, seed in requests]

        def walked(number: int) -> NDArray[np.float32]:
            labels, seed = requests[number]
            if number % 3:
                return pipe.latents(labels, seed=seed)
            *_, event = pipe.generate(labels, seed=seed)
            return event.x

        with ThreadPoolExecutor(8) as pool:
            samples = list(pool.map(walked, range(len(requests))))
    assert all(np.array_equal(a, b) for a, b in zip(samples, expected, strict=True))


@pytest.mark.any_version
def test_closing_a_pipeline_waits_for_what_is_queued_before_memory_is_let_go(
    built: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every state in which a caller can leave it; the simulated GPU refuses work on memory that nobody holds."""

    def interrupted(device: CudaDevice, tensor: Any) -> None:
        raise KeyboardInterrupt

    def never_run(pipe: Pipeline) -> None:
        pass

    def refused(pipe: Pipeline) -> None:
        with pytest.raises(InputError, match="not a class"):
            pipe.latents([99])

    def half_way(pipe: Pipeline) -> None:
        next(pipe.generate([1]))

    def queued(pipe: Pipeline) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(CudaDevice, "download", interrupted)  # with which a request waits for all that it queued
            with pytest.raises(KeyboardInterrupt):
                pipe.latents([1])

    for leave in (never_run, refused, half_way, queued):
        with ditc.load(built["learned-noise"], target="tensorrt") as pipe:
            leave(pipe)
            gc.collect()  # an error that was raised refers to the buffers
        events = pipe.generate([1])
        with pytest.raises(DitcError, match="not open"):
            next(events)


@pytest.mark.any_version
def test_a_device_keeps_what_queued_work_refers_to() -> None:
    """Buffers dropped in the worst order: right after they were queued."""
    device = open_device()
    for _ in range(50):
        source, target = device.empty((64,), "float32"), device.empty((64,), "float32")
        device.upload(np.arange(64, dtype=np.float32), source)
        device.copy(source, target)
        del source
        downloaded = device.download(target)
        device.copy(target, device.empty((64,), "float32"))
        del target
        gc.collect()
        device.synchronize()
        assert np.array_equal(downloaded, np.arange(64))


@pytest.mark.any_version
def test_a_watched_request_ends_with_its_pipeline(built: Any) -> None:
    with ditc.load(built["small"], target="tensorrt") as pipe:
        watched = pipe.generate([1])
        next(watched)
    with pytest.raises(DitcError, match="closed while this request ran"):
        next(watched)


@pytest.mark.any_version
@pytest.mark.parametrize("graphs", ["step", "trajectory"])
def test_a_start_of_zeros_is_no_stale_graph(graphs: str, built: Any) -> None:
    with ditc.load(built["small"], target="tensorrt", graphs=graphs) as pipe:
        zeros = np.zeros((1, *pipe.bundle.manifest.model.latent_shape), np.float32)
        first = pipe.latents([1], noise=zeros)
        assert np.array_equal(pipe.latents([1], noise=zeros), first)


@pytest.mark.any_version
def test_samples_that_are_not_finite_are_not_blamed_on_the_graph(built: Any) -> None:
    with ditc.load(built["small"], target="tensorrt") as pipe:
        broken = np.full((1, *pipe.bundle.manifest.model.latent_shape), np.nan, np.float32)
        pipe.latents([1], noise=broken)
        with pytest.raises(CheckError, match="NaN or infinite on this target"):
            pipe.latents([1], noise=broken)


@pytest.mark.any_version
def test_a_single_request_captures_no_graph(built: Any, play: Any) -> None:
    play(fault="stale-graph")  # a graph would be found out
    with ditc.load(built["small"], target="tensorrt") as pipe:
        samples = pipe.latents(LABELS, seed=3)
    assert relative_error(samples, latents(built["small"], "cpu")) < 0.02


@pytest.mark.any_version
def test_verify_finds_a_stale_graph(built: Any, play: Any, capsys: pytest.CaptureFixture[str]) -> None:
    play(fault="stale-graph")
    assert run(["verify", str(built["small"]), "--target", "tensorrt", "--images", "2"]) == 1
    assert "does not follow its inputs" in capsys.readouterr().err


@pytest.mark.any_version
def test_a_failing_call_inside_a_capture_keeps_its_reason(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ditc.load(built["small"], target="tensorrt", graphs="step") as pipe:
        pipe.latents([1])
        enqueue, calls = TensorRTEngine.enqueue, itertools.count()

        def broken(engine: TensorRTEngine) -> None:
            if next(calls) == 3:  # behind the conditioning, the first step and its update: the first step, captured
                raise CheckError("the reason")
            enqueue(engine)

        with monkeypatch.context() as patch:
            patch.setattr(TensorRTEngine, "enqueue", broken)
            with pytest.raises(CheckError, match="the reason"):
                pipe.latents([1])
        assert np.isfinite(pipe.latents([1])).all()


def test_a_call_that_tensorrt_does_not_queue_is_one_line(built: Any, play: Any) -> None:
    play(fault="not-enqueued")
    with pytest.raises(CheckError, match=r"TensorRT failed running segment condition"):
        latents(built["small"], "tensorrt")


@pytest.mark.parametrize("graphs", ["step", "trajectory"])
def test_a_graph_that_replays_old_results_is_found(graphs: str, built: Any, play: Any) -> None:
    play(fault="stale-graph")
    with pytest.raises(
        CheckError, match=r"does not follow its inputs .it replays an old result.; run with --graphs none"
    ):
        latents(built["small"], "tensorrt", graphs=graphs)
    latents(built["small"], "tensorrt", graphs="none")


@pytest.mark.any_version
def test_a_gpu_without_memory_is_one_line(built: Any, play: Any) -> None:
    play(memory_bytes=1000)
    with pytest.raises(InputError, match=r"the GPU is out of memory allocating"):
        latents(built["small"], "tensorrt")


@pytest.mark.any_version
def test_a_failed_open_leaves_the_pipeline_closed(built: Any, play: Any) -> None:
    pipe = ditc.load(built["small"], target="tensorrt")
    play(fault="refuse")
    with pytest.raises(InputError), pipe:
        pass
    with pytest.raises(DitcError, match=r"not open"):
        pipe.latents([1])
