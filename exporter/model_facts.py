"""Facts that a model's weights don't tell, as the user states them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ditc.choices import BetaSchedule, FlowTimes, ProcessPrediction, names_of
from ditc.errors import InputError, unknown_name
from ditc.exporter.config_files import LARGEST

__all__ = ["FACT_OPTIONS", "ModelFacts", "beta_schedule_facts", "check_of_dit", "given_options", "size_fact"]

# fields of ModelFacts -> the option of the command line that states them
OPTIONS = {
    "classes": "--classes",
    "null_class": "--no-null",
    "prediction": "--prediction",
    "flow_times": "--flow-times",
    "beta_schedule": "--beta-schedule",
    "beta_range": "--beta-schedule",
    "train_steps": "--train-steps",
    "text_tokens": "--text-tokens",
    "size": "--size",
}
FACT_OPTIONS = tuple(dict.fromkeys(OPTIONS.values()))


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that its file does not state; None leaves one to the training script's record, or to a guess.

    `null_class` says whether the last row of the label table is for "no class". `flow_times` are those of a flow at its
    noise and at its data, as the network is given them. `beta_range` are the first and last beta of `beta_schedule`.
    `text_tokens` is how long the texts are that a model will be asked with, `size` (height, width) in pixels of the
    pictures that it shall make. Raises InputError for one that can't be.
    """

    classes: int | None = None
    null_class: bool | None = None
    prediction: ProcessPrediction | None = None
    flow_times: FlowTimes | None = None
    beta_schedule: BetaSchedule | None = None
    beta_range: tuple[float, float] | None = None
    train_steps: int | None = None
    text_tokens: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("prediction", self.prediction, names_of(ProcessPrediction)),
            ("flow times", self.flow_times, names_of(FlowTimes)),
            ("beta schedule", self.beta_schedule, names_of(BetaSchedule)),
        ):
            if name is not None and name not in known:
                raise unknown_name(kind, name, known)
        if self.size is not None and not (isinstance(self.size, tuple) and len(self.size) == 2):
            raise InputError(f"size must be (height, width) in pixels, found {self.size!r}")
        for option, number, least in (
            ("--classes", self.classes, 1),
            ("--train-steps", self.train_steps, 2),
            ("--text-tokens", self.text_tokens, 1),
            *(("--size", side, 1) for side in self.size or ()),
        ):
            if number is not None and (type(number) is not int or not least <= number <= LARGEST):
                raise InputError(f"{option} must be a whole number from {least} to {LARGEST}, found {number}")
        if self.beta_range is not None:
            self._check_betas(*self.beta_range)

    def _check_betas(self, first: float, last: float) -> None:
        if self.beta_schedule in (None, "squared-cosine"):
            raise InputError(f"betas from {first:g} to {last:g} belong to a schedule: linear or scaled-linear")
        if not 0 < first <= last < 1:
            raise InputError(f"--beta-schedule needs 0 < START <= END < 1, found {first:g} and {last:g}")


def beta_schedule_facts(text: str | None) -> dict[str, Any]:
    """Fields of ModelFacts from "NAME" or "NAME:START:END". Raises InputError for another form."""
    if text is None:
        return {}
    name, *ends = text.split(":")
    if not ends:
        return {"beta_schedule": name}
    try:
        first, last = (float(end) for end in ends)
    except ValueError as e:
        raise InputError(f"--beta-schedule must be NAME or NAME:START:END, found {text!r}") from e
    return {"beta_schedule": name, "beta_range": (first, last)}


def size_fact(text: str | None) -> tuple[int, int] | None:
    """Return the height and width of "HxW", or of "SIDE" for a square. Raises InputError for another form."""
    if text is None:
        return None
    sides = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text, re.ASCII)
    if sides is None:
        raise InputError(f"--size needs pixels, as 512 for a square or 512x768 for height and width, found {text!r}")
    return int(sides[1]), int(sides[2] or sides[1])


def given_options(facts: ModelFacts) -> list[str]:
    """The options that state what these facts state, in the order of OPTIONS, each once."""
    given = [OPTIONS[field.name] for field in fields(facts) if getattr(facts, field.name) is not None]
    return list(dict.fromkeys(given))


def check_of_dit(facts: ModelFacts, source: Path) -> None:
    """Raise InputError for facts that can be none of a DiT, read from `source`."""
    if facts.text_tokens is not None:
        raise InputError(f"{source} is of a DiT, which is asked for with a class and no text; leave out --text-tokens")
    if facts.size is not None:
        raise InputError(
            f"{source} is of a DiT, which was trained at one size with the positions of that size; leave out --size"
        )
