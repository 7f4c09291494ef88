"""Checkpoints of training scripts: which of their tensors are the model, and what is said about the choice."""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refusal_of
from torch import Tensor

from ditc.exporter.dit import DiT, DiTConfig
from ditc.exporter.original_checkpoint import ANCHOR, dit_from_checkpoint
from ditc.exporter.state_dicts import fitting_prefix, read_checkpoint

State = dict[str, Tensor]


def state(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return dict(DiT(DiTConfig(input_size=4, hidden_size=384, depth=1, num_heads=6, num_classes=2)).state_dict())


def save(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "w.pt")
    return folder / "w.pt"


def prefixed(tensors: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def choice_lines(path: Path, expected: State) -> tuple[str, ...]:
    """The lines about the choice, after it was seen to be these tensors."""
    checkpoint = read_checkpoint(path, ANCHOR)
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[name], expected[name]) for name in expected)
    return checkpoint.assumptions


def refusal(path: Path) -> str:
    return refusal_of(lambda: dit_from_checkpoint(path), path)


def training_checkpoint(**args: Any) -> dict[str, Any]:
    """Return a file of the original training script: two models, the optimizer's state, and its arguments."""
    model = state(1)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    return {"model": model, "ema": state(2), "opt": optimizer.state_dict(), "args": argparse.Namespace(**args)}


def test_a_checkpoint_of_the_training_script_loads_by_its_moving_average(tmp_path: Path) -> None:
    path = save(training_checkpoint(model="DiT-S/2", num_classes=2, data_path="/data", global_seed=0), tmp_path)
    assert choice_lines(path, state(2)) == ("'ema' holds the weights that are meant, not 'model'",)
    assert read_checkpoint(path, ANCHOR).args["model"] == "DiT-S/2"


AVERAGES = [
    "ema",
    "ema.state_dict",
    "ema.module",
    "ema_state_dict",
    "ema_model.state_dict",
    "model_ema",
    "model_ema.module",
    "state_dict_ema",
    "ema_0.9999",
    "ema_0.9999.state_dict",
    "ema1",
    "state.ema",
]
MODELS = ["model", "model.state_dict", "state_dict", "module", "net", ""]


def nested(name: str, tensors: State) -> dict[str, Any]:
    """A mapping that holds the tensors under a dotted name; a number in it keeps its dot."""
    content: dict[str, Any] = dict(tensors)
    for part in reversed(re.split(r"\.(?!\d)", name) if name else []):
        content = {part: content, "decay": 0.999} if part.startswith("ema") else {part: content}
    return content


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("model", MODELS)
def test_a_moving_average_is_taken_however_it_is_kept(average: str, model: str, tmp_path: Path) -> None:
    path = save(nested(model, {ANCHOR: torch.zeros(1)}) | nested(average, {ANCHOR: torch.ones(1)}), tmp_path)
    (line,) = choice_lines(path, {ANCHOR: torch.ones(1)})
    assert line == f"{average!r} holds the weights that are meant, not {repr(model) if model else 'the file itself'}"


def test_of_two_moving_averages_none_is_taken(tmp_path: Path) -> None:
    both = {"model": state(1), "ema_0.999": state(2), "ema_0.9999": state(3)}
    assert "holds several models, ema_0.999, ema_0.9999; save the state dict of one" in refusal(save(both, tmp_path))


@pytest.mark.parametrize("held", [[torch.ones(2)], {"shadow_params": [torch.ones(2)], "decay": 0.99}])
def test_a_moving_average_without_names_is_passed_over_and_said(held: Any, tmp_path: Path) -> None:
    path = save({"model": state(1), "ema": held}, tmp_path)
    assert choice_lines(path, state(1)) == ("'model' holds the weights that are meant: 'ema' holds no tensors by name",)


def test_a_name_that_only_contains_the_letters_is_no_moving_average(tmp_path: Path) -> None:
    path = save({"model": state(1), "schema": state(2)}, tmp_path)
    assert choice_lines(path, state(1)) == ("'model' holds the weights that are meant, not 'schema'",)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("name", ["num_updates", "n_averaged", "step"])
