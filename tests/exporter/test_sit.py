"""Flow matching with DiT's block and the original key names: read, walked and compiled as its formulas say."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refusal_of
from sit_formulas import Formulas, Sizes, Tensors, random_weights
from torch import Tensor

from ditc.bundle import Bundle
from ditc.choices import FlowTimes, names_of
from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import trajectory_table
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import CheckpointError, InputError
from ditc.exporter.flow_check import ends_of
from ditc.exporter.model_facts import ModelFacts
from ditc.exporter.models import load_model
from ditc.exporter.original_checkpoint import dit_from_checkpoint
from ditc.exporter.protocol import check_decomposition, relative_error
from ditc.exporter.sit import SiT
from ditc.runtime.pipeline import load
from ditc.runtime.samplers import no_pairs, update
from ditc.spec import DiffusionSpec, SamplerSpec

FLOW = ModelFacts(prediction="flow", flow_times="0:1")
ORIGINAL, OTHER = Sizes(), Sizes(8, 4, 3, 48, 3, 3, 96, 7, learn_sigma=False)
SIZES = {"original": ORIGINAL, "other": OTHER}
STEPS, LABELS = 6, [3, 0, 4]
# of a bundle without a cache, in float32
PLAIN = {"policy": "none", "precision": "fp32", "vc": "none", "cfg": 1.0}


def saved(folder: Path, sizes: Sizes = ORIGINAL, **others: Any) -> Path:
    torch.save({"ema": random_weights(sizes), **others}, folder / "sit.pt")
    return folder / "sit.pt"


def read(path: Path, sizes: Sizes = ORIGINAL, facts: ModelFacts = FLOW) -> Any:
    return dit_from_checkpoint(path, num_heads=sizes.heads, facts=facts)


def inputs(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """(samples, t of SiT, classes)."""
    x = torch.randn(4, sizes.channels, sizes.side, sizes.side, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 0.3, 0.71, 1.0]), torch.tensor([0, 3, 1, sizes.classes])


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_file_computes_what_the_formulas_compute(sizes: Sizes, tmp_path: Path) -> None:
    """Of the original the velocity is data minus noise, here noise minus data, over timesteps of 1000 to 0."""
    model, (x, t, y) = read(saved(tmp_path, sizes), sizes), inputs(sizes)
    check_decomposition(model)
    expected = Formulas(sizes, random_weights(sizes))(x, t, y)[:, : sizes.channels]
    assert relative_error(-model(x, 1000 * (1 - t), y), expected) < 1e-5
    spec = model.spec
    assert (spec.family, spec.prediction_shape) == ("sit", (sizes.channels, sizes.side, sizes.side))
    assert spec.diffusion == DiffusionSpec(prediction="flow", learned_sigma=False)
    assert spec.sampler == SamplerSpec(name="euler", spacing="trailing")
    assert (spec.null_label, spec.cfg_channels) == (sizes.classes, 3)


@torch.no_grad()
@pytest.mark.parametrize("times", names_of(FlowTimes))
def test_other_times_are_those_that_the_network_is_given(times: FlowTimes, tmp_path: Path) -> None:
    (noise_at, data_at), (x, _, y) = ends_of(times), inputs(ORIGINAL)
    level = torch.tensor([1.0, 0.7, 0.2, 0.0])
    model = read(saved(tmp_path), facts=replace(FLOW, flow_times=times))
    given = data_at + (noise_at - data_at) * level
    expected = Formulas(ORIGINAL, random_weights(ORIGINAL))(x, given, y)[:, :4] * (1 if noise_at > data_at else -1)
    assert relative_error(model(x, 1000 * level, y), expected) < 1e-5


def test_half_precision_weights_change_their_sign_exactly(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in random_weights(ORIGINAL).items()}
    torch.save(half, tmp_path / "half.pt")
    rows = half["final_layer.linear.weight"].float().reshape(4, 8, 64)[:, :4].reshape(16, 64)
    assert torch.equal(read(tmp_path / "half.pt").final_layer.linear.weight, -rows)


def compiled(bundles: Callable[..., Bundle], folder: Path, sizes: Sizes, options: CompileOptions) -> Bundle:
    return bundles(read(saved(folder, sizes), sizes), options)


def noise_of(sizes: Sizes) -> np.ndarray[Any, Any]:
    shape = (len(LABELS), sizes.channels, sizes.side, sizes.side)
    return np.random.default_rng(2).standard_normal(shape, dtype=np.float32)


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_segments_give_what_the_formulas_give(
    sizes: Sizes, compiled_once: Callable[..., Bundle], quick_options: CompileOptions, tmp_path: Path
) -> None:
    bundle = compiled(compiled_once, tmp_path, sizes, quick_options.model_copy(update=PLAIN))
    condition, full = (OnnxRuntimeBackend().session(bundle.segment_path(name)) for name in ("condition", "full"))
    x, t, y = inputs(sizes)
    (tables,) = condition.run(None, {"t": (1000 * (1 - t)).numpy(), "y": y.numpy()})
    formulas = Formulas(sizes, random_weights(sizes))
    for step, time in enumerate(t.tolist()):
        (out,) = full.run(None, {"x": x.numpy(), "modulation": tables[step]})
        assert relative_error(-torch.from_numpy(out), formulas.velocity(x, time, y)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_whole_run_is_eulers_walk_from_noise_to_data(
    sizes: Sizes, weight: float, compiled_once: Callable[..., Bundle], quick_options: CompileOptions, tmp_path: Path
) -> None:
    options = quick_options.model_copy(update={**PLAIN, "cfg": weight})
    bundle, noise = compiled(compiled_once, tmp_path, sizes, options), noise_of(sizes)
    with load(bundle.path) as pipe:
        assert [round(step.t, 3) for step in pipe.program.steps] == [1000.0, 833.333, 666.667, 500.0, 333.333, 166.667]
        latents = pipe.latents(LABELS, noise=noise)
    formulas = Formulas(sizes, random_weights(sizes))
    expected = formulas.walked(torch.from_numpy(noise), torch.tensor(LABELS), STEPS, weight=weight)
    assert relative_error(torch.from_numpy(latents), expected) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("caches", ["sums", "branches"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_reuse_is_a_run_with_branch_outputs_held_by_hand(
    sizes: Sizes, caches: str, compiled_once: Callable[..., Bundle], quick_options: CompileOptions, tmp_path: Path
) -> None:
    held = {**PLAIN, "policy": "fora:3", "reuse": "hold", "caches": caches, "cfg": 3.0}
    bundle, noise = compiled(compiled_once, tmp_path, sizes, quick_options.model_copy(update=held)), noise_of(sizes)
    with load(bundle.path) as pipe:
        latents = pipe.latents(LABELS, noise=noise)
    formulas, y = Formulas(sizes, random_weights(sizes)), torch.tensor(LABELS)
    expected = formulas.walked(torch.from_numpy(noise), y, STEPS, weight=3.0, every=3)
    assert relative_error(torch.from_numpy(latents), expected) < 1e-4
    whole = formulas.walked(torch.from_numpy(noise), y, STEPS, weight=3.0)
    assert relative_error(expected, whole) > 1e-2  # a reuse that computed would be found out


@pytest.mark.parametrize(
    ("sampler", "shift"), [("euler", 3.0), ("dpm++2m", None), ("dpm++3m", None), ("unipc", 2.0), ("dpm++2m-sde", None)]
)
def test_any_sampler_of_a_flow_leads_to_the_data_that_a_network_knows(
    sampler: str, shift: float | None, tmp_path: Path
) -> None:
    spec, random = read(saved(tmp_path)).spec, np.random.default_rng(0)
    table = trajectory_table(
        spec.diffusion, CompileOptions(sampler=sampler, shift=shift).sampler_spec(spec.sampler), 20
    )
    x, clean = random.standard_normal((2, 1, 4, 8, 8), dtype=np.float32)
    pairs = no_pairs(table)
    for i, level in enumerate(-table["x0_out"]):
        row = {name: float(column[i]) for name, column in table.items()}
        out = (x - clean) / np.float32(level)
        before, x = x, update(row, x, out, None, random.standard_normal(x.shape, dtype=np.float32), pairs)
        pairs.appendleft((before, out))
    assert np.abs(x - clean).max() < 2e-3
    for name in ("ddim", "ddpm"):
        with pytest.raises(InputError, match="is for a process over betas, and the model predicts a flow"):
            trajectory_table(spec.diffusion, CompileOptions(sampler=name).sampler_spec(spec.sampler), 20)


def test_integers_a_cache_tap_and_compensation_compile_on_it(
    compiled_once: Callable[..., Bundle], quick_options: CompileOptions, tmp_path: Path
) -> None:
    changes = {"policy": "fora:2", "precision": "w8a8", "select": "tap", "vc": "std", "smooth": "smooth"}
    bundle = compiled(compiled_once, tmp_path, ORIGINAL, quick_options.model_copy(update=changes))
    measured, noise = bundle.manifest.measured("kernels", "verify", "compensation"), noise_of(ORIGINAL)
    assert measured.kernels is not None
    assert measured.kernels["full"].integer == measured.kernels["full"].linears == 8
    assert measured.compensation is not None
    with load(bundle.path) as pipe, load(bundle.path, reference=True) as exact:
        latents, expected = (each.latents(LABELS, noise=noise) for each in (pipe, exact))
        begun = pipe.latents(LABELS, latents=pipe.noised(expected, start=2, seed=0), start=2)
    gap = np.sqrt(np.mean((latents - expected) ** 2)) / expected.std()
    assert 0 < gap < 0.2
    assert np.isfinite(begun).all()


def test_what_is_not_stated_of_a_flow_is_assumed_and_said(tmp_path: Path) -> None:
    path = saved(tmp_path)
    stated = ModelFacts(classes=5, null_class=True, prediction="flow", flow_times="0:1")
    assert read(path, facts=stated).spec.assumptions == ()
    (line,) = read(path, facts=replace(stated, flow_times=None)).spec.assumptions
    assert line == (
        "a flow as SiT has it: the model is given t from 0 at the noise to 1 at the data, and returns dx/dt "
        "(--flow-times)"
    )


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"prediction": "flow", "train_steps": 1000}, "neither betas nor training steps; leave out --train-steps"),
        ({"prediction": "flow", "beta_schedule": "linear"}, "leave out --beta-schedule"),
        ({"flow_times": "1:0"}, "--flow-times 1:0 is of a model that predicts a flow; add --prediction flow"),
        ({"prediction": "v", "flow_times": "1:0"}, "add --prediction flow"),
    ],
)
def test_facts_of_another_process_are_refused(facts: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert said in refusal_of(lambda: read(path, facts=ModelFacts(**facts)), error=InputError)


def test_unknown_times_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown flow times '1:2'; choose one of: 0:1, 0:1000, 1000:0, 1:0"):
        ModelFacts(prediction="flow", flow_times="1:2")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "times"),
    [
        ({"path_type": "Linear", "prediction": "velocity", "train_eps": 1e-5, "loss_weight": None}, (0.0, 1.0)),
        ({"path_type": "linear", "prediction": "v", "weighting": "uniform"}, (1.0, 0.0)),
        ({"prediction": "velocity"}, None),
        ({"flow_matching": True}, None),
    ],
)
def test_a_training_script_s_arguments_tell_of_a_flow(
    args: dict[str, Any], times: tuple[float, float] | None, tmp_path: Path
) -> None:
    model = read(saved(tmp_path, args=argparse.Namespace(**args)), facts=ModelFacts())
    assert isinstance(model, SiT)
    assert model.flow_times == (times or (0.0, 1.0))
    assert any("(--flow-times)" in line for line in model.spec.assumptions) == (times is None)
    stated = read(saved(tmp_path, args=args), facts=ModelFacts(flow_times="1000:0"))
    assert stated.flow_times == (1000.0, 0.0)


def test_heads_of_repa_s_training_are_left_out_and_all_channels_guided(tmp_path: Path) -> None:
    """As its scripts save them: behind `ema`, beside its own arguments, in which time is 1 at the noise."""
    weights, args = random_weights(ORIGINAL), argparse.Namespace(path_type="linear", prediction="v")
    heads = {"projectors.0.0.weight": torch.ones(9, 8), "projectors.0.0.bias": torch.ones(9)}
    torch.save({"ema": weights | heads, "args": args, "steps": 7}, tmp_path / "repa.pt")
    torch.save({"ema": weights, "args": args}, tmp_path / "plain.pt")
    model, plain = (read(tmp_path / name, facts=ModelFacts()) for name in ("repa.pt", "plain.pt"))
    assert model.flow_times == (1.0, 0.0)
    assert (model.spec.cfg_channels, plain.spec.cfg_channels) == (ORIGINAL.channels, 3)
    assert "projectors.* (2 tensors) are REPA's, for its training alone" in " ".join(model.spec.assumptions)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("args", "facts", "said"),
    [
        (
            {"path_type": "VP", "prediction": "velocity"},
            FLOW,
            "path_type VP, prediction velocity; ditc knows velocities",
        ),
        ({"path_type": "Linear", "prediction": "score"}, ModelFacts(), "prediction score; ditc knows velocities along"),
        ({"path_type": "Linear", "prediction": "noise"}, ModelFacts(), "prediction noise; ditc knows velocities"),
        ({"prediction": "velocity"}, ModelFacts(prediction="epsilon"), "--prediction epsilon contradicts that"),
    ],
)
def test_arguments_of_another_flow_are_refused(
    args: dict[str, Any], facts: ModelFacts, said: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, args=args)
    assert said in refusal_of(lambda: read(path, facts=facts), path.name)


@pytest.mark.parametrize("key", ["final_layer.linear.weight", "final_layer.linear.bias"])
def test_a_last_layer_that_does_not_fit_is_refused_by_key(key: str, tmp_path: Path) -> None:
    weights: Tensors = random_weights(ORIGINAL)
    for broken in (weights[key][:-4], weights[key][0] if weights[key].ndim > 1 else weights[key][None]):
        torch.save(weights | {key: broken}, tmp_path / "broken.pt")
        with pytest.raises(CheckpointError) as refused:
            read(tmp_path / "broken.pt")
        assert "final_layer" in str(refused.value)
    torch.save({name: value for name, value in weights.items() if name != key}, tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match=key):
        read(tmp_path / "missing.pt")


def test_a_file_whose_time_runs_the_other_way_is_told(tmp_path: Path) -> None:
    """Trained for a second as SiT is, and said to be of each kind: all but the right one raise a doubt."""
    from test_flow_check import trained

    network: Any = trained("0:1")
    torch.save(network.state_dict(), tmp_path / "trained.pt")
    for times in names_of(FlowTimes):
        facts = ModelFacts(prediction="flow", flow_times=times)
        doubts = load_model(str(tmp_path / "trained.pt"), num_heads=4, facts=facts).spec.doubts
        assert bool(doubts) == (times != "0:1")
        assert all(line.endswith(f"with times {times}, but one of 0:1 (--prediction, --flow-times)") for line in doubts)
    (line,) = load_model(str(tmp_path / "trained.pt"), num_heads=4).spec.doubts
    assert "flow matching (--prediction)" in line
