"""A training script's command line, kept beside the weights: read, refused by its name, or named as not read.

The names are those of the original release and of scripts that derive from it, from guided-diffusion or from diffusers.
Silence about one that speaks of the noise process would be another model's process without a word.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ditc.choices import BetaSchedule, FlowTimes, Prediction, ProcessPrediction
from ditc.errors import CheckpointError, one_line
from ditc.exporter.config_files import LARGEST, spelled
from ditc.exporter.model_facts import ModelFacts, given_options

__all__ = ["TrainingArgs", "training_args"]

T = TypeVar("T")

SCHEDULES: dict[str, BetaSchedule] = {
    "linear": "linear",
    "scaled_linear": "scaled-linear",
    "squaredcos_cap_v2": "squared-cosine",
    "cosine": "squared-cosine",  # guided-diffusion's name for it
}
PREDICTIONS: dict[str, Prediction] = {
    **dict.fromkeys(("epsilon", "eps", "noise", "pred_noise", "pred_epsilon"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v_pred", "pred_v"), "v"),
    **dict.fromkeys(("sample", "x0", "x_0", "xstart", "x_start", "start_x", "pred_x0", "pred_xstart"), "sample"),
}
FLOWS = ("velocity", "flow", "flow_prediction", "flow_matching", "rectified_flow")
NO_FLOWS = ("score",)  # of the same scripts, and not known here

PREDICTION_NAMES = ("prediction", "prediction_type", "objective", "parameterization", "pred_type", "model_mean_type")
# flags -> what is predicted where they are set
PREDICTION_FLAGS: dict[str, Prediction] = {
    **dict.fromkeys(("predict_xstart", "predict_x0", "pred_x0"), "sample"),
    **dict.fromkeys(("predict_v", "v_prediction", "v_pred", "pred_v"), "v"),
    **dict.fromkeys(("predict_epsilon", "predict_eps", "predict_noise"), "epsilon"),
}
SCHEDULE_NAMES = ("noise_schedule", "beta_schedule")
RANGE_NAMES = (("beta_start", "beta_end"), ("linear_start", "linear_end"))
STEP_NAMES = ("diffusion_steps", "num_train_timesteps", "num_diffusion_steps", "num_diffusion_timesteps")
FLOW_FLAGS = ("flow_matching", "rectified_flow", "use_flow", "flow")
PATH = "path_type"  # of a flow; a straight one is linear
# (path, prediction) as a script spells them -> the times of its flow: SiT's own, and those of REPA's scripts
TIMES: dict[tuple[str, str], FlowTimes] = {("Linear", "velocity"): "0:1", ("linear", "v"): "1:0"}
ZERO_SNR = ("rescale_betas_zero_snr", "zero_terminal_snr", "enforce_zero_terminal_snr", "zero_snr")
RESCALED = "rescale_timesteps"  # of guided-diffusion: models see timesteps as if there were 1,000
RESCALED_STEPS = 1000
SHAPES = ("model", "image_size", "num_classes", "class_dropout_prob", "learn_sigma")
READ = {
    *(
        *SHAPES,
        *PREDICTION_NAMES,
        *PREDICTION_FLAGS,
        *SCHEDULE_NAMES,
        *STEP_NAMES,
        *ZERO_SNR,
        *FLOW_FLAGS,
        RESCALED,
        PATH,
    ),
    *(name for names in RANGE_NAMES for name in names),
}
DEEPEST = 3  # levels of arguments in arguments that are looked into
# names that speak of the noise process, and the words in names that only look so
SPEAKS = re.compile(
    r"beta|schedule|predict|objective|parameteri[sz]ation|diffusion|timestep|snr|sigma|flow|shift|edm|noise|sde"
)
LOOKS_SO = re.compile(
    r"^betas$|(?:^|_)(?:lr|learning|adamw?|optim\w*|beta_?[12]|ema|sampler?|sampling|respacing|gamma|weight\w*|loss|log"
    r"|dir|path|every)(?:_|$)"
)


@dataclass(frozen=True)
class TrainingArgs:
    """Facts of a model in its training script's arguments, None for those not there. `size` is a key of DIT_SIZES.

    `flow_times` are those of a flow at noise and at data. `unread` are those that speak of the process, or of the
    model's shapes, and are not understood, each with its value.
    """

    size: str | None = None
    patch: int | None = None
    image_size: int | None = None
    classes: int | None = None
    label_dropout: float | None = None
    learn_sigma: bool | None = None
    prediction: ProcessPrediction | None = None
    flow_times: FlowTimes | None = None
    beta_schedule: BetaSchedule | None = None
    beta_range: tuple[float, float] | None = None
    train_steps: int | None = None
    unread: tuple[str, ...] = ()


def training_args(args: Mapping[str, Any], source: object, facts: ModelFacts | None = None) -> TrainingArgs:
    """Read the arguments that training scripts of the original release's kind keep in their checkpoints.

    What `facts` state is not asked for. Raises CheckpointError where they tell of a process that is not known here, or
    say of it something that is not understood, or two things.
    """
    facts = facts or ModelFacts()
    said = _Said({name: value for name, value in args.items() if value is not None}, source, given_options(facts))
    model = args["model"] if isinstance(args.get("model"), str) else ""
    _check_betas(said)
    flow = _tells_of_a_flow(model, said)
    if flow:
        _check_flow(said, facts.prediction)
    size = re.fullmatch(r"[DS]iT-(S|B|L|XL)/(\d+)", model)
    steps = said.agreed(dict.fromkeys(STEP_NAMES, _steps), "--train-steps", f"a whole number from 2 to {LARGEST}")
    _check_timesteps(said, facts.train_steps or steps or RESCALED_STEPS)
    return TrainingArgs(
        size=size[1].lower() if size else None,
        patch=int(size[2]) if size else None,
        image_size=said.perhaps("image_size", _whole),
        classes=said.perhaps("num_classes", _whole),
        label_dropout=said.perhaps("class_dropout_prob", _share),
        learn_sigma=said.perhaps("learn_sigma", _flag),
        prediction="flow" if flow else _prediction(said),
        flow_times=_flow_times(args) if flow else None,
        beta_schedule=said.agreed(
            dict.fromkeys(SCHEDULE_NAMES, _schedule_named),
            "--beta-schedule",
            f"one of: {', '.join(SCHEDULES)}",
        ),
        beta_range=_beta_range(said),
        train_steps=steps,
        unread=_unread(said),
    )


@dataclass(frozen=True)
class _Said:
    """Arguments that are not None, where they are from, and the options that take their place."""

    args: Mapping[str, Any]
    source: object
    options: Collection[str]

    def error(self, names: Collection[str], remark: str) -> CheckpointError:
        """The error about some arguments and their values."""
        named = " and ".join(f"{name} {spelled(self.args[name])}" for name in names)
        return CheckpointError(f"{self.source}: its training script's arguments say {named}, {remark}")

    def perhaps(self, name: str, read: Callable[[Any], T]) -> T | None:
        """Read one argument; None where it is not there or not understood."""
        try:
            return read(self.args[name]) if name in self.args else None
        except (ValueError, OverflowError):
            return None

    def agreed(self, readers: Mapping[str, Callable[[Any], T | None]], option: str, expected: str) -> T | None:
        """Read one fact from arguments of several names, unless an option states it. Raises CheckpointError."""
        if option in self.options:
            return None
        values: dict[str, T] = {}
        for name, read in readers.items():
            try:
                value = read(self.args[name]) if name in self.args else None
            except (ValueError, OverflowError) as e:
                raise self.error([name], f"expected {expected}; state it with {option}") from e
            if value is not None:
                values[name] = value
        if len(set(values.values())) > 1:
            raise self.error(values, f"which contradict each other; state it with {option}")
        return next(iter(values.values()), None)


def _whole(value: Any) -> int:
    """Read a whole number, also as text. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or int(value) != float(value):
        raise ValueError(value)
    return int(value)


