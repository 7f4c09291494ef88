"""Fingerprints: a machine that gives what the compiling one gave passes, one that gives something else is noticed."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import ditc.runtime.pipeline as pipeline
from ditc.bundle import Bundle, open_bundle, read_tables, seal_bundle, write_tables
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.engines.backend import runnable_path
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import BundleError, CheckError, DitcError, InputError
from ditc.exporter.dit import DiT
from ditc.exporter.onnx_files import load_graph, save_graph
from ditc.runtime.fingerprint import (
    FINGERPRINT,
    PORTABLE,
    TYPED,
    Fingerprint,
    moved_samples,
    observer,
    steps_to_keep,
    types_of_calls,
)
from ditc.runtime.pipeline import load

KINDS = ["cached", "per-step", "float-ends", "fp32-cached", "fp32-branches", "fp32-taylor", "fp32-taylor-3"]
KINDS += ["fp32-affine", "fp32-none", "streams", "streams-rows"]
WEIGHT_AXES = 2


@pytest.fixture(autouse=True)
def _nothing_checked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHECKED", set())


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Bundle], Path]:
    def copied(bundle: Bundle) -> Path:
        return Path(shutil.copytree(bundle.path, tmp_path / "b", dirs_exist_ok=True))

    return copied


def weights_of(segment: Path) -> list[str]:
    """The weights of the linear layers of an ONNX file."""
    initializers = load_graph(segment).graph.initializers
    return [name for name, value in initializers.items() if len(value.shape or ()) == WEIGHT_AXES]


def with_fault(bundle: Bundle, folder: Path, segment: str, weight: str) -> None:
    """The bundle in `folder`, whose large weights of one layer are cut, as a product that saturates would have it."""
    source, place = (Bundle(path, bundle.manifest).segment_path(segment) for path in (bundle.path, folder))
    name = runnable_path(source, "onnxrt").name
    model = load_graph(source.with_name(name))
    value = model.graph.initializers[weight]
    assert value.const_value is not None
    numbers = value.const_value.numpy()
    bound = np.asarray(np.abs(numbers.astype(np.float32)).max() / 2, numbers.dtype)
    value.const_value = ir.tensor(np.clip(numbers, -bound, bound), name=weight)
    save_graph(model, place.with_name(name))
    seal_bundle(folder, bundle.manifest)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_where_a_bundle_was_compiled_nothing_differs(kind: str, threads: int, bundles: dict[str, Bundle]) -> None:
    with load(bundles[kind].path, threads=threads, check=True) as pipe:
        differences = pipe.differences()
    assert [each for each in differences if not each.is_rounding] == []
    assert {each.segment for each in differences} == {*bundles[kind].manifest.program.calls, "update"}


@pytest.mark.parametrize("kind", ["cached", "float-ends"])
def test_what_gpus_run_is_held_to_what_that_form_gave(kind: str, bundles: dict[str, Bundle]) -> None:
    """ONNX Runtime plays the GPU: the typed form in the same types."""
    fingerprint = Fingerprint.of(bundles[kind].path)
    with load(bundles[kind].path, backend=OnnxRuntimeBackend(name="trt")) as pipe:
        outputs = observer(pipe.executor, fingerprint.request, None)(fingerprint.samples)
    calls = {call for call, _ in outputs}
    assert all(each.error == 0 for each in fingerprint.forms[TYPED].differences(outputs, dict.fromkeys(calls, "f16")))
    assert any(
        each.error > 0 for each in fingerprint.forms[PORTABLE].differences(outputs, dict.fromkeys(calls, "bf16"))
    )


@pytest.fixture(scope="module")
def dynamic(
    compiled_once: Callable[..., Bundle], make_small_model: Callable[..., DiT], quick_options: CompileOptions
) -> Bundle:
    """A bundle whose activation scales are measured as the tensors come."""
    changes = {"scales": "dynamic", "policy": "fora:2", "vc": "none"}
    return compiled_once(make_small_model(), quick_options.model_copy(update=changes))


@pytest.mark.parametrize("form", ["onnxrt", "none of its own"])
def test_scales_measured_at_run_time_are_held_to_what_the_form_that_runs_gave(form: str, dynamic: Bundle) -> None:
    """ONNX Runtime's own form rounds them to another grid than the portable one, which OpenVINO runs."""
    with load(dynamic.path, backend=OnnxRuntimeBackend(1, name=form), check=True) as pipe:
        assert all(each.is_rounding for each in pipe.differences())
    forms = Fingerprint.of(dynamic.path).forms
    others = forms["onnxrt"].differences(forms[PORTABLE].outputs, dict.fromkeys(forms[PORTABLE].tolerances, "f32"))
    assert any(not each.is_rounding for each in others)