def test_a_counter_beside_the_weights_is_passed_over_and_said(name: str, kind: torch.dtype, tmp_path: Path) -> None:
    path = save({name: torch.tensor(1, dtype=kind), **state(1)}, tmp_path)
    assert choice_lines(path, state(1)) == (f"single whole numbers are no weights: {name}",)


def test_a_model_that_torch_averaged_loads(tmp_path: Path) -> None:
    """`torch.optim.swa_utils.AveragedModel` keeps a counter beside the keys that it prefixes."""
    torch.manual_seed(1)
    model = DiT(DiTConfig(input_size=4, hidden_size=384, depth=1, num_heads=6, num_classes=2))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    lines = choice_lines(save(averaged.state_dict(), tmp_path), dict(model.state_dict()))
    assert "the prefix 'module.'" in lines[0]
    assert lines[1] == "single whole numbers are no weights: n_averaged"


@pytest.mark.parametrize("name", ["two\nlines", "esc\x1b[31m", "sep\u2028arated"])
def test_a_refusal_is_one_printable_line_whatever_the_names_in_a_file(name: str, tmp_path: Path) -> None:
    for content in (state(1) | {name: torch.zeros(2)}, {name: torch.zeros(2)}, {name: {"a": torch.zeros(2)}}):
        assert refusal(save(content, tmp_path)).isprintable()


def test_an_empty_moving_average_is_passed_over_and_said(tmp_path: Path) -> None:
    path = save({"model": state(1), "ema": {}}, tmp_path)
    assert choice_lines(path, state(1)) == ("'model' holds the weights that are meant: 'ema' is empty",)


def test_a_moving_average_with_other_keys_is_passed_over_and_said(tmp_path: Path) -> None:
    path = save({"model": state(1), "ema": {"decay": torch.tensor(0.9999)}}, tmp_path)
    assert choice_lines(path, state(1)) == ("'model' holds the weights that are meant: 'ema' has other keys",)


@pytest.mark.parametrize("holder", ["ema", "model", "state_dict", "module", "net", "anything"])
def test_one_model_is_found_under_any_name_and_there_is_nothing_to_say(holder: str, tmp_path: Path) -> None:
    assert choice_lines(save({holder: state(1), "epoch": 7}, tmp_path), state(1)) == ()


def test_a_model_beside_others_of_unknown_names_is_the_file_s_own(tmp_path: Path) -> None:
    path = save(state(1) | {"teacher": state(2)}, tmp_path)
    assert choice_lines(path, state(1)) == ("the file itself holds the weights that are meant, not 'teacher'",)


def test_a_model_further_down_is_found(tmp_path: Path) -> None:
    assert choice_lines(save({"state": {"network": state(1)}}, tmp_path), state(1)) == ()


def test_of_models_under_names_that_nobody_knows_none_is_taken(tmp_path: Path) -> None:
    message = refusal(save({"student": state(1), "teacher": state(2)}, tmp_path))
    assert "holds several models, student, teacher" in message


PREFIXES = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.diffusion_model.", "net.0."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("holder", [None, "ema"])
def test_a_common_prefix_is_taken_off_and_said(prefix: str, holder: str | None, tmp_path: Path) -> None:
    tensors = prefixed(state(1), prefix)
    (line,) = choice_lines(save(tensors if holder is None else {holder: tensors}, tmp_path), state(1))
    assert line == f"the prefix {prefix!r} of every key belongs to a wrapper around the model"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_some_keys_lack_is_named_with_one_that_does(prefix: str, tmp_path: Path) -> None:
    message = refusal(save({"loss.weight": torch.zeros(1)} | prefixed(state(1), prefix), tmp_path))
    assert f"some keys begin with {prefix!r}, others not (loss.weight)" in message


