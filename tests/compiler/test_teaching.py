"""Ranges by gradients: the torch model is opened once more, and errors weigh as much as they change the prediction."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditc.bundle import Bundle
from ditc.calibset import CalibSet
from ditc.compiler import driver, teaching
from ditc.compiler.driver import compile_model
from ditc.compiler.exporting import export, model_digest
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan
from ditc.compiler.point_conditions import PointConditions
from ditc.compiler.pooling import select
from ditc.compiler.smoothing import FACTORS, smooth
from ditc.compiler.teaching import TAUGHT, Teacher, Weighing, check_teachable, taught_ranges, teach
from ditc.compiler.work import replaced
from ditc.errors import CheckpointError, InputError
from ditc.exporter.dit import DiT
from ditc.exporter.gradient_walk import Reading
from ditc.exporter.onnx_files import load_graph
from ditc.exporter.stress import stressed
from ditc.quantize import scale_binding
from ditc.quantize.linears import linears_of
from ditc.quantize.ranges import Histogram
from ditc.tables import read_tables
from tests.models.separate_qkv import build
from tests.models.token_mixer import MODELS

FISHER = {"policy": "fora:2", "ranges": "fisher", "vc": "none"}
CANDIDATES = np.linspace(0.01, 1, 397)


def scales_of(bundle: Bundle) -> dict[str, Any]:
    return json.loads((bundle.path / "calib" / "scales.json").read_text())


def hashes(bundle: Bundle) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in bundle.manifest.files.items()}


class Taught:
    """A model's segments, smoothed by a method, and what `teach` chose for them."""

    def __init__(self, model: Any, options: CompileOptions, folder: Path) -> None:
        self.model, self.plan, self.folder = model, make_plan(model, options), folder
        export(self.plan, model, folder)
        segments: Segments = {name: folder / f"{name}.onnx" for name in self.plan.program.calls}
        select(self.plan, segments, folder)
        self.calib = folder / "calib.npz"
        if self.plan.options.smooth != "none":
            (folder / "smooth").mkdir()
            smooth(self.plan, segments, self.calib, folder / "smooth")
            segments = replaced(segments, folder / "smooth")
        self.segments = segments

    def ranges(self, plan: Plan | None = None) -> list[dict[str, Any]]:
        teacher = Teacher(lambda: self.model, model_digest(self.model), is_ours=False)
        teach(plan or self.plan, teacher, self.segments, self.calib, self.folder)
        return [dict(group) for group in taught_ranges(self.folder / TAUGHT)]


@pytest.fixture(scope="module")
def hard(
    tmp_path_factory: pytest.TempPathFactory, make_small_model: Callable[[], DiT], quick_options: CompileOptions
) -> Taught:
    options = quick_options.model_copy(update={**FISHER, "smooth": "smooth", "points": 12, "pool_images": 8})
    return Taught(stressed(make_small_model()), options, tmp_path_factory.mktemp("hard"))


