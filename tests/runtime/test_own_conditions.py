"""Laws of models that are asked for with more than a class, with nothing, or with samples that are no pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ditc
from ditc.bundle import Bundle, Manifest, open_bundle, seal_bundle, write_tables
from ditc.cli.main import run
from ditc.compiler.examples import examples_of
from ditc.compiler.options import CompileOptions
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import BundleError, CheckpointError, InputError
from ditc.exporter.onnx_files import load_graph
from ditc.exporter.protocol import check_decomposition
from ditc.quality.generating import fp_digest
from ditc.requests import Request
from ditc.runtime.closeness import relative_error
from ditc.runtime.executor import seeded_request
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.reference_run import GuidedRun
from ditc.spec import Condition
from ditc.speed.eager import eager_forward
from ditc.tables import sampler_columns
from tests.models.token_mixer import MODELS
from tests.runtime.test_executors import IN_HOST_MEMORY, PlayedDevice

STEPS = 6
GUIDED = {"video", "vector", "styled", "prompted", "clocked"}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"policy": "fora:2", "vc": "std"},
    "fp32": {"policy": "fora:2", "precision": "fp32", "vc": "none"},
    "branches": {"policy": "fora:2", "precision": "fp32", "vc": "none", "caches": "branches"},
    "none": {"policy": "none", "precision": "fp32", "vc": "none"},
    "fora1": {"policy": "fora:1", "precision": "fp32", "vc": "none"},
}
CACHING = [name for name in MODELS if name != "without_branches"]


@pytest.fixture(scope="session")
def compiled(compiled_once: Callable[..., Bundle], quick_options: CompileOptions) -> Callable[..., Bundle]:
    """A model of the zoo under one of SETTINGS."""

    def bundle_of(model: str, settings: str) -> Bundle:
        cfg = {"cfg": 1.5 if model in GUIDED else 1.0}
        return compiled_once(MODELS[model](), quick_options.model_copy(update={**SETTINGS[settings], **cfg}))

    return bundle_of


def first_images(bundle: Bundle, count: int = 4) -> Request:
    return bundle.examples().in_turn(0, count)


@pytest.mark.parametrize("model", MODELS)
def test_a_bundle_gives_what_torch_gives_on_the_same_noise(model: str, compiled: Callable[..., Bundle]) -> None:
    """Every step computed, guidance and conditions as in a loop around the torch model."""
    bundle, own = compiled(model, "none"), MODELS[model]()
    check_decomposition(own)
    guided = GuidedRun.of(bundle)
    request, noise, fresh = seeded_request(guided.spec, first_images(bundle), 3, 0, STEPS)
    rows = guided.guidance.row_conditions(request)
    forward = eager_forward(own, sampler_columns(bundle.tables())["t"], rows, torch.float32)
    with ditc.load(bundle.path, check=True) as pipe:
        assert relative_error(pipe.latents(first_images(bundle), seed=3), guided.last(forward, noise, fresh)) < 1e-4


@pytest.mark.parametrize("model", ["video", "prompted", "clocked"])
def test_a_schedule_with_no_reuse_gives_the_uncached_result(model: str, compiled: Callable[..., Bundle]) -> None:
    samples = []
    for settings in ("none", "fora1"):
        with ditc.load(compiled(model, settings).path) as pipe:
            samples.append(pipe.latents(first_images(pipe.bundle), seed=3))
    assert np.array_equal(*samples)


@pytest.mark.parametrize("model", ["vector", "prompted", "iterated", "clocked"])
def test_sums_made_ahead_give_what_the_branches_give(model: str, compiled: Callable[..., Bundle]) -> None:
    samples = []
    for settings in ("fp32", "branches"):
        with ditc.load(compiled(model, settings).path) as pipe:
            samples.append(pipe.latents(first_images(pipe.bundle), seed=3))
    assert relative_error(*samples) < 1e-5


@pytest.mark.parametrize("model", CACHING)
def test_permuting_the_batch_permutes_the_images(model: str, compiled: Callable[..., Bundle]) -> None:
    bundle, order = compiled(model, "int8"), np.array([2, 0, 3, 1])
    spec, request = bundle.manifest.model, first_images(bundle)
    with ditc.load(bundle.path) as pipe:
        plain = pipe.latents(request, seeds=[5, 6, 7, 8])
        permuted = pipe.latents(request.take(spec, order), seeds=(order + 5).tolist())
        alone = pipe.latents(request.take(spec, [1]), seeds=[6])
        assert np.array_equal(pipe.latents(request, seeds=[5, 6, 7, 8]), plain)
    scale = np.abs(plain).max()
    np.testing.assert_allclose(permuted, plain[order], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(alone, plain[1:2], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("model", MODELS)
def test_a_device_gives_what_the_processor_gives(model: str, compiled: Callable[..., Bundle]) -> None:
    bundle = compiled(model, "fp32" if model in CACHING else "none")
    backends = (OnnxRuntimeBackend(), PlayedDevice(IN_HOST_MEMORY))
    events, whole = [], []
    for backend in backends:
        with Pipeline(bundle, backend=backend) as pipe:
            events.append([event.x for event in pipe.generate(first_images(bundle, 3), seed=5)])
            whole.append(pipe.latents(first_images(bundle, 6), seed=5))
    assert relative_error(*whole) < 1e-5
    assert max(relative_error(one, other) for one, other in zip(*events, strict=True)) < 1e-5


@pytest.mark.parametrize(("model", "name"), [("styled", "style"), ("prompted", "text"), ("prompted", "null_text")])
def test_every_condition_changes_the_images(model: str, name: str, compiled: Callable[..., Bundle]) -> None:
    request = first_images(bundle := compiled(model, "int8"))
    other = Request(len(request), {**request.arrays, name: request.arrays[name] + np.float32(0.5)})
    with ditc.load(bundle.path) as pipe:
        assert relative_error(pipe.latents(other, seed=3), pipe.latents(request, seed=3)) > 1e-3


def test_fresh_noise_is_the_images_own_at_every_step(compiled: Callable[..., Bundle]) -> None:
    bundle = compiled("iterated", "fp32")
    spec = bundle.manifest.model
    request, _, _ = seeded_request(spec, Request(2, {}), 3, 4, STEPS)
    again, noise, _ = seeded_request(spec, Request(1, {}), 3, 5, STEPS)
    jitter = request.arrays["jitter"]
    assert jitter.shape == (STEPS, 2, *spec.conditions[0].shape)
    assert np.array_equal(jitter[:, 1:], again.arrays["jitter"])
    assert len({float(value) for value in jitter[..., 0].ravel()} | {float(noise.ravel()[0])}) == 2 * STEPS + 1


def test_a_text_is_read_once_for_a_request_and_its_tables_have_no_steps(compiled: Callable[..., Bundle]) -> None:
    bundle = compiled("prompted", "int8")
    ports = OnnxRuntimeBackend().session(bundle.segment_path("condition")).get_outputs()
    assert {port.name: port.shape[0] for port in ports} == {"modulation": "steps", "request.text": "batch"}
    full = OnnxRuntimeBackend().session(bundle.segment_path("full")).get_inputs()
    assert {port.name for port in full} >= {"request.text", "ahead.modulation"}
    assert "ahead.request.text" not in {port.name for port in full}


def test_what_depends_on_the_timestep_alone_is_a_table_and_no_weight(compiled: Callable[..., Bundle]) -> None:
    bundle, model = compiled("clocked", "int8"), MODELS["clocked"]()
    session = OnnxRuntimeBackend().session
    condition = session(bundle.segment_path("condition"))
    assert [port.name for port in condition.get_inputs()] == ["text"]
    assert [port.name for port in condition.get_outputs()] == ["request.text"]
    shapes = {port.name: port.shape for port in session(bundle.segment_path("full")).get_inputs()}
    assert shapes["step.modulation"] == [9, 64]
    assert shapes["ahead.step.modulation"] == [1, 9, 64]
    table = bundle.tables()["step.modulation"]
    expected = model.rows(torch.from_numpy(sampler_columns(bundle.tables())["t"]).float())
    np.testing.assert_allclose(table[:, [2, 5, 8]], expected.detach()[:, [2, 5, 8]], atol=1e-6)  # gates: not smoothed
    names = {name for file in bundle.path.glob("**/*.onnx") for name in load_graph(file).graph.initializers}
    assert not [name for name in names if name.startswith(("time.", "modulation."))]


def test_tables_of_timesteps_give_what_a_row_for_each_image_gives(
    compiled: Callable[..., Bundle], quick_options: CompileOptions, tmp_path: Path
) -> None:
    own = MODELS["clocked"]()
    own.by_condition = True
    for settings in ("fp32", "int8"):
        bundle = compiled("clocked", settings)
        options = quick_options.model_copy(update={**SETTINGS[settings], "cfg": 1.5})
        other = ditc.compile_model(own, tmp_path / settings, options)
        assert "modulation" in {p.name for p in OnnxRuntimeBackend().session(other.segment_path("full")).get_inputs()}
        samples = []
        for each in (bundle, other):
            with ditc.load(each.path) as pipe:
                samples.append(pipe.latents(first_images(each), seed=3))
        assert relative_error(*samples) < (1e-2 if settings == "int8" else 1e-5)


def test_equal_conditions_are_computed_once(compiled: Callable[..., Bundle]) -> None:
    bundle = compiled("styled", "fp32")
    request = first_images(bundle, 1).filled(bundle.manifest.model, 4)
    with ditc.load(bundle.path) as pipe:
        binding = type(pipe.engines["condition"].binding())  # type: ignore[union-attr]
        bound: list[int] = []
        bind = binding.bind
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                binding,
                "bind",
                lambda self, name, a: (name == "style" and bound.append(len(a)), bind(self, name, a))[1],
            )
            pipe.latents(request, seed=3)
    assert bound == [2]  # the images' one, and the null


@pytest.mark.parametrize(
    ("model", "given", "told"),
    [
        ("styled", {"labels": [1]}, "needs 'style' of every image, found 'y'"),
        (
            "styled",
            {"labels": [1], "conditions": {"style": np.zeros((1, 3))}},
            r"shape \(n, 4\), found float64 \(1, 3\)",
        ),
        ("styled", {"labels": [1, 2], "conditions": {"style": np.zeros((1, 4))}}, "style has 1, y has 2"),
        ("styled", {"labels": [1], "conditions": {"style": np.full((1, 4), np.nan)}}, "holds NaN"),
        ("styled", {"labels": [9], "conditions": {"style": np.zeros((1, 4))}}, "label 9 is not a class"),
        (
            "styled",
            {"labels": [1], "conditions": {"text": np.zeros((1, 4))}},
            "has no such condition; expected conditions",
        ),
        ("prompted", {"conditions": {"text": np.zeros((1, 6, 8))}}, "needs 'null_text' of every image"),
        ("unconditional", {}, "was asked for no image; give count=1 or more"),
        ("unconditional", {"labels": [1]}, "has no classes, found the labels"),
        ("iterated", {"count": 2, "conditions": {"jitter": np.zeros((2, 64))}}, "draws it itself"),
        ("video", {}, "no labels given"),
        (
            "video",
            {"labels": [1], "conditions": {"y": np.array([2])}},
            "give the classes as labels, or as the condition",
        ),
        ("prompted", {"conditions": [1, 2]}, "conditions must be arrays by name, found list"),
        ("prompted", {"conditions": {"text": [[1, 2], [3]]}}, "condition 'text' is no array"),
        (
            "prompted",
            {"labels": Request(1, {"y": np.array([1])})},
            "'y' was given, and token-mixer has no such condition",
        ),
        ("unconditional", {"count": "2"}, "count must be whole numbers"),
        ("unconditional", {"count": 1, "latents": np.full((1, 3, 4, 4), np.nan)}, "latents hold NaN"),
        ("video", {"labels": Request(1, {"y": np.array([1])}), "count": 3}, "says its conditions and its count itself"),
    ],
)
def test_a_request_that_does_not_fit_is_one_line(
    model: str, given: dict[str, Any], told: str, compiled: Callable[..., Bundle]
) -> None:
    with ditc.load(compiled(model, "int8").path) as pipe, pytest.raises(InputError, match=told) as refused:
        pipe.latents(**given)
    assert "\n" not in str(refused.value)


def test_a_model_without_conditions_is_asked_by_count(compiled: Callable[..., Bundle]) -> None:
    with ditc.load(compiled("unconditional", "int8").path) as pipe:
        four = pipe.latents(count=4, seed=2)
        assert np.array_equal(pipe.latents(count=2, seed=2, first=2), four[2:])
        assert len(pipe.latents(count=3, seeds=[1, 2, 3])) == 3


def test_conditions_come_from_a_file_on_the_command_line(
    compiled: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "c.npz", style=np.ones((2, 4)))
    path, out = str(compiled("styled", "int8").path), tmp_path / "o"
    assert run(["run", path, "--labels", "1,2", "--conditions", str(tmp_path / "c.npz"), "-o", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["0000-class1.png", "0001-class2.png", "grid.png"]
    assert run(["run", str(compiled("unconditional", "int8").path), "--images", "2", "-o", str(out / "u")]) == 0
    assert sorted(file.name for file in (out / "u").iterdir()) == ["0000.png", "0001.png", "grid.png"]
    capsys.readouterr()
    refused = {
        (path, "--conditions", str(tmp_path / "none.npz"), "--labels", "1"): "can't read conditions from",
        (path,): "has classes; name one for each image",
        (path, "--labels", "1", "--images", "3"): "leave --images out",
        (str(compiled("prompted", "int8").path),): "--conditions FILE with text and null_text, or --images N",
        (str(compiled("unconditional", "int8").path), "--labels", "1"): "has no classes, found the labels [1]",
    }
    for arguments, told in refused.items():
        assert run(["run", *arguments, "-o", str(tmp_path / "never")]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("command", ["inspect", "verify --images 2", "evaluate --images 4 --seeds 0", "doctor"])
@pytest.mark.parametrize("model", ["prompted", "clocked", "iterated", "without_branches", "vector"])
def test_every_command_takes_such_a_bundle(
    model: str, command: str, compiled: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = command.split()
    assert run([name, str(compiled(model, "int8" if model in CACHING else "none").path), *rest]) == 0
    told = capsys.readouterr().out
    if name == "inspect" and model != "vector":
        conditions = {
            "prompted": "text (6, 8), null given",
            "clocked": "text (6, 8), null given",
            "iterated": "jitter (64), fresh at every step",
        }
        assert conditions.get(model, "model") in told


def test_what_typical_conditions_hold_is_assumed_aloud_or_given(
    tmp_path: Path, quick_options: CompileOptions, compiled: Callable[..., Bundle]
) -> None:
    assert any("--conditions" in line for line in compiled("prompted", "int8").manifest.model.assumptions)
    assert compiled("styled", "int8").manifest.model.assumptions == ()
    options = quick_options.model_copy(update={**SETTINGS["fp32"], "cfg": 1.5})
    given = {"text": np.ones((3, 6, 8)), "null_text": np.zeros((3, 6, 8))}
    bundle = ditc.compile_model(MODELS["prompted"](), tmp_path / "b", options, conditions=given)
    assert bundle.manifest.model.assumptions == ()
    assert np.array_equal(bundle.examples().in_turn(2, 2).arrays["text"], given["text"][:2].astype(np.float32))
    with pytest.raises(InputError, match=r"needs examples of 'text' and 'null_text', found text of 3 rows"):
        ditc.compile_model(MODELS["prompted"](), tmp_path / "c", options, conditions={"text": given["text"]})
    assert not (tmp_path / "c").exists()


PORTS = ["t", "x", "out", "y", "scales", "reuse.rows", "ahead.c", "cache.c", "request.c", "step.c"]


@pytest.mark.parametrize("name", PORTS)
def test_a_table_that_is_called_as_a_port_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["video"]()
    condition = model.condition
    monkeypatch.setattr(model, "condition", lambda *given: {name: condition(*given)["modulation"]})
    monkeypatch.setattr(model, "unpack", lambda step: {"modulation": step[name]})
    with pytest.raises(CheckpointError, match=rf"a table is called '{name}', as a port of segments is"):
        check_decomposition(model)


def test_drawn_examples_of_two_conditions_are_not_the_same() -> None:
    examples, _ = examples_of(MODELS["prompted"]())
    assert not np.allclose(examples.arrays["text"], examples.arrays["null_text"])


def test_nothing_to_cache_and_nothing_to_quantize_is_said(tmp_path: Path, quick_options: CompileOptions) -> None:
    for changes in ({"policy": "fora:2", "precision": "fp32"}, {"policy": "none"}):
        with pytest.raises(InputError, match="has no branches, so there is nothing to reuse and nothing to quantize"):
            ditc.compile_model(MODELS["without_branches"](), tmp_path / "b", quick_options.model_copy(update=changes))


def test_a_file_that_holds_no_conditions_is_one_line(
    compiled: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "array.npy", np.ones((2, 4)))
    np.savez_compressed(tmp_path / "damaged.npz", style=np.random.default_rng(0).standard_normal((64, 4)))
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[60:300] = bytes(byte ^ 0x5A for byte in content[60:300])
    (tmp_path / "damaged.npz").write_bytes(content)
    for file, told in {"array.npy": "holds one array without a name", "damaged.npz": "can't read conditions"}.items():
        arguments = ["--labels", "1", "--conditions", str(tmp_path / file), "-o", str(tmp_path / "o")]
        assert run(["run", str(compiled("styled", "int8").path), *arguments]) == 2
        assert told in capsys.readouterr().err


def test_kept_images_are_those_of_the_same_conditions(compiled: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = compiled("styled", "fp32")
    folder = Path(shutil.copytree(bundle.path, tmp_path / "b"))
    write_tables(folder / "conditions.safetensors", {"style": np.ones((2, 4), np.float32)})
    seal_bundle(folder, bundle.manifest)
    assert fp_digest(open_bundle(folder)) != fp_digest(bundle)


def test_conditions_of_another_type_than_the_segment_takes_are_refused(
    compiled: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = compiled("styled", "fp32")
    folder = Path(shutil.copytree(bundle.path, tmp_path / "b"))
    write_tables(folder / "conditions.safetensors", {"style": np.ones((2, 4), np.int64)})
    whole = Condition(name="style", dtype="int64", shape=(4,), classes=5, null=0)
    model = bundle.manifest.model.model_copy(update={"conditions": (whole,)})
    seal_bundle(folder, bundle.manifest.model_copy(update={"model": model}))
    with pytest.raises(BundleError, match="is given 'style' as int64, and the segment condition takes float32"):
        ditc.load(folder).__enter__()


def test_a_file_of_conditions_that_nobody_asks_for_is_refused(compiled: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = compiled("unconditional", "int8")
    folder = Path(shutil.copytree(bundle.path, tmp_path / "b"))
    write_tables(folder / "conditions.safetensors", {"style": np.ones((2, 4), np.float32)})
    seal_bundle(folder, bundle.manifest)
    with pytest.raises(BundleError, match=r"lists 'conditions\.safetensors', and the model is asked for"):
        open_bundle(folder)


def test_a_picture_may_be_copied_with_another_height(make_small_model: Callable[..., Any]) -> None:
    spec = make_small_model().spec
    assert (spec.height, spec.width) == (8, 8)
    assert spec.model_copy(update={"height": 6}).space == (6, 8)
    assert spec.model_copy(update={"height": 6, "width": 4}).model_dump()["width"] == 4


def test_examples_that_do_not_fit_their_bundle_are_refused(compiled: Callable[..., Bundle], tmp_path: Path) -> None:
    for name, shape in {"other": (2, 5), "empty": (0, 4)}.items():
        folder = Path(shutil.copytree(compiled("styled", "int8").path, tmp_path / name))
        write_tables(folder / "conditions.safetensors", {"style": np.zeros(shape, np.float32)})
        seal_bundle(folder, Manifest.model_validate_json((folder / "manifest.json").read_bytes()))
        with pytest.raises(BundleError, match=r"contradicts itself: conditions\.safetensors"):
            open_bundle(folder)
