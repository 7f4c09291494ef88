"""A training script's arguments: whatever one says of the model is read, refused by its name, or named as not read."""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import pytest
import torch

from ditc.errors import CheckpointError
from ditc.exporter.model_facts import ModelFacts
from ditc.exporter.schedulers import SCHEDULERS
from ditc.exporter.training_args import (
    FLOW_FLAGS,
    FLOWS,
    PREDICTION_FLAGS,
    PREDICTION_NAMES,
    PREDICTIONS,
    SCHEDULE_NAMES,
    SCHEDULES,
    STEP_NAMES,
    ZERO_SNR,
    TrainingArgs,
    training_args,
)

SOURCE = "mine.pt"
# all that the original training script keeps
RELEASED = {
    "data_path": "/data",
    "results_dir": "results",
    "model": "DiT-XL/2",
    "image_size": 256,
    "num_classes": 1000,
    "epochs": 1400,
    "global_batch_size": 256,
    "global_seed": 0,
    "vae": "ema",
    "num_workers": 4,
    "log_every": 100,
    "ckpt_every": 50000,
}
# arguments of optimizers, logs and losses, whose names have words of the noise process
OF_TRAINING = {
    "lr_schedule": "cosine",
    "lr_scheduler": "constant",
    "adam_beta1": 0.9,
    "beta2": 0.95,
    "betas": [0.9, 0.999],
    "schedule_sampler": "uniform",
    "ema_beta": 0.999,
    "snr_gamma": 5.0,
    "timestep_respacing": "250",
    "noise_log_dir": "runs",
}


