"""The veto: noise and change of every branch at every step, against the definitions written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from onnx_ir import Model

import ditc
from ditc.bundle import Bundle
from ditc.cli.judging import print_veto
from ditc.cli.main import run
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import InputError
from ditc.exporter.onnx_files import load_graph
from ditc.passes import program_from_schedule
from ditc.program import CONDITION, Program
from ditc.quality.branch_probe import open_branch_probe
from ditc.quality.options import VetoOptions
from ditc.quality.veto import reuse_sources, veto_of
from ditc.quantize.segment_outputs import branch_outputs
from ditc.runtime.closeness import relative_error
from ditc.runtime.conditioning import condition_tables
from ditc.schedule import CacheSchedule

STEPS = 6


def walked(bundle: Bundle, branch: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(FP, INT8) outputs of one branch at every step of one FP image."""
    spec, tables = bundle.manifest.model, bundle.tables()
    conditions = {"y": np.array([0, spec.null_label], np.int64)}
    sides = []
    for place, own in ((bundle.reference_path, {}), (bundle.segment_path, tables)):
        session = OnnxRuntimeBackend().session(place(CONDITION))
        conditioning = condition_tables(session, tables["sampler.t"], conditions)
        probe = open_branch_probe(place("full"), spec.branches, own, spec.streams)
        with ditc.load(bundle.path, reference=True) as pipe, probe as p:
            events = pipe.generate([0], seed=seed)
            sides.append([p.run(e.index, np.concatenate([e.before] * 2), conditioning)[branch] for e in events])
    return sides[0], sides[1]


@pytest.mark.parametrize("name", ["cached", "per-step", "streams"])
def test_noise_and_change_are_the_norms_of_their_definitions(bundles: dict[str, Bundle], name: str) -> None:
    veto = veto_of(bundles[name].path, VetoOptions(images=1, seed=4))
    exact, quantized = walked(bundles[name], 2, seed=4)
    for step in range(STEPS):
        noise = relative_error(quantized[step], exact[step])
        assert veto.noise[step][2] == pytest.approx(noise, rel=1e-5)
        if step % 2:
            change = relative_error(exact[step - 1], exact[step])
            assert veto.change[step][2] == pytest.approx(change, rel=1e-5)
            assert veto.ratio[step][2] == pytest.approx(noise / change, rel=1e-5)
    count = len(bundles[name].manifest.model.branches)
    assert veto.since == tuple((step - 1 if step % 2 else None,) * count for step in range(STEPS))
    assert veto.ratio[0] == (None,) * count


def test_steps_in_floating_point_have_no_noise(bundles: dict[str, Bundle]) -> None:
    """Steps 0, 4 and 5, where it reuses; at the others it is what computing there has, or would have."""
    veto = veto_of(bundles["float-ends"].path, VetoOptions(images=1))
    assert [max(filter(None, row), default=0.0) > 0 for row in veto.noise] == [False, True, True, True, False, False]


def test_a_probe_has_the_outputs_of_a_branch_side_by_side(bundles: dict[str, Bundle]) -> None:
    """Those of two streams are found inside the form that keeps sums: two of the image, one of the text."""
    sums, rows = bundles["streams-fp32-cached"], bundles["streams-rows"]
    spec, tables = sums.manifest.model, sums.tables()
    session = OnnxRuntimeBackend().session(sums.segment_path(CONDITION))
    conditioning = condition_tables(session, tables["sampler.t"], {"y": np.array([1, 2], np.int64)})
    x = np.random.default_rng(0).standard_normal((2, *spec.latent_shape), np.float32)
    with open_branch_probe(sums.segment_path("full"), spec.branches, streams=spec.streams) as probe:
        probed = dict(zip(spec.branches, probe.run(3, x, conditioning), strict=True))
    full = OnnxRuntimeBackend().session(rows.reference_path("full"))
    names = [port.name for port in full.get_outputs()]
    feeds = {"x": x, **{name: table[3] for name, table in conditioning.items()}}
    cached = dict(zip(names, full.run(names, {i.name: feeds[i.name] for i in full.get_inputs()}), strict=True))
    ports = {branch: [f"cache.{value}" for value in spec.wiring.outputs(branch)] for branch in spec.branches}
    whole = [branch for branch, names in ports.items() if set(names) <= cached.keys()]
    assert {"blocks.0.attn", "blocks.2.attn"} <= set(whole)
    for branch in whole:
        values = [cached[port].reshape(2, -1) for port in ports[branch]]
        assert relative_error(probed[branch].reshape(2, -1), np.concatenate(values, axis=1)) < 1e-5, branch


