"""Settings are checked at birth and at every copy, and what is wrong is one line that names the option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from ditc.errors import InputError
from ditc.settings import Option, Settings, flag_of, options_of


class Ride(Settings):
    wheels: Annotated[int, Field(ge=1, le=4), Option("Wheels.", advice="a sledge has none")] = 2
    speed: Annotated[float, Field(gt=0, allow_inf_nan=False), Option("Speed.")] = 1.5
    colour: Annotated[Literal["red", "blue"] | None, Option("Colour.", flag="--paint")] = None
    stops: Annotated[tuple[int, ...], Option("Stops.")] = (1, 2)
    bell: Annotated[bool, Option("Has it a bell?")] = True
    garage: Annotated[Path | None, Option("Where it stands.")] = None
    spare: Annotated[int | None, Field(ge=1)] = None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wheels": 0}, "--wheels must be at least 1 and at most 4, found 0; a sledge has none"),
        ({"wheels": 1.5}, "--wheels must be a whole number, found 1.5; a sledge has none"),
        ({"speed": 0}, "--speed must be above 0, found 0"),
        ({"speed": float("inf")}, "--speed must be a number, found inf"),
        ({"speed": "fast"}, "--speed must be a number, found 'fast'"),
        ({"colour": "green"}, "unknown --paint 'green'; choose one of: blue, red"),
        ({"stops": 3}, "--stops must be a row of values, found 3"),
        ({"stops": (1, "x")}, "--stops must be a whole number, found 'x'"),
        ({"bell": "perhaps"}, "--bell must be true or false, found 'perhaps'"),
        ({"garage": 3}, "--garage must be a path, found 3"),
        ({"spare": 0}, "spare must be at least 1, found 0"),
        ({"wings": 2}, "unknown setting 'wings'; choose one of: bell, colour, garage, spare, speed, stops, wheels"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "ride_with", [lambda changes: Ride(**changes), lambda changes: Ride().model_copy(update=changes)]
)
def test_what_is_wrong_is_one_line_that_names_the_option(ride_with: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ride_with(changes)
    assert str(caught.value) == message


def test_what_is_missing_is_named() -> None:
    class Journey(Settings):
        goal: Annotated[str, Option("Goal.")]

    with pytest.raises(InputError, match="--goal is missing"):
        Journey()


def test_a_copy_has_what_was_changed_and_the_rest() -> None:
    assert Ride(wheels=3).model_copy(update={"colour": "red"}) == Ride(wheels=3, colour="red")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Ride().wheels = 3  # type: ignore[misc]


def test_options_are_the_fields_that_show_in_their_order() -> None:
    assert [name for name, _, _ in options_of(Ride)] == ["wheels", "speed", "colour", "stops", "bell", "garage"]
    assert [flag_of(Ride, name) for name in ("wheels", "colour", "spare")] == ["--wheels", "--paint", "spare"]