def _steps(value: Any) -> int:
    steps = _whole(value)
    if not 2 <= steps <= LARGEST:
        raise ValueError(value)
    return steps


def _share(value: Any) -> float:
    """Read a number from 0 to 1, also as text. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or not 0 <= float(value) <= 1:
        raise ValueError(value)
    return float(value)


def _flag(value: Any) -> bool:
    """Read true or false, also as text or 0 and 1. Raises ValueError."""
    return _named(str(value), {"true": True, "1": True, "false": False, "0": False})


def _named(value: Any, known: Mapping[str, T]) -> T:
    """Return a word's value, however it is cased and joined. Raises ValueError."""
    word = value.lower().replace("-", "_") if isinstance(value, str) else ""
    if word not in known:
        raise ValueError(value)
    return known[word]


def _prediction_named(value: Any) -> Prediction:
    return _named(value, PREDICTIONS)


def _schedule_named(value: Any) -> BetaSchedule:
    return _named(value, SCHEDULES)


def _prediction(said: _Said) -> Prediction | None:
    def flag_for(prediction: Prediction, unset: Prediction | None = None) -> Callable[[Any], Prediction | None]:
        return lambda value: prediction if _flag(value) else unset

    readers: dict[str, Callable[[Any], Prediction | None]] = {
        **dict.fromkeys(PREDICTION_NAMES, _prediction_named),
        **{name: flag_for(prediction) for name, prediction in PREDICTION_FLAGS.items()},
        "predict_epsilon": flag_for("epsilon", "sample"),  # as diffusers had it
    }
    prediction: Prediction | None = said.agreed(
        readers, "--prediction", "epsilon, v_prediction or sample, or true or false for a flag of one"
    )
    if prediction is None and said.perhaps("predict_xstart", _flag) is False:
        return "epsilon"  # of the release's two; another argument may say v
    return prediction


