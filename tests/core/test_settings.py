"""Settings are checked at birth and at every copy, and what is wrong is one line that names the option."""

from __future__ import annotations

import subprocess
import sys
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
        ({"speed": float("inf")}, "--speed must be a finite number, found inf"),
        ({"speed": "fast"}, "--speed must be a number, found 'fast'"),
        ({"colour": "green"}, "unknown --paint 'green'; choose one of: blue, red"),
        ({"colour": Path("red")}, "--paint must be one of: red, blue; found PosixPath('red')"),
        ({"speed": "9" * 400 + "x"}, f"--speed must be a number, found '{'9' * 79}..."),
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


def test_an_integer_of_thousands_of_digits_is_refused_though_python_does_not_write_it() -> None:
    with pytest.raises(InputError, match=r"--wheels .* found an integer too long to show"):
        Ride(wheels=10**5000)


@pytest.mark.parametrize("values", [3, None, [1]], ids=str)
def test_what_is_no_settings_at_all_is_one_line(values: Any) -> None:
    with pytest.raises(InputError, match="Ride must be made of settings by name, found"):
        Ride.model_validate(values)


def test_a_setting_that_is_not_named_by_a_text_is_unknown() -> None:
    with pytest.raises(InputError, match="unknown setting '3'"):
        Ride.model_validate({3: 4})


def test_what_is_missing_is_named() -> None:
    class Journey(Settings):
        goal: Annotated[str, Option("Goal.")]

    with pytest.raises(InputError, match="--goal is missing"):
        Journey()


def test_a_copy_has_what_was_changed_and_the_rest() -> None:
    assert Ride(wheels=3).model_copy(update={"colour": "red"}) == Ride(wheels=3, colour="red")


def test_settings_load_under_the_oldest_pydantic() -> None:
    """2.7 does not offer at its top what the checks need."""
    code = "import pydantic\nlater = pydantic.__getattr__\npydantic.ModelWrapValidatorHandler\n"
    code += "del pydantic.ModelWrapValidatorHandler\ndef older(name):\n"
    code += "    if name == 'ModelWrapValidatorHandler': raise AttributeError(name)\n    return later(name)\n"
    code += "pydantic.__getattr__ = older\nimport ditc.settings"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Ride().wheels = 3  # type: ignore[misc]


def test_options_are_the_fields_that_show_in_their_order() -> None:
    assert [name for name, _, _ in options_of(Ride)] == ["wheels", "speed", "colour", "stops", "bell", "garage"]
    assert [flag_of(Ride, name) for name in ("wheels", "colour", "spare")] == ["--wheels", "--paint", "spare"]