def refusal(args: dict[str, Any], facts: ModelFacts | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        training_args(args, SOURCE, facts)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(SOURCE)
    assert len(message) < 400
    return message


def told(**args: Any) -> TrainingArgs:
    return training_args(args, SOURCE)


def test_the_release_s_own_arguments_are_read_and_leave_nothing() -> None:
    expected = TrainingArgs(size="xl", patch=2, image_size=256, classes=1000)
    assert training_args(RELEASED, SOURCE) == expected
    assert training_args(RELEASED | OF_TRAINING, SOURCE) == expected


@pytest.mark.parametrize(("name", "word"), list(product(PREDICTION_NAMES, PREDICTIONS)))
def test_a_prediction_is_known_under_every_name_and_spelling(name: str, word: str) -> None:
    for spelling in (word, word.upper(), word.replace("_", "-")):
        assert told(**{name: spelling}) == TrainingArgs(prediction=PREDICTIONS[word])
        assert told(**{name: spelling, "predict_xstart": False}).prediction == PREDICTIONS[word]


@pytest.mark.parametrize("flag", PREDICTION_FLAGS)
def test_a_prediction_is_known_by_its_flag(flag: str) -> None:
    expected = PREDICTION_FLAGS[flag]
    for value in (True, "True", "true", 1):
        assert told(**{flag: value}) == TrainingArgs(prediction=expected)
    unset = {"predict_xstart": "epsilon", "predict_epsilon": "sample"}.get(flag)
    assert told(**{flag: False}) == TrainingArgs(prediction=unset)  # type: ignore[arg-type]
    other = "v" if expected != "v" else "epsilon"
    message = refusal({flag: True, "prediction_type": other})
    assert f"prediction_type '{other}' and {flag} true, which contradict each other; state it with --prediction" in (
        message
    )


@pytest.mark.parametrize(("name", "word"), list(product(SCHEDULE_NAMES, SCHEDULES)))
def test_a_beta_schedule_is_known_under_every_name_and_spelling(name: str, word: str) -> None:
    for spelling in (word, word.replace("_", "-")):
        assert told(**{name: spelling}) == TrainingArgs(beta_schedule=SCHEDULES[word])


@pytest.mark.parametrize("name", STEP_NAMES)
def test_training_steps_are_known_under_every_name(name: str) -> None:
    for value in (500, "500", 500.0):
        assert told(**{name: value}) == TrainingArgs(train_steps=500)


@pytest.mark.parametrize(("first", "last"), [("beta_start", "beta_end"), ("linear_start", "linear_end")])
def test_the_ends_of_the_betas_are_read(first: str, last: str) -> None:
    assert told(**{first: 1e-3, last: "0.01"}).beta_range == (1e-3, 1e-2)
    for wrong in ({first: 0.1}, {first: 0.2, last: 0.1}, {first: 0, last: 0.1}, {first: "a", last: 0.1}):
        assert "state them with --beta-schedule" in refusal(wrong)


STATED = ModelFacts(prediction="v", beta_schedule="linear", beta_range=(0.001, 0.01), train_steps=400)
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
ODD = (
    CYCLE,
    torch.ones(2),
    10**5000,
    "odd",
    "",
    2.5,
    -1,
    10**9,
    10**400,
    float("nan"),
    float("inf"),
    ["linear"],
    {"a": 1},
    "two\nlines",
    "x" * 500,
)


@pytest.mark.parametrize("name", [*PREDICTION_NAMES, *SCHEDULE_NAMES, *STEP_NAMES, *PREDICTION_FLAGS])
def test_a_value_that_is_not_understood_is_refused_unless_an_option_states_it(name: str) -> None:
    for value in (*ODD, True) if name in (*PREDICTION_NAMES, *SCHEDULE_NAMES, *STEP_NAMES) else ODD:
        message = refusal({name: value})
        assert f"arguments say {name} " in message
        assert "; state it with --" in message
        read = training_args({name: value}, SOURCE, STATED)
        assert (read.prediction, read.beta_schedule, read.train_steps) == (None, None, None)


@pytest.mark.parametrize("name", ["num_classes", "image_size", "class_dropout_prob", "learn_sigma"])
def test_a_fact_of_the_shapes_that_is_not_understood_is_named(name: str) -> None:
    for value in ("odd", [256, 256], 1e400, float("nan")):
        (line,) = told(**{name: value}).unread
        assert line.startswith(f"{name} ")
    assert told(**{name: None}) == TrainingArgs()


def test_numbers_and_flags_as_text_are_read() -> None:
    read = told(num_classes="10", image_size="256", class_dropout_prob="0.1", learn_sigma="False")
    assert read == TrainingArgs(classes=10, image_size=256, label_dropout=0.1, learn_sigma=False)


@pytest.mark.parametrize("name", ZERO_SNR)
def test_rescaled_betas_are_refused(name: str) -> None:
    assert f"say {name} true, expected False" in refusal({name: True}, STATED)
    assert told(**{name: False}) == TrainingArgs()


@pytest.mark.parametrize(("name", "word"), list(product(PREDICTION_NAMES, FLOWS)))
def test_a_velocity_is_a_flow_under_every_name_and_spelling_unless_something_else_is_stated(
    name: str, word: str
) -> None:
    for spelling in (word, word.upper(), word.replace("_", "-")):
        assert told(**{name: spelling}) == TrainingArgs(prediction="flow")
    message = refusal({name: word}, STATED)
    assert (
        f"was trained for flow matching, its training script's arguments say: {name} {word}; --prediction v" in message
    )


@pytest.mark.parametrize("name", FLOW_FLAGS)
def test_a_flag_of_flow_matching_tells_of_a_flow(name: str) -> None:
    for value in (True, "true", 1):
        assert told(**{name: value}) == TrainingArgs(prediction="flow")
    for value in ODD[:3]:
        assert "was trained for flow matching" in refusal({"path_type": value, name: value})
        assert f"say: {name} " in refusal({name: value})
        assert training_args({name: value}, SOURCE, ModelFacts(prediction="flow")).prediction == "flow"
    assert told(**{name: False}) == TrainingArgs()


@pytest.mark.parametrize("word", ["score", "noise", "epsilon", "x0", "odd", 7, [CYCLE]])
def test_a_path_of_which_no_velocity_is_predicted_is_refused_unless_one_is_stated(word: Any) -> None:
    for args in ({"path_type": "Linear"}, {"model": "SiT-XL/2"}):
        message = refusal({**args, "prediction": word})
        assert message.endswith("; ditc knows velocities along a linear path (--prediction flow)")
        stated = training_args({**args, "prediction": word}, SOURCE, ModelFacts(prediction="flow"))
        assert (stated.prediction, stated.flow_times) == ("flow", None)


@pytest.mark.parametrize("path", ["GVP", "VP", "cosine", "", 1, None])
def test_a_path_that_is_not_straight_is_refused_whatever_is_stated(path: Any) -> None:
    args = {"model": "SiT-XL/2", "path_type": path, "prediction": "velocity"}
    if path is None:
        assert told(**args) == TrainingArgs(size="xl", patch=2, prediction="flow")
        return
    for facts in (None, ModelFacts(prediction="flow"), STATED):
        assert "path_type" in refusal(args, facts)


def test_scripts_that_are_known_tell_the_times_of_their_flow() -> None:
    """SiT's own counts from the noise, REPA's from the data."""
    of_sit = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity", "loss_weight": None}
    of_sit |= {"sample_eps": 1e-3, "train_eps": 1e-5, "cfg_scale": 4.0, "wandb": False, "ckpt": None}
    assert told(**of_sit) == TrainingArgs(size="xl", patch=2, prediction="flow", flow_times="0:1")
    of_repa = {"model": "SiT-L/2", "path_type": "linear", "prediction": "v", "weighting": "uniform", "cfg_prob": 0.1}
    assert told(**of_repa) == TrainingArgs(size="l", patch=2, prediction="flow", flow_times="1:0")
    assert told(model="SiT-B/4") == TrainingArgs(size="b", patch=4, prediction="flow")
    assert told(path_type="Linear", prediction="v").flow_times is None


def test_rescaled_timesteps_are_refused_where_they_differ() -> None:
    assert told(rescale_timesteps=True).unread == ()
    assert told(rescale_timesteps=False, diffusion_steps=400).train_steps == 400
    for args, facts in (({"diffusion_steps": 400}, None), ({}, ModelFacts(train_steps=400))):
        assert "rescale_timesteps true, of 400 training steps" in refusal({"rescale_timesteps": True, **args}, facts)


@pytest.mark.parametrize(
    "name", ["use_zero_snr_betas", "diffusion_type", "edm_sigma_data", "timestep_shift", "v_objective", "diffusion"]
)
def test_what_else_speaks_of_the_process_is_named(name: str) -> None:
    assert told(**{name: "odd"}).unread == (f"{name} 'odd'",)
    assert told(**{name: None}).unread == told(**{name: False}).unread == ()


@pytest.mark.parametrize("nested", [{"prediction_type": "v"}, argparse.Namespace(kind={"beta_schedule": "linear"})])
def test_what_is_nested_in_an_argument_and_speaks_of_the_process_is_named(nested: Any) -> None:
    (line,) = told(settings=nested, optimizer={"betas": [0.9, 0.99]}, data={"workers": 4}).unread
    assert line.startswith("settings ")
    assert line.isprintable()


def test_arguments_of_any_kind_that_say_nothing_of_the_process_are_left_alone() -> None:
    loop: dict[str, Any] = {"workers": torch.ones(2)}
    loop["again"] = loop
    assert told(model=10**5000) == told(model=torch.ones(2)) == TrainingArgs()
    assert told(tensor=torch.ones(2), number=10**5000, loop=loop, cycle=CYCLE) == TrainingArgs()


PROCESS_KEYS = {
    key: default
    for kind in ("DDIMScheduler", "DDPMScheduler")
    for key, default in [
        *SCHEDULERS[kind].keys.read.items(),
        *((key, default) for key, (default, _) in SCHEDULERS[kind].keys.fixed.items()),
    ]
}
OF_SAMPLING = {"clip_sample", "clip_sample_range", "set_alpha_to_one", "steps_offset", "variance_type", "thresholding"}
OTHER_VALUES: dict[str, Any] = {
    "num_train_timesteps": 500,
    "beta_start": 0.1,
    "beta_end": 0.1,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "trained_betas": [0.1, 0.2],
    "rescale_betas_zero_snr": True,
}


@pytest.mark.parametrize("key", sorted(PROCESS_KEYS.keys() - OF_SAMPLING))
def test_no_key_of_diffusers_schedulers_is_passed_over(key: str) -> None:
    """A script's arguments often are those that it hands to such a class."""
    try:
        understood: str | TrainingArgs = told(**{key: OTHER_VALUES[key]})
    except CheckpointError as e:
        understood = str(e)
    assert understood != TrainingArgs()
