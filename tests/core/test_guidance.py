"""Guidance: which rows a network is given, and what becomes of the ones that it returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.errors import InputError
from ditc.guidance import Guidance, halves_of
from ditc.requests import Request
from ditc.spec import DiffusionSpec, ModelSpec

SPEC = ModelSpec(
    name="small",
    family="dit",
    in_channels=4,
    height=3,
    width=5,
    num_classes=3,
    null_label=3,
    cfg_channels=3,
    branches=("a",),
    branch_shape=(1, 1),
    parameters=0,
)
COUNT = 2


def returned(spec: ModelSpec, weight: float) -> np.ndarray:
    """Return what a network may give for COUNT images."""
    shape = COUNT * halves_of(weight), *spec.prediction_shape
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@given(weight=st.floats(0.25, 16).filter(lambda weight: weight != 1), learned=st.booleans())
def test_guided_channels_go_from_the_unconditional_prediction_towards_the_conditional(
    weight: float, learned: bool
) -> None:
    spec = SPEC.model_copy(update={"diffusion": DiffusionSpec(learned_sigma=learned)})
    out = returned(spec, weight)
    conditional, unconditional = np.split(out, 2)
    prediction, raw_variance = Guidance.of(spec, weight).combine(out, COUNT)
    expected = unconditional[:, :3] + np.float32(weight) * (conditional[:, :3] - unconditional[:, :3])
    assert np.array_equal(prediction[:, :3], expected)
    assert np.array_equal(prediction[:, 3], conditional[:, 3])
    assert (raw_variance is not None) == learned
    if raw_variance is not None:
        assert np.array_equal(raw_variance, conditional[:, 4:])


@given(weight=st.floats(0.25, 16), learned=st.booleans())
def test_gradients_are_pulled_back_by_the_transpose_of_combining(weight: float, learned: bool) -> None:
    spec = SPEC.model_copy(update={"diffusion": DiffusionSpec(learned_sigma=learned)})
    guidance, out = Guidance.of(spec, weight), returned(spec, weight)
    gradient = np.random.default_rng(1).standard_normal((COUNT, *spec.latent_shape), np.float32)
    before = gradient.copy()
    rows = guidance.pulled_back(gradient)
    assert rows.shape == out.shape
    assert rows.dtype == np.float32
    prediction, _ = guidance.combine(out, COUNT)
    sizes = np.linalg.norm(out) * np.linalg.norm(rows)
    assert abs((rows.astype(float) * out).sum() - (prediction.astype(float) * gradient).sum()) < 1e-5 * sizes
    assert np.array_equal(gradient, before)


def test_combining_leaves_what_the_network_returned_alone() -> None:
    out = returned(SPEC, 2.0)
    Guidance.of(SPEC, 2.0).combine(out, COUNT)
    assert np.array_equal(out, returned(SPEC, 2.0))


def test_without_guidance_the_only_row_of_an_image_is_its_prediction() -> None:
    guidance, out = Guidance.of(SPEC, 1.0), returned(SPEC, 1.0)
    assert guidance.halves == halves_of(1.0) == 1
    assert np.array_equal(guidance.combine(out, COUNT)[0], out[:, :4])
    assert guidance.row_conditions(Request.of(SPEC, [2, 0]))["y"].tolist() == [2, 0]
    assert np.array_equal(guidance.rows(out), out)


def test_with_guidance_all_images_come_once_with_their_class_and_once_without() -> None:
    guidance, x = Guidance.of(SPEC, 1.5), returned(SPEC, 1.0)
    assert guidance.halves == halves_of(1.5) == 2
    labels = guidance.row_conditions(Request.of(SPEC, [2, 0]))["y"]
    assert (labels.tolist(), labels.dtype) == ([2, 0, 3, 3], np.int64)
    assert np.array_equal(guidance.rows(x), np.concatenate([x, x]))


@pytest.mark.parametrize(
    ("changes", "weight", "told"),
    [
        ({"null_label": None}, 1.5, "small has no unconditional class, so guidance must be 1, found 1.5"),
        ({}, 0.0, "guidance must be above 0 and finite, found 0"),
        ({}, float("nan"), "guidance must be above 0 and finite, found nan"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(changes: dict[str, None], weight: float, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Guidance.of(SPEC.model_copy(update=changes), weight)


@pytest.mark.parametrize("changes", [{"guided_channels": 0}, {"guided_channels": 5}, {"conditions": ()}])
def test_a_guidance_that_contradicts_itself_is_none(changes: dict[str, Any]) -> None:
    settings = {"weight": 2.0, "channels": 4, "guided_channels": 3, "learned_variance": True, "conditions": SPEC.inputs}
    with pytest.raises(InputError, match="guidance"):
        Guidance(**settings | changes)  # type: ignore[arg-type]


def test_a_model_without_a_null_class_runs_without_guidance() -> None:
    unguided = SPEC.model_copy(update={"null_label": None})
    assert not unguided.can_be_guided
    assert Guidance.of(unguided, 1.0).halves == 1


def test_classes_take_turns_from_any_image_on() -> None:
    assert SPEC.labels_in_turn(0, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert SPEC.labels_in_turn(4, 3) == SPEC.labels_in_turn(0, 7)[4:]
    assert SPEC.labels_in_turn(4, 0) == []