def test_one_form_is_kept_of_what_gives_the_same_numbers(bundles: dict[str, Bundle]) -> None:
    assert set(Fingerprint.of(bundles["cached"].path).forms) == {PORTABLE, TYPED}


@pytest.fixture(scope="module")
def unguided(
    compiled_once: Callable[..., Bundle], make_small_model: Callable[..., DiT], quick_options: CompileOptions
) -> Bundle:
    """A bundle of which few roundings are near a change, so that three small moves see none at some steps."""
    return compiled_once(make_small_model(), quick_options.model_copy(update={"policy": "fora:2", "cfg": 1.0}))


@pytest.mark.parametrize("kind", ["unguided", "cached", "float-ends", "fp32-cached"])
def test_no_other_rounding_goes_further_than_those_that_were_tried(
    kind: str, bundles: dict[str, Bundle], unguided: Bundle
) -> None:
    """A rounding point that few moves cross is crossed by some."""
    bundle = unguided if kind == "unguided" else bundles[kind]
    fingerprint = Fingerprint.of(bundle.path)
    with load(bundle.path, threads=1) as pipe:
        observe = observer(pipe.executor, fingerprint.request, None)
        for size, number in itertools.product((1e-6, 1e-5), range(1000, 1020)):
            outputs = observe(moved_samples(fingerprint.samples, size, number))
            types = dict.fromkeys((call for call, _ in outputs), "f32")
            over = [each for each in fingerprint.forms[PORTABLE].differences(outputs, types) if not each.is_rounding]
            assert over == []


def test_a_call_is_held_to_the_type_that_its_engine_and_its_caches_are_computed_in(bundles: dict[str, Bundle]) -> None:
    program = bundles["cached"].manifest.program
    types = types_of_calls(program, {"condition": "f32", "full": "bf16", "reuse": "f32"})
    assert types.pop("condition") == "f32"
    assert set(types.values()) == {"bf16"}  # `reuse` reads what `full` wrote
    assert set(types_of_calls(program, {"condition": "f32", "full": "f32", "reuse": "bf16"}).items()) == {
        ("condition", "f32"),
        *((f"{step.segment}@{step.index}", "f32" if step.segment == "full" else "bf16") for step in program.steps),
        *((f"update@{step.index}", "f32" if step.segment == "full" else "bf16") for step in program.steps),
    }


@pytest.mark.parametrize("kind", ["cached", "fp32-cached"])
def test_a_fault_of_any_one_layer_is_noticed(
    kind: str, bundles: dict[str, Bundle], copy: Callable[[Bundle], Path]
) -> None:
    bundle = bundles[kind]
    for segment in ("condition", "full", "reuse"):
        for weight in weights_of(runnable_path(bundle.segment_path(segment), "onnxrt")):
            folder = copy(bundle)
            with_fault(bundle, folder, segment, weight)
            with load(folder) as pipe:
                first = next(each for each in pipe.differences() if not each.is_rounding)
            assert first.segment == segment, weight