def test_two_models_in_one_set_of_keys_are_not_guessed_between(tmp_path: Path) -> None:
    message = refusal(save(prefixed(state(1), "student.") | prefixed(state(2), "teacher."), tmp_path))
    assert "some keys begin with 'student.', others not (teacher." in message


def test_a_name_that_only_ends_like_a_key_is_no_prefix() -> None:
    assert fitting_prefix(["my_x_embedder.proj.weight"], ANCHOR) is None
    assert fitting_prefix(["my.x_embedder.proj.weight"], ANCHOR) == "my."
    assert fitting_prefix([], ANCHOR) is None


def test_a_foreign_model_is_named_by_its_first_keys(tmp_path: Path) -> None:
    message = refusal(save({f"layer.{i}.weight": torch.zeros(2) for i in range(9)}, tmp_path))
    assert "x_embedder.proj.weight is missing" in message
    assert "it holds layer.0.weight, layer.1.weight, layer.2.weight and 6 more" in message


def test_a_foreign_model_further_down_is_named_with_its_place(tmp_path: Path) -> None:
    message = refusal(save({"model": {"conv.weight": torch.zeros(2)}}, tmp_path))
    assert "it holds conv.weight under 'model'" in message


def test_a_stray_number_of_a_block_builds_no_model_of_that_depth(tmp_path: Path) -> None:
    message = refusal(save(state(1) | {"blocks.999999999.x": torch.zeros(1)}, tmp_path))
    assert "it has blocks up to number 999999999 in 23 keys" in message


def test_a_file_with_the_keys_of_diffusers_is_sent_to_its_folder(tmp_path: Path) -> None:
    message = refusal(
        save({"pos_embed.proj.weight": torch.zeros(2), "transformer_blocks.0.a": torch.zeros(2)}, tmp_path)
    )
    assert "its keys are diffusers'; give the folder that it lies in" in message


@pytest.mark.parametrize(
    "inert",
    [
        argparse.Namespace(),
        argparse.Namespace(nested=argparse.Namespace(a=[1, "b", None, 2.5, True, {"c": (1, 2)}])),
        collections.OrderedDict(model="DiT-S/2"),
        {"model": "DiT-S/2"},
        None,
        "a string",
    ],
)
def test_inert_arguments_do_not_stand_in_the_way(inert: Any, tmp_path: Path) -> None:
    assert choice_lines(save({"ema": state(1), "args": inert}, tmp_path), state(1)) == ()


@pytest.mark.parametrize("holder", ["args", "hparams", "hyper_parameters", "config", "cfg"])
@pytest.mark.parametrize("form", [dict, argparse.Namespace])
def test_arguments_are_read_under_every_usual_name(holder: str, form: Any, tmp_path: Path) -> None:
    path = save({"ema": state(1), holder: form(prediction_type="v_prediction")}, tmp_path)
    assert dit_from_checkpoint(path).spec.diffusion.prediction == "v"


def test_settings_about_a_moving_average_are_none(tmp_path: Path) -> None:
    path = save({"model": state(1), "config": {"ema": {}, "model": {"depth": 1}}}, tmp_path)
    assert choice_lines(path, state(1)) == ()


@pytest.mark.parametrize("live", [pathlib.PurePosixPath("/data"), DiTConfig(), print])
def test_arguments_of_other_classes_are_refused_by_their_name(live: Any, tmp_path: Path) -> None:
    message = refusal(save({"ema": state(1), "args": argparse.Namespace(value=live)}, tmp_path))
    assert "is a pickle with more than weights in it (" in message
    assert "runs no code from a checkpoint" in message


def test_a_namespace_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            import os

            return os.mkdir, (str(tmp_path / "it-ran"),)

    message = refusal(save({"ema": state(1), "args": argparse.Namespace(value=Touch())}, tmp_path))
    assert "posix.mkdir" in message
    assert not (tmp_path / "it-ran").exists()


def test_a_class_is_inert_here_and_nowhere_else(tmp_path: Path) -> None:
    path = save(training_checkpoint(), tmp_path)
    read_checkpoint(path, ANCHOR)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
