"""The seams: a model of the user's own is taken as it is, or refused with what to fix."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditc.errors import CheckpointError
from ditc.exporter.models import load_model
from ditc.exporter.protocol import TrajectoryModel, branches_add, check_decomposition, example_inputs, relative_error
from ditc.spec import DiffusionSpec, ModelSpec
from tests.models.token_mixer import MODELS

OWN_FILE = Path(__file__).parents[1] / "models" / "separate_qkv.py"


@pytest.fixture
def own() -> ModuleType:
    """The user's file, loaded anew for each test."""
    spec = importlib.util.spec_from_file_location("separate_qkv_under_test", OWN_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the user's file in it; what is imported from there is forgotten afterwards."""
    shutil.copy(OWN_FILE, tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("separate_qkv", "mine"):
        sys.modules.pop(name, None)


def refusal(model: Any) -> str:
    """The one line that a user reads when this model is refused."""
    with pytest.raises(CheckpointError) as caught:
        check_decomposition(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_spec(own: ModuleType, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """The user's model with another spec."""
    spec: ModelSpec = own.build().spec.model_copy(update=changes)
    monkeypatch.setattr(own.SeparateQkvTransformer, "spec", property(lambda self: spec))
    return own.build()


def test_a_model_written_differently_is_accepted(own: ModuleType) -> None:
    model = own.build().eval()
    assert isinstance(model, TrajectoryModel)
    check_decomposition(model)


def test_branches_that_add_to_the_stream_are_known(own: ModuleType) -> None:
    assert branches_add(own.build())


@pytest.mark.parametrize(
    ("case", "merge"),
    [
        ("scales the stream", lambda self, h, out, parts: 0.5 * h + out),
        ("gates by the stream", lambda self, h, out, parts: h + h.sigmoid() * out),
        ("joins tokens", lambda self, h, out, parts: torch.cat([h, out], dim=1)[:, : h.shape[1]]),
        ("adds one number a token", lambda self, h, out, parts: h + out.mean(dim=-1, keepdim=True)),
    ],
)
def test_branches_that_do_more_than_add_are_known(
    case: str, merge: Any, own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.FeedForwardBranch, "merge", merge)
    assert not branches_add(own.build()), case


def test_a_merge_that_forgets_the_gate_is_refused(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own.AttentionBranch, "merge", lambda self, h, out, parts: h + out)
    message = refusal(own.build().eval())
    assert "don't compose to its forward pass" in message
    assert "merge()" in message


def test_a_compute_that_forgets_the_modulation_is_refused(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own.FeedForwardBranch, "compute", lambda self, h, parts: self.layer.feedforward(h))
    assert "compute()" in refusal(own.build().eval())


def test_a_model_that_gives_nan_is_refused(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own.build().eval()
    with torch.no_grad():
        model.final_table.fill_(float("nan"))
    assert "relative error nan" in refusal(model)


@pytest.mark.parametrize("member", ["spec", "branches", "decoder", "condition", "unpack", "embed", "head"])
def test_a_missing_member_is_named(member: str, own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(own.SeparateQkvTransformer, member)
    lacking = refusal(own.build().eval()).partition("it lacks ")[2].partition(";")[0]
    assert member in lacking.split(", ")


def test_all_missing_members_are_named() -> None:
    assert "it lacks spec, branches, decoder, condition, unpack, embed, head;" in refusal(nn.Linear(1, 1))


def test_a_model_that_is_no_module_is_refused(own: ModuleType) -> None:
    model = own.build()
    seams = {name: getattr(model, name) for name in ("spec", "branches", "condition", "unpack", "embed", "head")}
    assert "torch.nn.Module" in refusal(type("Bare", (), {**seams, "decoder": None})())


@pytest.mark.parametrize("names", [("a", "b", "c", "d"), ("layers.0.attention",)])
def test_branch_names_that_differ_from_the_spec_are_refused(
    names: tuple[str, ...], own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(with_spec(own, monkeypatch, branches=names))
    assert "spec.branches" in message
    assert "layers.0.feedforward" in message
    assert str(list(names)) in message


def test_branches_in_another_order_are_refused(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    backwards = own.build().spec.branches[::-1]
    assert "in order" in refusal(with_spec(own, monkeypatch, branches=backwards))


def test_a_head_of_another_shape_is_refused(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own.build().eval()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, t, y: forward(x, t, y)[:, :2])
    message = refusal(model)
    assert "(2, 3, 6, 12)" in message
    assert "(2, 2, 6, 12)" in message


def test_tables_with_steps_and_batch_swapped_are_refused(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own.build().eval()
    condition = model.condition

    def swapped(t: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {name: table.transpose(0, 1) for name, table in condition(t, y).items()}

    monkeypatch.setattr(model, "condition", swapped)
    assert "condition" in refusal(model)


def clocked(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> Any:
    model = MODELS["clocked"]()
    check_decomposition(model)
    for name, method in methods.items():
        monkeypatch.setattr(model, name, method)
    return model


def test_tables_of_timesteps_have_a_row_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = clocked(monkeypatch, timestep_tables=lambda t: {"modulation": torch.zeros(1, len(t), 9, 64)})
    assert "timestep_tables() must give tables (steps, ...) = (3, ...), found {'modulation': (1, 3, 9, 64)}" in refusal(
        wrong
    )


def test_a_table_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = clocked(monkeypatch, timestep_tables=lambda t: {"text": t})
    assert "request_tables() and timestep_tables() both give text; rename one" in refusal(twice)


def test_a_model_of_nothing_but_tables_of_timesteps_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = clocked(monkeypatch, request_tables=lambda text: {})
    assert "condition() and request_tables() give no table" in refusal(empty)


def test_a_branch_shape_that_is_not_the_branches_is_refused(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "branch_shape" in refusal(with_spec(own, monkeypatch, branch_shape=(8, 47)))


def test_a_learned_variance_that_the_model_does_not_return_is_refused(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "learned_sigma" in refusal(with_spec(own, monkeypatch, diffusion=DiffusionSpec(learned_sigma=True)))


def test_module_and_function_load_a_model(own_folder: Path) -> None:
    path = list(sys.path)
    model = load_model("separate_qkv:build")
    assert model.spec.name == "separate-qkv"
    assert not model.training
    assert sys.path == path


def test_a_model_with_dropout_loads(own_folder: Path) -> None:
    (own_folder / "mine.py").write_text(
        "from separate_qkv import build, nn\n\n"
        "def with_dropout():\n"
        "    model = build()\n"
        "    model.layers[0].attention.to_out.register_forward_hook(\n"
        "        lambda layer, given, out: nn.functional.dropout(out, 0.5, layer.training))\n"
        "    return model\n"
    )
    assert load_model("mine:with_dropout").spec.name == "separate-qkv"


@pytest.mark.parametrize("name", ["separate_qkv:absent", "nowhere:build", "separate_qkv.py:build"])
def test_a_function_that_cannot_be_imported_is_refused(name: str, own_folder: Path) -> None:
    path = list(sys.path)
    with pytest.raises(CheckpointError, match=f"can't import {name}: .*expected MODULE:FUNCTION") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)
    assert sys.path == path


def test_a_function_that_returns_no_model_is_refused(own_folder: Path) -> None:
    (own_folder / "mine.py").write_text("def build():\n    return 7\n")
    with pytest.raises(CheckpointError, match="int does not fit TrajectoryModel"):
        load_model("mine:build")


def test_example_inputs_are_the_same_every_time(own: ModuleType) -> None:
    spec = own.build().spec
    (x, t, y), (x_again, t_again, y_again) = example_inputs(spec, 4), example_inputs(spec, 4)
    assert torch.equal(x, x_again)
    assert torch.equal(t, t_again)
    assert torch.equal(y, y_again)


def test_example_inputs_are_within_what_the_model_takes(own: ModuleType) -> None:
    spec = own.build().spec
    x, t, y = example_inputs(spec, 4)
    assert x.shape == (4, 3, 6, 12)
    assert t.min() >= 0
    assert t.max() < spec.diffusion.train_steps
    assert len(set(t.tolist())) == len(set(y.tolist())) == 4
    assert set(y.tolist()) <= set(range(spec.num_classes))


@pytest.mark.parametrize(
    ("actual", "expected", "error"), [([3.0, 4.0], [3.0, 4.0], 0), ([3.3, 4.4], [3.0, 4.0], 0.1), ([0.0], [0.0], 0)]
)
def test_relative_error_is_a_ratio_of_norms(actual: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) == pytest.approx(error, rel=1e-5)


def test_a_spec_that_the_model_can_not_run_on_is_one_line(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(with_spec(own, monkeypatch, in_channels=7, cfg_channels=1))
    assert "can't run on inputs as its spec describes them" in message
    assert "\n" not in message


def test_a_users_module_that_fails_to_import_is_one_line(own_folder: Path) -> None:
    (own_folder / "wrong.py").write_text("def build(:\n")
    with pytest.raises(CheckpointError, match="can't import wrong:build"):
        load_model("wrong:build")