def test_a_probe_gives_what_a_step_would_cache(bundles: dict[str, Bundle]) -> None:
    """The caches of the bundle that keeps branches are the outputs that are found inside the one that keeps sums."""
    outputs = [_outputs(load_graph(bundles[name].segment_path("full"))) for name in ("fp32-cached", "fp32-branches")]
    branches = bundles["fp32-cached"].manifest.model.branches
    assert outputs[1] == [f"cache.{branch}" for branch in branches]
    spec, probed = bundles["fp32-cached"].manifest.model, []
    for name in ("fp32-cached", "fp32-branches"):
        bundle = bundles[name]
        session = OnnxRuntimeBackend().session(bundle.segment_path(CONDITION))
        conditioning = condition_tables(session, bundle.tables()["sampler.t"], {"y": np.array([1, 2], np.int64)})
        with open_branch_probe(bundle.segment_path("full"), spec.branches) as probe:
            x = np.random.default_rng(0).standard_normal((2, *spec.latent_shape), np.float32)
            probed.append(probe.run(3, x, conditioning))
    for of_sums, of_branches in zip(*probed, strict=True):
        assert of_sums.shape == (2, *spec.branch_shape)
        assert relative_error(of_sums, of_branches) < 1e-6


def _outputs(model: Model) -> list[str]:
    return [str(value.name) for value in branch_outputs(model).values()]


def test_a_reuse_from_further_back_changes_more_and_its_ratio_falls(bundles: dict[str, Bundle]) -> None:
    near, far = (veto_of(bundles["cached"].path, VetoOptions(images=2, lag=lag)) for lag in (1, 3))
    assert near.since[1:] == tuple((step,) * 4 for step in range(STEPS - 1))
    assert far.ratio[2] == (None,) * 4
    for ratio, further in zip(near.ratio[3], far.ratio[3], strict=True):
        assert ratio is not None
        assert further is not None
        assert further < ratio
    assert near.noise == far.noise


def program_of(rows: list[list[bool]]) -> Program:
    schedule = CacheSchedule(compute=tuple(tuple(row) for row in rows))
    return program_from_schedule(schedule, range(len(rows))[::-1], [f"b{n}" for n in range(len(rows[0]))])


def test_each_branch_is_compared_with_the_step_it_last_computed() -> None:
    program = program_of([[True, True], [False, True], [False, False], [True, False]])
    assert reuse_sources(program, None).tolist() == [[-1, -1], [0, -1], [0, 1], [-1, 1]]


def test_without_reuse_it_is_the_step_before() -> None:
    program = program_of([[True]] * 3)
    assert reuse_sources(program, None).tolist() == reuse_sources(program, 1).tolist() == [[-1], [0], [1]]


def test_evaluate_reports_every_cell_and_prints_a_line_a_branch(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundles["cached"].path
    arguments = f"evaluate {path} --images 4 --seeds 4 --rounds 2 --step-images 1 --veto 1 --json --features pixels"
    assert run(arguments.split()) == 0
    printed, veto = json.loads(capsys.readouterr().out)["veto"], veto_of(path, VetoOptions(images=1, seed=4))
    assert printed == veto.model_dump(mode="json")
    ratios = [ratio for row in veto.ratio for ratio in row if ratio is not None]
    assert len(ratios) == 3 * 4
    assert veto.vetoed == np.mean([ratio > 1 for ratio in ratios])
    print_veto(veto)
    lines = capsys.readouterr().out.splitlines()
    assert tuple(line.split()[0] for line in lines[3:7]) == veto.branches
    largest = max((row[0], step) for step, row in enumerate(veto.ratio) if row[0] is not None)
    assert lines[3].split()[4:6] == [f"{largest[0]:.2f}", str(largest[1])]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fp32-cached", {}, "is fp32, the veto needs w8a8: nothing in it is quantized, so there is no noise"),
        ("cached", {"lag": STEPS}, "a reuse 6 steps behind needs more than 6 steps, found 6"),
        ("cached", {"lag": 0}, "lag must be at least 1, found 0"),
        ("cached", {"images": 0}, "images must be at least 1, found 0"),
    ],
)
def test_what_makes_no_sense_is_refused(
    bundles: dict[str, Bundle], name: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        veto_of(bundles[name].path, VetoOptions.model_validate(options))


def test_evaluate_refuses_the_veto_of_a_float_bundle_in_one_line(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(bundles["fp32-cached"].path), "--veto", "1", "--save", str(tmp_path / "s")]) == 2
    error = capsys.readouterr().err
    assert "the veto needs w8a8" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()
