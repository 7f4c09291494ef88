"""Conditions, and requests for images by them: what a spec may state, and what it is as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ditc.errors import InputError
from ditc.requests import Examples, Request
from ditc.spec import Condition, ModelSpec
from tests.core.test_schedule import SPEC

TEXT = Condition(name="text", shape=(2, 3), null="given")
NOISE = Condition(name="jitter", shape=(4,), fresh=True)


def spec_of(**changes: Any) -> ModelSpec:
    return ModelSpec.model_validate({**SPEC.model_dump(), **changes})


def test_a_picture_of_classes_is_written_with_height_and_width_and_nothing_else_new() -> None:
    written = SPEC.model_dump()
    assert list(written)[:8] == [
        *("name", "family", "in_channels", "height", "width", "num_classes", "null_label", "cfg_channels")
    ]
    assert written.keys().isdisjoint({"space", "conditions", "streams"})
    assert ModelSpec.model_validate(written) == SPEC


@pytest.mark.parametrize("space", [(), (5,), (3, 4, 4)])
def test_another_space_is_written_as_it_is(space: tuple[int, ...]) -> None:
    given = {name: value for name, value in SPEC.model_dump().items() if name not in ("height", "width")}
    spec = ModelSpec.model_validate({**given, "space": space})
    assert (spec.latent_shape, spec.is_picture) == ((1, *space), False)
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.model_copy(update={"height": 2, "width": 6}).space == (2, 6)


def test_conditions_are_in_the_order_in_which_a_model_takes_them() -> None:
    spec = spec_of(conditions=[TEXT, NOISE], null_label=10)
    assert [each.name for each in spec.inputs] == ["y", "text", "jitter"]
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert [each.name for each in spec_of(num_classes=None).network_inputs] == ["rows"]


@pytest.mark.parametrize(
    ("changes", "guided"),
    [({}, False), ({"null_label": 10}, True), ({"conditions": [TEXT]}, True), ({"conditions": [NOISE]}, False)],
)
def test_a_model_can_be_guided_where_a_condition_has_a_null(changes: dict[str, Any], guided: bool) -> None:
    assert spec_of(**changes).can_be_guided == guided


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"name": "y"}, "can't be called 'y'"),
        ({"name": "null_text"}, "can't be called 'null_text'"),
        ({"name": "Text"}, "should match pattern"),
        ({"name": "kind", "dtype": "int64"}, "integers have `classes`"),
        ({"name": "kind", "classes": 3}, "floats have none"),
        ({"name": "kind", "dtype": "int64", "classes": 3, "null": 4}, "the null 4 is no int64 that it may hold"),
        ({"name": "kind", "dtype": "int64", "classes": 3, "null": -1}, "the null -1 is no int64"),
        ({"name": "kind", "dtype": "int64", "classes": 3, "null": 0.5}, "the null 0.5 is no int64"),
        ({"name": "style", "null": float("nan")}, "the null nan is no float32"),
        ({"name": "style", "shape": (0,)}, "greater than or equal to 1"),
        ({"name": "jitter", "fresh": True, "null": 0.0}, "is fresh noise"),
    ],
)
def test_a_condition_that_makes_no_sense_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Condition(**given)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"conditions": [TEXT, TEXT]}, "two conditions have the same name"),
        ({"num_classes": None, "null_label": 3}, "the model has no classes"),
        ({"width": None}, "valid integer"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        spec_of(**changes)


def test_a_picture_with_one_side_is_refused() -> None:
    with pytest.raises(ValidationError, match="a picture has a height and a width, found only height"):
        ModelSpec.model_validate({name: value for name, value in SPEC.model_dump().items() if name != "width"})


def test_examples_and_classes_take_turns_from_any_image_on() -> None:
    spec = spec_of(conditions=[TEXT])
    texts = np.arange(18, dtype=np.float32).reshape(3, 2, 3)
    request = Examples.checked(spec, {"text": texts, "null_text": -texts[:2]}).in_turn(8, 4)
    assert request.labels == [8, 9, 0, 1]
    assert np.array_equal(request.arrays["text"], texts[[2, 0, 1, 2]])
    assert np.array_equal(request.arrays["null_text"], -texts[[0, 1, 0, 1]])


def test_parts_of_a_request_keep_what_belongs_to_an_image() -> None:
    spec = spec_of(conditions=[NOISE])
    noise = np.arange(24, dtype=np.float32).reshape(2, 3, 4)  # (steps, images, ...)
    request = Request.of(spec, [1, 2, 3]).with_fresh({"jitter": noise})
    part = request.take(spec, [2, 0])
    assert (len(part), part.labels) == (2, [3, 1])
    assert np.array_equal(part.arrays["jitter"], noise[:, [2, 0]])
    filled = request.filled(spec, 5)
    assert filled.labels == [1, 2, 3, 1, 2]
    assert np.array_equal(filled.arrays["jitter"], noise[:, [0, 1, 2, 0, 1]])


def test_numbers_that_float32_can_not_hold_are_refused() -> None:
    spec = spec_of(num_classes=None, conditions=[Condition(name="style", shape=(1,), null=0.0)])
    with pytest.raises(InputError, match="holds NaN or infinite numbers"):
        Request.of(spec, conditions={"style": np.array([[1e300]])})