def read_by_autograd(taught: Taught, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (x, gradient) of a layer at all points, (rows, in) each, by autograd through the whole forward pass."""
    plan, spec = taught.plan, taught.plan.spec
    calib, images = CalibSet.load(taught.calib), PointConditions.of_plan(plan)
    values, gradients = [], []
    for place in range(len(calib)):
        point = calib.take(np.array([place]))
        v = np.random.default_rng([0, teaching.TEACH_NOISE, int(point.sample[0]), int(point.step[0])])
        direction = torch.from_numpy(v.standard_normal((1, *spec.latent_shape), np.float32))
        read: list[torch.Tensor] = []
        layer = taught.model.get_submodule(path)
        hook = layer.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        labels = torch.from_numpy(images.rows(point)["y"])
        x, t = torch.from_numpy(images.guidance.rows(point.x)), torch.from_numpy(point.t).expand(2).float()
        out = taught.model(x.requires_grad_(), t, labels)
        hook.remove()
        conditional, unconditional = out[:1, : spec.in_channels], out[1:, : spec.in_channels]
        guided = unconditional + plan.options.cfg * (conditional - unconditional)
        prediction = torch.cat([guided[:, : spec.cfg_channels], conditional[:, spec.cfg_channels :]], dim=1)
        (gradient,) = torch.autograd.grad(prediction, read, direction)
        values.append(read[0].detach().numpy().reshape(-1, read[0].shape[-1]))
        gradients.append(gradient.numpy().reshape(-1, gradient.shape[-1]))
    return np.concatenate(values), np.concatenate(gradients)


def weighted_error(x: np.ndarray, g: np.ndarray, limit: float) -> float:
    scale = limit / 127
    return float((np.square(g, dtype=np.float64) * (np.clip(np.round(x / scale), -127, 127) * scale - x) ** 2).sum())


@pytest.mark.parametrize("path", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"])
def test_a_range_has_the_least_error_weighted_by_gradients(
    hard: Taught, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Histogram]] = []
    search = teaching.ranges_of
    monkeypatch.setattr(teaching, "ranges_of", lambda *given: (seen.append(given[0]), search(*given))[1])
    (ranges,) = hard.ranges()
    linear = next(linear for linear in linears_of(load_graph(hard.segments["full"])) if linear.path == path)
    name = str(linear.activation.name)
    factors = read_tables(hard.folder / "smooth" / FACTORS).get(name, np.ones(1))
    x, g = read_by_autograd(hard, path)
    x, g = x / factors, g * factors
    expected = Histogram.empty().add(np.float32(x), np.square(g, dtype=np.float64))
    assert seen[0][name].amax == pytest.approx(expected.amax, rel=1e-5)
    assert seen[0][name].counts.sum() == pytest.approx(expected.counts.sum(), rel=1e-4)
    blocks = [each.counts.reshape(64, -1).sum(axis=1) for each in (seen[0][name], expected)]
    assert np.abs(blocks[0] - blocks[1]).sum() < 0.01 * blocks[1].sum()  # a value may fall over the edge of a bin
    best = min(weighted_error(x, g, share * expected.amax) for share in CANDIDATES)
    assert weighted_error(x, g, ranges[name].high) <= 1.02 * best


def test_layers_that_read_one_tensor_add_their_gradients() -> None:
    x = torch.tensor([[1.0, -3.0]])
    gradients = {"v": [1.0, 2.0], "k": [0.5, -2.0], "q": [0.0, 3.0], "other": [1.0, 1.0]}
    names = {("a", path): "own" if path == "other" else "shared" for path in gradients}
    weighing = Weighing(names, Counter(names.values()), {"shared": np.array([2.0, 1.0])}, {"other": 0.0})
    readings = [Reading("a", path, x, torch.tensor([gradient])) for path, gradient in gradients.items()]
    shared = weighing.histograms([readings, readings])["shared"]
    places = np.flatnonzero(shared.counts)
    assert shared.centers[places] == pytest.approx([0.5, 3.0], abs=shared.bin_width)
    assert shared.counts[places].tolist() == [2 * (1.5 * 2) ** 2, 2 * 3.0**2]


def test_factors_are_those_that_were_folded(hard: Taught) -> None:
    factors = read_tables(hard.folder / "smooth" / FACTORS)
    linears = {linear.path: linear for linear in linears_of(load_graph(hard.segments["full"]))}
    for path in ("blocks.0.mlp.fc1", "blocks.1.attn.proj"):
        own = hard.model.get_submodule(path).weight.detach().double().numpy().T
        folded = own * factors[str(linears[path].activation.name)][:, None]
        np.testing.assert_array_equal(linears[path].weight_array(), folded.astype(np.float32))
    assert not any("fc2" in name for name in factors)


def test_other_factors_than_those_folded_are_one_line(hard: Taught, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "read_tables", lambda path: {})
    with pytest.raises(CheckpointError, match=r"the weight at blocks.0.attn.qkv of .* is not the one") as caught:
        hard.ranges()
    assert "choose --ranges without gradients" in str(caught.value)


def test_steps_have_ranges_of_their_own_and_midpoints_hold(hard: Taught, monkeypatch: pytest.MonkeyPatch) -> None:
    options = hard.plan.options.model_copy(update={"scales": "per-step", "midpoint": "bounded"})
    plan = replace(hard.plan, options=options)
    (static,) = hard.ranges()
    monkeypatch.setattr(scale_binding.neighbouring_steps, "__defaults__", (4,))  # few points, and several groups
    groups = hard.ranges(plan)
    assert len(groups) > 1
    assert all(len({group[name].high for group in groups}) > 1 for name in static)
    lows = {name: {group[name].low for group in groups} for name in static}
    assert sum(low == {-0.17005} for low in lows.values()) == 2
    assert all(group[name].high > 0 for group in groups for name in static)


def test_points_in_other_batches_give_the_same_ranges(hard: Taught, monkeypatch: pytest.MonkeyPatch) -> None:
    (together,) = hard.ranges()
    monkeypatch.setattr(Plan, "probed_at_once", 1)
    (alone,) = hard.ranges()
    for name, ends in together.items():
        assert alone[name].high == pytest.approx(ends.high, rel=0.02)  # a candidate further at most


@pytest.mark.parametrize(
    "make", [build, *(MODELS[name] for name in ("video", "styled", "prompted", "clocked", "iterated"))]
)
def test_a_model_of_a_users_own_is_taught_and_stays_as_it_is(
    tmp_path: Path, quick_options: CompileOptions, make: Callable[[], Any]
) -> None:
    model = make().eval()
    before = model_digest(model)
    cfg = 1.5 if model.spec.can_be_guided else 1.0
    bundle = compile_model(model, tmp_path / "b", quick_options.model_copy(update={**FISHER, "cfg": cfg}))
    scales = scales_of(bundle)
    assert scales["method"] == "fisher"
    kernels = bundle.manifest.checks["kernels"]["full"]
    assert kernels["integer"] == kernels["linears"] > 0
    assert model_digest(model) == before
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def checkpoint(tmp_path: Path, make_small_model: Callable[[], DiT]) -> Path:
    torch.save(make_small_model().state_dict(), tmp_path / "small.pt")
    return tmp_path / "small.pt"


def test_a_model_is_loaded_once_more_by_its_name_and_released(
    tmp_path: Path, checkpoint: Path, quick_options: CompileOptions, exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, opened = [], driver._opened
    monkeypatch.setattr(driver, "_opened", lambda *given: (loaded.append(opened(*given)), loaded[-1])[1])
    options = quick_options.model_copy(update=FISHER)
    compile_model(str(checkpoint), tmp_path / "b", options, num_heads=4, exports=exports)
    assert len(loaded) == 2
    assert all(not parameter.numel() for model in loaded for parameter in model.parameters())
    loaded.clear()
    compile_model(
        str(checkpoint), tmp_path / "c", options.model_copy(update={"ranges": "mse"}), num_heads=4, exports=exports
    )
    assert len(loaded) == 1


def test_an_interrupted_compile_is_not_taught_again(
    tmp_path: Path,
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    exports: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = quick_options.model_copy(update={**FISHER, "smooth": "smooth"})
    whole = compile_model(make_small_model(), tmp_path / "whole", options, exports=exports)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "quantize", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compile_model(make_small_model(), tmp_path / "b", options, exports=exports)
    monkeypatch.setattr(driver, "teach", lambda *_: pytest.fail("taught again"))
    assert hashes(compile_model(make_small_model(), tmp_path / "b", options, exports=exports)) == hashes(whole)


def test_another_model_than_the_exported_one_is_one_line(make_small_model: Callable[[], DiT]) -> None:
    with pytest.raises(CheckpointError, match=r"weights of small are others than those that were exported; .* seed"):
        Teacher(make_small_model, "0", is_ours=True).model()


def test_a_layer_that_can_not_be_shown_is_refused_behind_the_export(
    tmp_path: Path, make_small_model: Callable[[], DiT], quick_options: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Functional(torch.nn.Module):
        def __init__(self, inside: torch.nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = inside.weight, inside.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight, self.bias)

    model = make_small_model()
    model.blocks[1].mlp.fc1 = Functional(model.blocks[1].mlp.fc1)
    monkeypatch.setattr(driver, "select", lambda *_: pytest.fail("the pool was recorded"))
    with pytest.raises(CheckpointError, match=r"torch.nn.Linear at blocks.1.mlp.fc1 of small, found Functional"):
        compile_model(model, tmp_path / "b", quick_options.model_copy(update=FISHER))


def test_a_layer_with_another_weight_is_refused(hard: Taught) -> None:
    full = hard.folder / "full.onnx"
    check_teachable(hard.model, full)
    with pytest.raises(CheckpointError, match="is not the one that branch"):
        check_teachable(stressed(hard.model), full)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp32"}, "--ranges fisher is for activations in integers, and --precision fp32 has none"),
        (
            {"scales": "dynamic"},
            "--scales dynamic measures every tensor as it comes, so the gradients of --ranges fisher",
        ),
    ],
)
def test_gradients_that_would_serve_nothing_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompileOptions(ranges="fisher", **change)