def _beta_range(said: _Said) -> tuple[float, float] | None:
    names = next((pair for pair in RANGE_NAMES if said.args.keys() & {*pair}), None)
    if names is None or "--beta-schedule" in said.options:
        return None
    first, last = (said.perhaps(name, _share) for name in names)
    if first is None or last is None or not 0 < first <= last < 1:
        given = [name for name in names if name in said.args]
        raise said.error(given, f"expected 0 < {names[0]} <= {names[1]} < 1; state them with --beta-schedule")
    return first, last


def _tells_of_a_flow(model: str, said: _Said) -> bool:
    """Do arguments tell that the model was trained for flow matching: its name, a path, a velocity, or a flag?"""
    words = dict.fromkeys((*FLOWS, *NO_FLOWS), 1)
    flags = [name for name in FLOW_FLAGS if name in said.args and said.perhaps(name, _flag) is not False]
    velocities = [name for name in PREDICTION_NAMES if said.perhaps(name, lambda value: _named(value, words))]
    return PATH in said.args or model.startswith("SiT") or bool(flags or velocities)


def _check_flow(said: _Said, stated: ProcessPrediction | None) -> None:
    """Raise CheckpointError for a flow along another path than a straight one, or that predicts no velocity."""
    named = [name for name in PREDICTION_NAMES if name in said.args]
    flags = [name for name in FLOW_FLAGS if name in said.args]
    velocities = {**dict.fromkeys(FLOWS, True), "v": True}
    straight = PATH not in said.args or said.perhaps(PATH, lambda value: _named(value, {"linear": True}))
    understood = stated == "flow" or (
        all(said.perhaps(name, lambda value: _named(value, velocities)) for name in named)
        and all(said.perhaps(name, _flag) is not None for name in flags)
    )
    if straight and understood and stated in (None, "flow"):
        return
    values = {name: said.args[name] for name in ("model", PATH, *named, *flags) if name in said.args}
    told = ", ".join(f"{name} {value if isinstance(value, str) else spelled(value)}" for name, value in values.items())
    known = "ditc knows velocities along a linear path (--prediction flow)"
    raise CheckpointError(
        f"{said.source} was trained for flow matching, its training script's arguments say: {told}; "
        f"{f'--prediction {stated} contradicts that' if straight and understood else known}"
    )


def _flow_times(args: Mapping[str, Any]) -> FlowTimes | None:
    path, prediction = args.get(PATH), args.get("prediction")
    return TIMES.get((path, prediction)) if isinstance(path, str) and isinstance(prediction, str) else None


def _check_betas(said: _Said) -> None:
    """Raise CheckpointError for betas that are rescaled to end in noise alone."""
    rescaled = [name for name in ZERO_SNR if name in said.args and said.perhaps(name, _flag) is not False]
    if rescaled:
        raise said.error(rescaled[:1], "expected False; ditc knows no betas that are rescaled to end in noise alone")


def _check_timesteps(said: _Said, steps: int) -> None:
    if steps != RESCALED_STEPS and RESCALED in said.args and said.perhaps(RESCALED, _flag) is not False:
        raise said.error(
            [RESCALED], f"of {steps} training steps; ditc gives a model its timesteps as they are, up to {steps - 1}"
        )


def _unread(said: _Said) -> tuple[str, ...]:
    """Arguments that say something and are not understood, each with its value."""
    readers: dict[str, Callable[[Any], Any]] = {
        "image_size": _whole,
        "num_classes": _whole,
        "class_dropout_prob": _share,
        "learn_sigma": _flag,
    }
    odd = [name for name, read in readers.items() if name in said.args and said.perhaps(name, read) is None]
    other = [name for name, value in said.args.items() if name not in READ and _speaks(name, value)]
    return tuple(one_line(f"{name} {spelled(said.args[name])}") for name in (*odd, *other))


def _speaks(name: str, value: Any, depth: int = 0) -> bool:
    """Does an argument say something of the noise process, itself or by one that is nested in it?"""
    empty = value is None or (isinstance(value, (bool, int, float, str, list, tuple, Mapping)) and not value)
    if empty or LOOKS_SO.search(name):
        return False
    nested = vars(value) if isinstance(value, argparse.Namespace) else value
    if isinstance(nested, Mapping) and depth < DEEPEST:
        return any(_speaks(str(inner), said, depth + 1) for inner, said in nested.items())
    return SPEAKS.search(name) is not None
