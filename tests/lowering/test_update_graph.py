"""The `update` segment against the NumPy arithmetic of the host: guidance, every sampler, compensation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ditc.exporter.onnx_files import save_graph
from ditc.guidance import Guidance
from ditc.lowering.segment_footprint import footprint_of
from ditc.lowering.tensorrt_rules import violations_of
from ditc.lowering.update_graph import update_model
from ditc.runtime.compensation import TableCompensation
from ditc.runtime.device_buffers import update_rows
from ditc.runtime.samplers import needs_noise, sampler_table, update
from ditc.spec import DiffusionSpec, ModelSpec, SamplerSpec
from ditc.tables import history_columns, sampler_tables
from ditc.update_form import COLUMNS, UpdateForm

STEPS, IMAGES = 5, 2


def spec_of(*, learned_sigma: bool = True, cfg_channels: int = 3, prediction: Any = "epsilon") -> ModelSpec:
    return ModelSpec(
        name="small",
        family="dit",
        in_channels=4,
        height=3,
        width=5,
        num_classes=2,
        null_label=2,
        cfg_channels=cfg_channels,
        branches=("a",),
        branch_shape=(1, 1),
        parameters=0,
        diffusion=DiffusionSpec(learned_sigma=learned_sigma, prediction=prediction),
    )


def host_step(
    spec: ModelSpec, row: dict[str, float], guidance: float, x: Any, out: Any, z: Any, compensate: Any, step: int
) -> np.ndarray:
    """Do as `runtime.host_executor` does after the network."""
    prediction, variance = Guidance.of(spec, guidance).combine(out, IMAGES)
    after = update(row, x, prediction, variance, z if needs_noise(row) else None)
    return np.asarray(compensate(step, after) if compensate is not None else after)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(
    ("sampler", "spec"),
    [
        (SamplerSpec(), spec_of()),
        (SamplerSpec(eta=0.7, clip=1.0), spec_of(learned_sigma=False)),
        (SamplerSpec(name="ddpm", variance="learned"), spec_of(cfg_channels=4)),
        (SamplerSpec(name="ddpm", variance="fixed-large", clip=0.5), spec_of(prediction="v")),
        (SamplerSpec(name="ddpm", variance="fixed-small"), spec_of(prediction="sample", learned_sigma=False)),
    ],
)
def test_update_is_the_arithmetic_of_the_host(
    sampler: SamplerSpec, spec: ModelSpec, guidance: float, compensated: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    table = sampler_table(spec.diffusion, sampler, STEPS)
    compensation = (
        TableCompensation(k=rng.uniform(0.9, 1.1, (STEPS, 4)), mu=rng.normal(size=(STEPS, 4))) if compensated else None
    )
    form = UpdateForm.of(table, spec, guidance)
    save_graph(update_model(spec, form, IMAGES), tmp_path / "update.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "update.onnx"), providers=["CPUExecutionProvider"])
    assert ("z" in {port.name for port in session.get_inputs()}) == form.adds_noise
    halves = Guidance.of(spec, guidance).halves
    tables = sampler_tables(table)
    if compensation is not None:
        tables |= {"compensation.k": compensation.k, "compensation.mu": compensation.mu}
    rows = update_rows(tables, 4)
    for step in range(STEPS):
        x, z = (rng.standard_normal((IMAGES, 4, 3, 5), dtype=np.float32) for _ in range(2))
        out = rng.standard_normal((IMAGES * halves, spec.out_channels, 3, 5), dtype=np.float32)
        feeds = {"x": np.concatenate([x] * halves), "out": out, "row": rows[step], "z": z}
        (after,) = session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()})
        row = {name: float(column[step]) for name, column in table.items()}
        expected = host_step(spec, row, guidance, x, out, z, compensation, step)
        for half in range(halves):
            part = after[half * IMAGES : (half + 1) * IMAGES]
            assert np.abs(part - expected).max() <= 2e-6 * np.abs(expected).max()


def test_a_step_without_compensation_is_left_as_it_is() -> None:
    table = sampler_table(DiffusionSpec(), SamplerSpec(), STEPS)
    tables = sampler_tables(table)
    tables |= {"compensation.k": np.ones((STEPS, 4)), "compensation.mu": np.full((STEPS, 4), 3.0)}
    rows = update_rows(tables, 4)
    assert (rows[:, len(COLUMNS) + 4 :] == 0).all()  # 0 + 1 * (x - 0) is x itself


def test_update_breaks_no_rule_of_tensorrt() -> None:
    spec = spec_of()
    table = sampler_table(spec.diffusion, SamplerSpec(name="ddpm", variance="learned", clip=1.0), STEPS)
    model = update_model(spec, UpdateForm.of(table, spec, 1.5), IMAGES)
    assert list(violations_of(model)) == []
    footprint = footprint_of(model, {})
    assert footprint.inputs["x"].shape == (2 * IMAGES, 4, 3, 5)
    # guidance alone holds two predictions and their difference at one time
    assert footprint.activation_bytes > 3 * 4 * IMAGES * 3 * 3 * 5


def with_memory(memory: int, eta: float = 0.0) -> dict[str, np.ndarray]:
    """Columns of DDIM, and random ones for so many earlier steps."""
    rng = np.random.default_rng(3)
    table = dict(sampler_table(DiffusionSpec(), SamplerSpec(eta=eta), STEPS))
    for pair in history_columns(memory):
        table |= {name: rng.uniform(-1, 1, STEPS) for name in pair}
    return table


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("memory", [1, 3])
def test_update_looks_back_as_the_host_does_with_noise_and_without(
    memory: int, guidance: float, eta: float, tmp_path: Path
) -> None:
    spec, table, rng = spec_of(), with_memory(memory, eta), np.random.default_rng(0)
    z = rng.standard_normal((IMAGES, 4, 3, 5), dtype=np.float32)
    halves = Guidance.of(spec, guidance).halves
    save_graph(update_model(spec, UpdateForm.of(table, spec, guidance), IMAGES), tmp_path / "update.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "update.onnx"), providers=["CPUExecutionProvider"])
    x, *earlier = (rng.standard_normal((IMAGES, 4, 3, 5), dtype=np.float32) for _ in range(1 + 2 * memory))
    out = rng.standard_normal((IMAGES * halves, spec.out_channels, 3, 5), dtype=np.float32)
    pairs = list(zip(earlier[::2], earlier[1::2], strict=True))
    feeds = {"x": np.concatenate([x] * halves), "out": out, "row": update_rows(sampler_tables(table), 4)[1]}
    feeds |= {"z": z} if eta else {}
    for (of_x, of_out), (earlier_x, earlier_out) in zip(history_columns(memory), pairs, strict=True):
        feeds |= {of_x: np.concatenate([earlier_x] * halves), of_out: earlier_out}
    after, predicted = session.run(["next", "predicted"], feeds)
    prediction, _ = Guidance.of(spec, guidance).combine(out, IMAGES)
    row = {name: float(column[1]) for name, column in table.items()}
    expected = update(row, x, prediction, None, z, pairs)
    for half in range(halves):
        part = after[half * IMAGES : (half + 1) * IMAGES]
        assert np.abs(part - expected).max() <= 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(predicted, prediction, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_an_update_that_looks_back_breaks_no_rule_of_tensorrt(eta: float) -> None:
    spec, table = spec_of(), with_memory(3, eta)
    assert list(violations_of(update_model(spec, UpdateForm.of(table, spec, 1.5), IMAGES))) == []