def test_load_with_check_names_the_segment_and_how_much(
    bundles: dict[str, Bundle], copy: Callable[[Bundle], Path]
) -> None:
    bundle, folder = bundles["cached"], copy(bundles["cached"])
    segment = runnable_path(bundle.segment_path("full"), "onnxrt")
    with_fault(bundle, folder, "full", weights_of(segment)[-1])
    words = r"segment full of .* gives something else here .* differs by \S+ \(relative L2\), expected at most \d\S+;"
    for _ in range(2):  # one that failed is compared again
        with pytest.raises(CheckError, match=words), load(folder, check=True):
            pass
    with load(folder) as pipe:  # nobody asked
        assert pipe.images([0]).shape == (1, 3, 8, 8)


def test_doctor_compares_a_bundle_and_fails_where_it_differs(
    bundles: dict[str, Bundle], copy: Callable[[Bundle], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", str(bundles["cached"].path), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert all(rows[f"segment {name}"]["works"] for name in ("condition", "full", "reuse", "update"))
    assert "(relative L2), expected at most" in rows["segment full"]["detail"]
    folder = copy(bundles["cached"])
    with_fault(bundles["cached"], folder, "reuse", weights_of(bundles["cached"].segment_path("reuse"))[0])
    assert run(["doctor", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "no   segment reuse" in printed.out
    assert "yes  segment full" in printed.out
    assert "segment reuse is the first that does" in printed.err


def test_a_bundle_without_a_fingerprint_says_so(
    bundles: dict[str, Bundle], copy: Callable[[Bundle], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(bundles["cached"])
    (folder / FINGERPRINT).unlink()
    seal_bundle(folder, bundles["cached"].manifest)
    assert run(["doctor", str(folder)]) == 2
    assert "has no fingerprint" in capsys.readouterr().err
    with pytest.raises(BundleError, match="has no fingerprint"), load(folder, check=True):
        pass
    with load(folder) as pipe:
        assert pipe.images([0]).shape == (1, 3, 8, 8)


def without(start: str) -> Callable[[Any], Any]:
    return lambda tables: [tables.pop(name) for name in list(tables) if name.startswith(start)]


def changed(start: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda tables: tables.update({name: change(tables[name]) for name in tables if name.startswith(start)})


@pytest.mark.parametrize(
    "change",
    [
        *(without(start) for start in ("label", "sample/", "sample/0", "sample/6", "output/", "tolerance/")),
        *(without(f"{kind}/{form}/") for kind in ("output", "tolerance") for form in ("portable", "portable/full@0")),
        changed("label", lambda label: label + 99),
        changed("label", lambda label: label - 99),
        changed("label", lambda label: label[:0]),
        changed("sample/", lambda sample: sample[:, :2]),
        changed("sample/", lambda sample: sample.astype(np.float64)),
        changed("tolerance/", lambda tolerance: tolerance[:0]),
        changed("output/", lambda values: values[:-1]),
        lambda tables: tables.update({"sample/x": np.zeros(1)}),
        lambda tables: tables.update({"sample/-1": tables["sample/0"]}),
        lambda tables: tables.update({"sample/99": tables["sample/0"]}),
    ],
)
def test_a_fingerprint_that_is_none_is_one_line(
    change: Callable[[Any], Any], bundles: dict[str, Bundle], copy: Callable[[Bundle], Path]
) -> None:
    folder = copy(bundles["cached"])
    tables = dict(read_tables(folder / FINGERPRINT))
    change(tables)
    write_tables(folder / FINGERPRINT, tables)
    seal_bundle(folder, bundles["cached"].manifest)
    with pytest.raises(BundleError, match=r"is no fingerprint|does not fit its bundle"), load(folder, check=True):
        pass


def test_a_fingerprint_of_another_bundle_is_refused(bundles: dict[str, Bundle], copy: Callable[[Bundle], Path]) -> None:
    folder = copy(bundles["cached"])
    shutil.copyfile(bundles["fp32-taylor"].path / FINGERPRINT, folder / FINGERPRINT)
    seal_bundle(folder, bundles["cached"].manifest)
    with pytest.raises(BundleError, match="does not fit its bundle"), load(folder, check=True):
        pass


def test_a_bundle_is_compared_once_per_process_and_backend(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    differences = pipeline.Pipeline.differences
    monkeypatch.setattr(
        pipeline.Pipeline, "differences", lambda pipe: (compared.append(pipe.backend.threads), differences(pipe))[1]
    )
    for threads in (1, 1, 2, 1):
        with load(bundles["cached"].path, threads=threads, check=True):
            pass
    assert compared == [1, 2]


def test_a_comparison_without_the_compensation_does_not_stand_for_one_with_it(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    differences = pipeline.Pipeline.differences
    monkeypatch.setattr(
        pipeline.Pipeline,
        "differences",
        lambda pipe: compared.append(len(outcome := differences(pipe))) or outcome,  # type: ignore[func-returns-value]
    )
    for compensation in (False, True, False):
        with load(bundles["cached"].path, compensation=compensation, check=True):
            pass
    without_it, with_it = compared
    assert without_it < with_it


def test_without_the_compensation_the_segments_are_compared_all_the_same(bundles: dict[str, Bundle]) -> None:
    with load(bundles["cached"].path, compensation=False) as pipe:
        assert all(each.is_rounding for each in pipe.differences())


def test_the_reference_has_no_fingerprint(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(InputError, match="not of the reference"):
        load(bundles["cached"].path, reference=True, check=True)


def test_a_comparison_changes_no_image(bundles: dict[str, Bundle]) -> None:
    with load(bundles["per-step"].path) as pipe:
        before = pipe.images([0, 1], seed=4)
        pipe.differences()
        assert np.array_equal(pipe.images([0, 1], seed=4), before)


def test_every_segment_is_run_at_a_step_whose_caches_are_there(
    bundles: dict[str, Bundle],
    partial_schedule: Path,
    compiled_once: Callable[..., Bundle],
    quick_options: CompileOptions,
    make_small_model: Callable[..., DiT],
) -> None:
    partial = compiled_once(make_small_model(), quick_options.model_copy(update={"policy": str(partial_schedule)}))
    for program in [partial.manifest.program, *(bundles[kind].manifest.program for kind in KINDS)]:
        sampled, holds = steps_to_keep(program), dict[int, int]()
        writers: dict[int, int] = {}
        for step in program.steps:
            if step.index in sampled:
                assert all(holds[slot] == writers[slot] for slot in step.reads.values())
                holds |= dict.fromkeys(step.writes.values(), step.index)
            writers |= dict.fromkeys(step.writes.values(), step.index)
        assert {program.steps[index].segment for index in sampled} == {plan.name for plan in program.segments}


def test_the_digest_is_of_the_manifest(bundles: dict[str, Bundle], copy: Callable[[Bundle], Path]) -> None:
    folder = copy(bundles["cached"])
    assert open_bundle(folder).digest == bundles["cached"].digest
    (folder / FINGERPRINT).unlink()
    seal_bundle(folder, bundles["cached"].manifest)
    assert open_bundle(folder).digest != bundles["cached"].digest


def test_what_rounding_may_make_anything_of_is_never_taken_for_the_same(
    bundles: dict[str, Bundle], copy: Callable[[Bundle], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(bundles["cached"])
    tables = dict(read_tables(folder / FINGERPRINT))
    tables |= {name: np.array([np.inf]) for name in tables if name.startswith("tolerance/") and "/full@" in name}
    write_tables(folder / FINGERPRINT, tables)
    seal_bundle(folder, bundles["cached"].manifest)
    with pytest.raises(CheckError, match="so nothing can be held to it"), load(folder, check=True):
        pass
    assert run(["doctor", str(folder)]) == 1
    assert "no   segment full" in capsys.readouterr().out


def test_a_pipeline_that_failed_its_check_is_closed(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.Pipeline, "differences", lambda _: (_ for _ in ()).throw(CheckError("no")))
    pipe = load(bundles["cached"].path, check=True)
    with pytest.raises(CheckError), pipe:
        pass
    assert pipe.engines == {}
    with pytest.raises(DitcError, match="not open"):
        pipe.images([0])
