"""Facts that a model's weights don't tell, as the user states them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ditc.choices import BetaSchedule, FlowTimes, ProcessPrediction, names_of
from ditc.errors import InputError, unknown_name
from ditc.exporter.config_files import LARGEST

__all__ = ["FACT_OPTIONS", "ModelFacts", "beta_schedule_facts", "check_asked_for_no_text", "given_options"]

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
}
FACT_OPTIONS = tuple(dict.fromkeys(OPTIONS.values()))


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that its file does not state; None leaves one to the training script's record, or to a guess.

    `null_class` says whether the last row of the label table is for "no class". `flow_times` are those of a flow at its
    noise and at its data, as the network is given them. `beta_range` are the first and last beta of `beta_schedule`.
    `text_tokens` is how long the texts are that a model will be asked with. Raises InputError for one that can't be.
    """

    classes: int | None = None
    null_class: bool | None = None
    prediction: ProcessPrediction | None = None
    flow_times: FlowTimes | None = None
    beta_schedule: BetaSchedule | None = None
    beta_range: tuple[float, float] | None = None
    train_steps: int | None = None
    text_tokens: int | None = None

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("prediction", self.prediction, names_of(ProcessPrediction)),
            ("flow times", self.flow_times, names_of(FlowTimes)),
            ("beta schedule", self.beta_schedule, names_of(BetaSchedule)),
        ):
            if name is not None and name not in known:
                raise unknown_name(kind, name, known)
        for option, number, least in (
            ("--classes", self.classes, 1),
            ("--train-steps", self.train_steps, 2),
            ("--text-tokens", self.text_tokens, 1),
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


def given_options(facts: ModelFacts) -> list[str]:
    """The options that state what these facts state, in the order of OPTIONS, each once."""
    given = [OPTIONS[field.name] for field in fields(facts) if getattr(facts, field.name) is not None]
    return list(dict.fromkeys(given))


def check_asked_for_no_text(facts: ModelFacts, source: Path) -> None:
    """Raise InputError for facts about texts where a model, read from `source`, takes none."""
    if facts.text_tokens is not None:
        raise InputError(f"{source} is of a DiT, which is asked for with a class and no text; leave out --text-tokens")
