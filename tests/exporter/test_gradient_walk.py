"""Gradients branch by branch: those of the whole model, one branch in autograd's memory, or one line why not."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditc.errors import CheckpointError
from ditc.exporter.dit import DiT, DiTBranch
from ditc.exporter.gradient_walk import Walk, layers_at
from ditc.exporter.onnx_export import export_segment
from ditc.exporter.onnx_files import load_graph
from ditc.exporter.protocol import example_inputs
from ditc.exporter.segments import segments_of
from ditc.passes import program_from_schedule
from ditc.quantize.linears import linears_of
from ditc.schedule import CacheSchedule
from tests.models.separate_qkv import build
from tests.models.token_mixer import MODELS
from tests.models.two_streams import dual, single


def paths_of(model: Any) -> dict[str, list[str]]:
    """Every linear layer under the module of a branch."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    places = {branch.name: place for place, branch in enumerate(model.branches)}
    under = {name: [path for path in modules if path.startswith(f"{name}.")] for name in places}
    # the token mixer names its branches otherwise than its modules
    return {
        name: paths or [path for path in modules if path.startswith(f"branches.{places[name]}.")]
        for name, paths in under.items()
    }


def whole(
    model: Any,
    x: Tensor,
    t: Tensor,
    conditions: list[Tensor],
    v: Tensor,
    layers: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (x, gradient) of each layer, by autograd through the model's own forward pass."""
    reads: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[..., Any]:
        def read(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            reads[path] = args[0].view_as(args[0])
            return (reads[path],)

        return read

    paths = [path for own in (layers or paths_of(model)).values() for path in own]
    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(watch(path)).remove)
        out = model(x.clone().requires_grad_(), t.expand(len(x)), *conditions)
    gradients = torch.autograd.grad(out, [reads[path] for path in paths], v)
    return {path: (reads[path].detach(), gradient) for path, gradient in zip(paths, gradients, strict=True)}


def asked(model: Any, seed: int = 3) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """(x, t, conditions, gradient of the output) of three rows."""
    x, t, *conditions = example_inputs(model.spec, 3)
    v = torch.randn(3, *model.spec.prediction_shape, generator=torch.Generator().manual_seed(seed))
    return x, t[1:2], conditions, v


def walk_of(model: Any) -> Walk:
    return Walk(model, layers_at(model, paths_of(model)))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("make", [single, dual])
def test_gradients_of_two_streams_are_those_of_the_whole_model(make: Callable[[], Any], tmp_path: Path) -> None:
    """Layers of a text's stream too, which reach the prediction through the attention of later blocks."""
    model = make().eval()
    every = CacheSchedule(compute=((True,) * len(model.branches),) * 2)
    program = program_from_schedule(every, [9.0, 1.0], model.spec.branches, streams=model.spec.streams)
    _, full = segments_of(model, program)
    export_segment(full, tmp_path / "full.onnx", model.spec.branches)
    paths: dict[str, list[str]] = {}
    for linear in linears_of(load_graph(tmp_path / "full.onnx")):
        paths.setdefault(linear.branch, []).append(linear.path)
    inputs = asked(model)
    expected = whole(model, *inputs, paths)
    readings = list(Walk(model, layers_at(model, paths)).readings(*inputs))
    assert sorted(reading.path for reading in readings) == sorted(expected)
    assert max(distance(reading.gradient, expected[reading.path][1]) for reading in readings) < 1e-5


@pytest.mark.parametrize(
    "make",
    [None, build, *(make for name, make in MODELS.items() if name != "without_branches")],
)
def test_gradients_are_those_of_autograd_through_the_whole_model(
    make: Callable[[], Any] | None, make_small_model: Callable[[], DiT]
) -> None:
    model = (make or make_small_model)().eval()
    inputs = asked(model)
    expected = whole(model, *inputs)
    readings = list(walk_of(model).readings(*inputs))
    assert sorted(reading.path for reading in readings) == sorted(expected)
    for reading in readings:
        x, gradient = expected[reading.path]
        assert distance(reading.x, x) < 1e-5
        assert distance(reading.gradient, gradient) < 1e-5


@contextmanager
def saved_tensors(branch: list[str]) -> Iterator[list[list[str]]]:
    """Yield, for every tensor that autograd keeps, of which branches those are that are alive with it."""
    alive: dict[int, str] = {}
    together: list[list[str]] = []

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive[id(self)] = branch[0]
            weakref.finalize(self, alive.pop, id(self))
            together.append([*alive.values()])

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield together


def test_autograd_holds_one_branch_at_a_time(
    make_small_model: Callable[..., DiT], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, branch, compute = make_small_model(depth=3), [""], DiTBranch.compute

    def told(self: DiTBranch, h: Tensor, rows: Sequence[Tensor]) -> Tensor:
        branch[0] = self.name
        return compute(self, h, rows)

    monkeypatch.setattr(DiTBranch, "compute", told)
    with saved_tensors(branch) as together:
        for reading in walk_of(model).readings(*asked(model)):
            assert reading.branch == branch[0]
    assert {name for alive in together for name in alive} == {*model.spec.branches}
    assert all(len(set(alive)) == 1 for alive in together)
    x, t, conditions, _ = asked(model)
    with saved_tensors(branch) as at_once:
        out = model(x, t.expand(3), *conditions)
    assert out.requires_grad
    assert len(at_once[-1]) > 5 * max(map(len, together))


def test_the_model_is_as_it_was(make_small_model: Callable[[], DiT]) -> None:
    model = make_small_model()
    asking = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(asking.values())
    assert not all(asking.values())
    first = next(walk_of(model).readings(*asked(model)))
    assert first.branch == model.spec.branches[-1]
    list(walk_of(model).readings(*asked(model)))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asking
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Wrapped:
    """A branch that computes something else around its own."""

    def __init__(self, inside: Any, compute: Callable[..., Tensor]) -> None:
        self.inside, self.name, self.own = inside, inside.name, compute

    def compute(self, h: Tensor, parts: Any) -> Tensor:
        return self.own(self.inside, h, parts)

    def merge(self, h: Tensor, out: Tensor, parts: Any) -> Tensor:
        h += self.inside.merge(torch.zeros(()), out, parts)  # in place, which torch's export allows
        return h


def wrapped(model: DiT, compute: Callable[..., Tensor]) -> DiT:
    """The same model with every branch `compute`d otherwise."""
    branches = tuple(Wrapped(branch, compute) for branch in model.branches)
    model.__class__ = type("Wrapping", (DiT,), {"branches": branches})
    return model


def test_a_merge_in_place_spoils_nothing(make_small_model: Callable[[], DiT]) -> None:
    inputs = asked(make_small_model())
    plain = list(walk_of(make_small_model()).readings(*inputs))
    model = wrapped(make_small_model(), lambda inside, h, parts: inside.compute(h, parts))
    for reading, expected in zip(walk_of(model).readings(*inputs), plain, strict=True):
        assert distance(reading.gradient, expected.gradient) < 1e-6


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (
            lambda inside, h, parts: inside.compute(h, parts) + inside.compute(h, parts),
            "once in branch blocks.1.mlp, found 2",
        ),
        (lambda inside, h, parts: h * 2, "once in branch blocks.1.mlp, found 0 calls"),
        (lambda inside, h, parts: inside.compute(h, parts).detach(), "lets no gradient pass through a layer of branch"),
        (
            lambda inside, h, parts: inside.compute(h, parts).exp_().square_().exp_(),
            "gradients of small can't be taken",
        ),
    ],
)
def test_a_branch_that_can_not_be_differentiated_is_one_line(
    make_small_model: Callable[[], DiT], compute: Callable[..., Tensor], message: str
) -> None:
    model = wrapped(make_small_model(), compute)
    with pytest.raises(CheckpointError, match=message) as caught:
        list(walk_of(model).readings(*asked(model)))
    assert "choose --ranges without gradients" in str(caught.value)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if name != "pos_embed")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["blocks.0.attn"], "torch.nn.Linear at blocks.0.attn of small, found Attention"),
        (["blocks.0.gone"], "at blocks.0.gone of small, found nothing"),
        (["blocks.0.attn.qkv"] * 2, "to be called once in branch blocks.0.attn, found 2 calls"),
    ],
)
def test_a_path_that_is_no_layer_is_one_line(
    make_small_model: Callable[[], DiT], paths: list[str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        layers_at(make_small_model(), {"blocks.0.attn": paths})
