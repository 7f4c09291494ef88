"""Watching: what changes from step to step, as torch's own loop over the model shows it; and what of it is kept."""

from __future__ import annotations

import importlib.util
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditc.cli.main import run
from ditc.compiler import driver, watching
from ditc.compiler import plan as planned
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import plan_to_watch
from ditc.compiler.trajectories import WATCH_NOISE
from ditc.compiler.watching import StepObserver, watch
from ditc.errors import InputError
from ditc.exporter.dit import DiT
from ditc.policies import POLICIES, Policy, Watching
from ditc.policy_sources import Sources
from ditc.runtime.executor import seeded_noise
from ditc.schedule import CacheSchedule
from ditc.spec import ModelSpec
from ditc.step_statistics import StepStatistics
from tests.models.token_mixer import MODELS

STEPS, IMAGES, WINDOW = 5, 3, 2
SEEN: list[StepStatistics] = []  # by the policy of these tests


def by_first_change(spec: ModelSpec, steps: int, argument: str | None, sources: Sources) -> CacheSchedule:
    """Reuse at every step that changes less than `argument`, but the first."""
    statistics = sources.statistics
    assert statistics is not None
    SEEN.append(statistics)
    changes = np.nanmean(statistics.relative[1:, 0], axis=1)
    rows = [True, *(bool(change >= float(argument or 0)) for change in changes)]
    return CacheSchedule(compute=tuple((row,) * len(spec.branches) for row in rows))


@pytest.fixture(autouse=True)
def _a_policy_that_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    row = Policy(by_first_change, "X", watches=lambda _: Watching(distances=WINDOW, sums=WINDOW))
    monkeypatch.setitem(POLICIES, "seeing", row)


def options(**changes: Any) -> CompileOptions:
    return CompileOptions(policy="seeing:0.5", steps=STEPS, watch_images=IMAGES, precision="fp32").model_copy(
        update=changes
    )


def watched(model: Any, folder: Path, **changes: Any) -> StepStatistics:
    planned_watch = plan_to_watch(model, options(**changes))
    assert planned_watch is not None
    plan, wanted = planned_watch
    watch(plan, model, wanted, folder)
    return StepStatistics.load(folder / watching.STATISTICS)


@torch.no_grad()
def loop(model: Any, settings: CompileOptions) -> list[tuple[dict[str, torch.Tensor], Any]]:
    """(outputs of the branches, parts) of each step: DDIM in plain torch, both halves of guidance in one batch."""
    plan, _ = plan_to_watch(model, settings) or (None, None)
    assert plan is not None
    noise, _ = seeded_noise(settings.seed + WATCH_NOISE, 0, IMAGES, model.spec.latent_shape)
    labels = torch.tensor(plan.labels(IMAGES))
    halves = plan.halves
    y = torch.cat([labels, torch.full_like(labels, model.spec.null_label)]) if halves == 2 else labels
    x, steps = torch.from_numpy(noise), []
    rows = [{name: float(column[i]) for name, column in plan.columns.items()} for i in range(STEPS)]
    for row in rows:
        tables = model.condition(torch.tensor([row["t"]], dtype=torch.float32), y)
        parts = model.unpack({name: table[0] for name, table in tables.items()})
        h, outputs = model.embed(torch.cat([x] * halves)), {}
        for branch in model.branches:
            outputs[branch.name] = branch.compute(h, parts)
            h = branch.merge(h, outputs[branch.name], parts)
        steps.append((outputs, parts))
        prediction, _ = plan.guidance.combine(model.head(h, parts).numpy(), IMAGES)
        x0 = row["x0_x"] * x + row["x0_out"] * torch.from_numpy(prediction)
        x = row["prev_x0"] * x0 + row["prev_x"] * x + row["prev_out"] * torch.from_numpy(prediction)
        x = x.float()
    return steps


OWN_FILE = Path(__file__).parents[1] / "models" / "separate_qkv.py"


