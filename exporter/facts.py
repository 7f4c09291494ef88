"""What weights don't tell of a model: stated by the user, or kept by the training script beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

from ditc.errors import CheckpointError, InputError, unknown_name

__all__ = ["FACT_OPTIONS", "ModelFacts", "TrainingArgs", "beta_schedule_facts", "given_options", "training_args"]

Prediction = Literal["epsilon", "v", "sample"]
BetaSchedule = Literal["linear", "scaled-linear", "squared-cosine"]

# fields of ModelFacts -> the option of the command line that states them
OPTIONS = {
    "classes": "--classes",
    "null_class": "--no-null",
    "prediction": "--prediction",
    "beta_schedule": "--beta-schedule",
    "beta_range": "--beta-schedule",
    "train_steps": "--train-steps",
}
FACT_OPTIONS = tuple(dict.fromkeys(OPTIONS.values()))


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that its file does not state; None leaves one to the training script's record, or to a guess.

    `null_class` says whether the last row of the label table is for "no class". `beta_range` are the first and last
    beta of `beta_schedule`. Raises InputError for one that can't be.
    """

    classes: int | None = None
    null_class: bool | None = None
    prediction: Prediction | None = None
    beta_schedule: BetaSchedule | None = None
    beta_range: tuple[float, float] | None = None
    train_steps: int | None = None

    def __post_init__(self) -> None:
        for kind, found, known in (
            ("prediction", self.prediction, get_args(Prediction)),
            ("beta schedule", self.beta_schedule, get_args(BetaSchedule)),
        ):
            if found is not None and found not in known:
                raise unknown_name(kind, found, known)
        for option, number, least in (("--classes", self.classes, 1), ("--train-steps", self.train_steps, 2)):
            if number is not None and (type(number) is not int or number < least):
                raise InputError(f"{option} must be a whole number from {least} on, found {number}")
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


@dataclass(frozen=True)
class TrainingArgs:
    """What a training script's arguments say of its model; None for what they don't. `size` is a key of DIT_SIZES."""

    size: str | None = None
    patch: int | None = None
    image_size: int | None = None
    classes: int | None = None
    label_dropout: float | None = None
    learn_sigma: bool | None = None
    prediction: Prediction | None = None
    beta_schedule: BetaSchedule | None = None
    train_steps: int | None = None


# names of the original code and of scripts derived from it
NOISE_SCHEDULES: dict[str, BetaSchedule] = {"linear": "linear", "squaredcos_cap_v2": "squared-cosine"}


def training_args(args: Mapping[str, Any], source: object) -> TrainingArgs:
    """Read the arguments that training scripts of the original release's kind keep in their checkpoints.

    Raises CheckpointError where they tell of a flow-matching model.
    """
    model = str(args.get("model", ""))
    _check_diffusion(model, args, source)
    size = re.fullmatch(r"DiT-(S|B|L|XL)/(\d+)", model)
    schedule = args.get("noise_schedule")
    return TrainingArgs(
        size=size[1].lower() if size else None,
        patch=int(size[2]) if size else None,
        image_size=_typed(args, "image_size", int),
        classes=_typed(args, "num_classes", int),
        label_dropout=_number(args, "class_dropout_prob"),
        learn_sigma=_typed(args, "learn_sigma", bool),
        prediction=_prediction(args),
        beta_schedule=NOISE_SCHEDULES.get(schedule) if isinstance(schedule, str) else None,
        train_steps=_typed(args, "diffusion_steps", int),
    )


def _prediction(args: Mapping[str, Any]) -> Prediction | None:
    named, clean = args.get("prediction"), args.get("predict_xstart")
    if named in get_args(Prediction):
        return cast(Prediction, named)
    return None if not isinstance(clean, bool) else "sample" if clean else "epsilon"


def _check_diffusion(model: str, args: Mapping[str, Any], source: object) -> None:
    flows = ["path_type"] * ("path_type" in args) + ["prediction"] * (args.get("prediction") in ("velocity", "score"))
    if flows or model.startswith("SiT"):
        said = ", ".join(f"{name} {args[name]}" for name in ("model", *flows) if name in args)
        raise CheckpointError(
            f"{source} was trained for flow matching, its training script's arguments say: {said}; ditc knows "
            "diffusion over betas, not flows"
        )


def _typed(args: Mapping[str, Any], name: str, kind: type) -> Any:
    found = args.get(name)
    return found if type(found) is kind else None


def _number(args: Mapping[str, Any], name: str) -> float | None:
    found = args.get(name)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        return None
    return float(found)