@pytest.fixture
def own_model() -> Iterator[Any]:
    """A user's own model, unlike DiT."""
    spec = importlib.util.spec_from_file_location("separate_qkv_to_watch", OWN_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module.build().eval()
    del sys.modules[spec.name]


@pytest.mark.parametrize(("own", "cfg"), [(False, 1.5), (False, 1.0), (True, 1.5)])
def test_distances_are_those_of_the_outputs_in_torchs_own_loop(
    own: bool, cfg: float, make_small_model: Callable[[], DiT], own_model: Any, tmp_path: Path
) -> None:
    model = own_model if own else make_small_model()
    statistics = watched(model, tmp_path, cfg=cfg)
    steps = loop(model, options(cfg=cfg))
    for t, back, place in np.ndindex(STEPS, WINDOW, len(model.spec.branches)):
        seen = statistics.absolute[t, back, place], statistics.relative[t, back, place]
        if back + 1 > t:
            assert np.isnan(seen).all()
            continue
        name = model.spec.branches[place]
        now, before = (steps[each][0][name].double().flatten(1) for each in (t, t - back - 1))
        change = (now - before).abs()
        assert seen[0] == pytest.approx(change.mean().item(), rel=1e-4)
        assert seen[1] == pytest.approx((change.sum(1) / now.abs().sum(1)).mean().item(), rel=1e-4)


def test_tables_of_timesteps_are_watched_as_a_row_for_each_image_is(tmp_path: Path) -> None:
    model = MODELS["clocked"]()
    alone = watched(model, tmp_path)
    model.by_condition = True
    by_row = watched(model, tmp_path)
    assert alone.sums is not None
    assert by_row.sums is not None
    np.testing.assert_allclose(alone.relative, by_row.relative, rtol=1e-4)
    np.testing.assert_allclose(alone.sums.gram, by_row.sums.gram, rtol=1e-3, atol=1e-5)


def gated_sum(model: Any, outputs: dict[str, torch.Tensor], parts: Any) -> torch.Tensor:
    """The sum of all that merging adds to a stream of zeros, branch by branch."""
    zeros = torch.zeros_like(outputs[model.spec.branches[0]])
    terms = [branch.merge(zeros, outputs[branch.name], parts) for branch in model.branches]
    return torch.stack(terms).sum(0).double()


def test_sums_are_those_of_earlier_outputs_with_the_gates_of_the_step(
    make_small_model: Callable[[], DiT], tmp_path: Path
) -> None:
    model = make_small_model()
    sums, steps = watched(model, tmp_path).sums, loop(model, options())
    assert sums is not None
    for t in range(STEPS):
        earlier = range(min(t, WINDOW) + 1)
        own = torch.stack([gated_sum(model, steps[t - back][0], steps[t][1]).flatten(0, 1) for back in earlier])
        count = own.shape[1]
        np.testing.assert_allclose(sums.mean[t, : len(own)], own.mean(1), atol=1e-5)
        gram = torch.einsum("jnc,knc->jkc", own, own) / count
        np.testing.assert_allclose(sums.gram[t, : len(own), : len(own)], gram, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(sums.distance[t, : len(own)], (own - own[0]).abs().mean((1, 2)), atol=1e-5)
        assert np.isnan(sums.mean[t, len(own) :]).all()
        assert np.isnan(sums.gram[t, len(own) :]).all()
        assert np.isnan(sums.gram[t, :, len(own) :]).all()


def test_the_gates_are_not_those_of_the_step_that_gave_the_outputs(
    make_small_model: Callable[[], DiT], tmp_path: Path
) -> None:
    """The test above would not tell them apart in a model whose gates stand still."""
    model = make_small_model()
    steps, sums = loop(model, options()), watched(model, tmp_path).sums
    assert sums is not None
    of_its_own = gated_sum(model, steps[2][0], steps[2][1]).flatten(0, 1).mean(0)
    assert np.abs(sums.mean[3, 1] - of_its_own.numpy()).max() > 1e-3


def test_images_of_smaller_batches_give_the_same(
    make_small_model: Callable[[], DiT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = watched(make_small_model(), tmp_path)
    monkeypatch.setattr(planned, "BUFFER_BYTES", 1)
    one_by_one = watched(make_small_model(), tmp_path)
    np.testing.assert_allclose(one_by_one.relative, at_once.relative, rtol=1e-4)
    assert one_by_one.sums is not None
    assert at_once.sums is not None
    np.testing.assert_allclose(one_by_one.sums.gram, at_once.sums.gram, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("wanted", [Watching(distances=3), Watching(sums=1), Watching(distances=1, sums=2)])
def test_no_more_sets_of_outputs_are_alive_than_the_window_and_one(
    wanted: Watching, make_small_model: Callable[[], DiT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays: list[weakref.ref[Any]] = []
    alive: list[int] = []
    add = StepObserver.add

    def counted(self: StepObserver, step: int, outputs: Any, add_up: Any) -> None:
        arrays.extend(weakref.ref(output) for output in outputs.values())
        alive.append(sum(array() is not None for array in arrays) // len(outputs))
        add(self, step, outputs, add_up)

    monkeypatch.setattr(StepObserver, "add", counted)
    monkeypatch.setattr(planned, "BUFFER_BYTES", 1)  # a request for each image
    monkeypatch.setitem(POLICIES, "seeing", Policy(by_first_change, "X", watches=lambda _: wanted))
    watched(make_small_model(), tmp_path)
    assert len(alive) == IMAGES * STEPS
    assert max(alive) == wanted.window + 1


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each run of the stage `watch`."""
    names: list[str] = []
    monkeypatch.setattr(driver, "watch", lambda *given: (names.append("watch"), watch(*given)))
    return names


def interrupted(
    model: Any, out: Path, settings: CompileOptions, monkeypatch: pytest.MonkeyPatch, **places: Any
) -> None:
    """A compile that is ended when it begins to export."""
    with monkeypatch.context() as patch:
        patch.setattr(driver, "export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compile_model(model, out, settings, **places)


def test_another_argument_does_not_watch_again(
    make_small_model: Callable[[], DiT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    for policy in ("seeing:0.5", "seeing:0.5", "seeing:0"):
        interrupted(make_small_model(), tmp_path / "b", options(policy=policy, vc="none"), monkeypatch)
    assert runs == ["watch"]
    assert len(SEEN) == 3


@pytest.mark.parametrize("change", [{"cfg": 2.0}, {"watch_images": 2}, {"steps": 4}, {"seed": 1}, {"sampler": "unipc"}])
def test_what_decides_a_trajectory_watches_again(
    change: dict[str, Any],
    make_small_model: Callable[[], DiT],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs: list[str],
) -> None:
    interrupted(make_small_model(), tmp_path / "b", options(), monkeypatch)
    interrupted(make_small_model(), tmp_path / "b", options(**change), monkeypatch)
    assert runs == ["watch", "watch"]


def test_another_model_is_watched_again(
    make_small_model: Callable[..., DiT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    interrupted(make_small_model(), tmp_path / "b", options(), monkeypatch)
    interrupted(make_small_model(num_heads=2), tmp_path / "b", options(), monkeypatch)
    assert runs == ["watch", "watch"]


def test_compiles_of_one_model_share_what_they_watch(
    make_small_model: Callable[[], DiT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    for name, policy in (("first", "seeing:0.5"), ("second", "seeing:0.5"), ("third", "seeing:0")):
        settings = options(policy=policy, vc="none")
        interrupted(make_small_model(), tmp_path / name, settings, monkeypatch, exports=tmp_path / "exports")
    assert runs == ["watch"]


def test_a_bundle_says_what_was_watched(
    make_small_model: Callable[[], DiT], tmp_path: Path, exports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = options(verify_images=1, watch_images=None)
    bundle = compile_model(make_small_model(), tmp_path / "b", settings, exports=exports)
    [statistics] = SEEN
    assert bundle.manifest.settings["watch_images"] == statistics.images == watching.WATCH_IMAGES
    watched = bundle.manifest.measured("watch").watch
    assert watched is not None
    assert watched.images == watching.WATCH_IMAGES
    assert {kind: [len(row) for row in rows] for kind, rows in watched.changes.items()} == {
        kind: [0, 1, 2, 2, 2] for kind in ("attn", "mlp")
    }
    assert watched.changes["mlp"][3][1] == pytest.approx(statistics.relative[3, 1, [1, 3]].mean())
    assert run(["inspect", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert "watched          10 FP images; change from step to step: attn " in shown
    assert '  policy           "seeing:0.5"' in shown
    assert "  watch_images     10" in shown


@pytest.mark.parametrize("policy", ["none", "fora:2", "window:2:1:1", "schedule.json"])
def test_images_for_a_policy_that_looks_at_none_are_refused(policy: str) -> None:
    with pytest.raises(InputError, match=rf"--watch-images 3 is for .*, and --policy {policy} looks at none; leave"):
        options(policy=policy)
    with pytest.raises(InputError, match="--watch-images must be at least 1, found 0"):
        options(watch_images=0)


def test_sums_of_branches_that_do_more_than_add_are_refused_before_anything_runs(
    make_small_model: Callable[[], DiT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditc.exporter.protocol.branches_add", lambda model: False)
    with pytest.raises(InputError, match=r"--policy seeing:0\.5 looks at sums, and small has a branch whose merge"):
        compile_model(make_small_model(), tmp_path / "b", options())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eta": 0.5, "sampler": "unipc"}, "--eta would do nothing"),
        ({"steps": 2000}, "steps must be 2 to 1000"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_watched(
    change: dict[str, Any], message: str, make_small_model: Callable[[], DiT], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        compile_model(make_small_model(), tmp_path / "b", options(**change))
    assert not list(tmp_path.iterdir())


def test_a_model_that_diverges_is_one_line(make_small_model: Callable[[], DiT], tmp_path: Path) -> None:
    model = make_small_model()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.fill_(torch.inf)
    with pytest.raises(InputError, match="the model diverges"):
        watched(model, tmp_path)
