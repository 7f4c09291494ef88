"""A graph assembled from one branch of each kind is that of the whole trace; where that is not sure, all is traced."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.exporter import graph_assembly
from ditc.exporter.branch_traces import trace_branches
from ditc.exporter.diffusers_folder import dit_from_diffusers
from ditc.exporter.dit import Attention, DiT, DiTBranch, DiTConfig, Mlp
from ditc.exporter.graph_assembly import assembled
from ditc.exporter.models import builtin_digits
from ditc.exporter.onnx_export import export_segment, parity_error, whole_graph
from ditc.exporter.onnx_files import data_path
from ditc.exporter.segments import Excerpt, Segment, segments_of
from ditc.passes import program_from_schedule
from ditc.schedule import CacheSchedule

OWN_FILES = Path(__file__).parents[1] / "models"
CONFIG = DiTConfig(input_size=4, hidden_size=24, depth=3, num_heads=3, num_classes=4)


def small_dit(**changes: Any) -> DiT:
    torch.manual_seed(0)
    return DiT(replace(CONFIG, **changes), name="small").eval()


def from_diffusers(folder: Path) -> DiT:
    """A folder with an embedder and an epsilon of its own in every block."""
    torch.manual_seed(0)
    settings = {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3}
    sizes = {"norm_num_groups": 8, "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 10}
    DiTTransformer2DModel(**settings, **sizes, attention_bias=False, norm_eps=0.1).save_pretrained(folder)
    return dit_from_diffusers(folder)


def users_own(file: Path, build: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{file.stem}_to_assemble", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return getattr(module, build)().eval()


MODELS: dict[str, Callable[[Path], Any]] = {
    "digits": lambda _: builtin_digits(),
    "diffusers": from_diffusers,
    "users-own": lambda _: users_own(OWN_FILES / "separate_qkv.py", "build"),
    "two-streams": lambda _: users_own(OWN_FILES / "two_streams.py", "dual"),
}


def segment_of(model: Any, row: Sequence[bool]) -> Segment:
    """The segment that computes the branches of `row`, and gives the caches that the others read later."""
    rows = CacheSchedule(compute=((True,) * len(row), tuple(row), (False,) * len(row)))
    program = program_from_schedule(rows, [2, 1, 0], model.spec.branches, streams=model.spec.streams)
    wanted = program.steps[1].segment
    return next(segment for segment in segments_of(model, program) if segment.name == wanted)


ROWS: dict[str, Callable[[int], list[bool]]] = {
    "full": lambda count: [True] * count,
    "reuse": lambda count: [False] * count,
    "row": lambda count: [number % 3 != 1 for number in range(count)],
}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        pytest.param("digits", "full", marks=pytest.mark.slow),
        ("digits", "reuse"),
        ("diffusers", "row"),
        ("users-own", "full"),
        ("two-streams", "full"),
        ("two-streams", "row"),
    ],
)
def test_an_assembled_segment_is_the_whole_trace_byte_for_byte(
    name: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name](tmp_path / "folder")
    segment = segment_of(model, ROWS[row](len(model.spec.branches)))
    chosen: list[tuple[int, ...]] = []
    init = Excerpt.__init__

    def noted(self: Excerpt, trunk: Any, numbers: Sequence[int]) -> None:
        init(self, trunk, numbers)
        chosen.append(self.chosen)

    monkeypatch.setattr(Excerpt, "__init__", noted)
    files = []
    for kind, capture in (("whole", whole_graph), ("assembled", must_assemble)):
        path = tmp_path / kind / "segment.onnx"
        export_segment(segment, path, model.spec.branches, capture)
        files.append(path)
    assert len(chosen[-1]) < len(model.spec.branches)  # so something was saved
    assert files[0].read_bytes() == files[1].read_bytes()
    assert data_path(files[0]).read_bytes() == data_path(files[1]).read_bytes()


def must_assemble(segment: Segment) -> Any:
    model = assembled(segment)
    assert model is not None
    return model


def test_one_branch_of_each_kind_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def captured(module: nn.Module, *_: Any, **__: Any) -> Any:
        assert isinstance(module, Excerpt)
        seen.append(module.chosen)
        raise graph_assembly.UnexpectedFormError

    monkeypatch.setattr(graph_assembly, "captured", captured)
    model = small_dit()
    assembled(segment_of(model, [True] * 6))
    assembled(segment_of(model, [False] * 6))
    assembled(segment_of(model, [True, True, False, False, True, False]))
    assert seen == [(0, 1), (0,), (0, 1, 2)]


@dataclass(frozen=True)
class Changed:
    """A branch whose output goes through `change`, a function of (output, residual stream, parts)."""

    inside: DiTBranch
    change: Callable[[Tensor, Tensor, Any], Tensor]

    @property
    def name(self) -> str:
        return self.inside.name

    def compute(self, h: Tensor, parts: Any) -> Tensor:
        return self.change(self.inside.compute(h, parts), h, parts)

    def merge(self, h: Tensor, out: Tensor, parts: Any) -> Tensor:
        return self.inside.merge(h, out, parts)


class Mutable(DiT):
    """A DiT whose branches tests may exchange."""

    changed: dict[int, Callable[[Tensor, Tensor, Any], Tensor]] = {}

    @property
    def branches(self) -> Any:
        own = super().branches
        return tuple(Changed(b, self.changed[i]) if i in self.changed else b for i, b in enumerate(own))


def mutable(**changed: Callable[[Tensor, Tensor, Any], Tensor]) -> Mutable:
    torch.manual_seed(0)
    model = Mutable(CONFIG, name="small").eval()
    model.changed = {int(name.removeprefix("branch")): change for name, change in changed.items()}
    return model


def kinds(model: Any) -> list[int] | None:
    """For each branch the first one with the same operations; None where there is no trace."""
    traces = trace_branches(segment_of(model, [True] * len(model.spec.branches)))
    if traces is None:
        return None
    operations = [trace.operations for trace in traces]
    return [operations.index(operation) for operation in operations]


def other_heads(model: DiT) -> None:
    model.blocks[1].attn = Attention(replace(CONFIG, num_heads=2))


def other_epsilon(model: DiT) -> None:
    model.blocks[1].norm1.eps = 1e-5


def other_activation(model: DiT) -> None:
    model.blocks[1].mlp.act = nn.GELU(approximate="none")


def other_width(model: DiT) -> None:
    model.blocks[1].mlp = Mlp(replace(CONFIG, mlp_ratio=2.0))


def no_bias(model: DiT) -> None:
    model.blocks[1].mlp.fc1 = nn.Linear(24, 96, bias=False)


@pytest.mark.parametrize(
    ("change", "number"),
    [(other_heads, 2), (other_epsilon, 2), (other_activation, 3), (other_width, 3), (no_bias, 3)],
)
def test_a_branch_with_another_setting_is_a_kind_of_its_own(change: Callable[[DiT], None], number: int) -> None:
    model = small_dit()
    assert kinds(model) == [0, 1, 0, 1, 0, 1]
    change(model)
    expected = [0, 1, 0, 1, 0, 1]
    expected[number] = number
    assert kinds(model) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda out, h, parts: out * 2.0,  # a number in a closure
        lambda out, h, parts: out if len(h) < 9 else out * 2.0,  # something else at a large batch
        lambda out, h, parts: out if len(h) > 9 else out * 2.0,  # and at a small one
        lambda out, h, parts: out + parts[0][:, :1],  # another number of leaves
    ],
)
def test_a_branch_with_other_code_is_a_kind_of_its_own(change: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
    assert kinds(mutable(branch2=change)) == [0, 1, 2, 1, 0, 1]


def test_weights_of_branches_may_differ_and_be_shared() -> None:
    model = small_dit()
    with torch.no_grad():
        for parameter in model.blocks[1].parameters():
            parameter.zero_()
    assert kinds(model) == [0, 1, 0, 1, 0, 1]
    sharing = mutable()
    sharing.changed = {i: lambda out, h, parts: out + sharing.pos_embed for i in range(6)}
    assert kinds(sharing) == [0, 1, 0, 1, 0, 1]


def remembering(notes: dict[str, Tensor]) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """A branch that adds what an earlier branch left in `notes`, and leaves its own output."""

    def change(out: Tensor, h: Tensor, parts: Any) -> Tensor:
        before = notes.get("out")
        notes["out"] = out
        return out if before is None else out + before

    return change


def shared_layer(model: DiT) -> None:
    model.blocks[1].attn = model.blocks[0].attn


def tied_weight(model: DiT) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def shared_call(model: Mutable) -> None:
    model.extra = nn.LayerNorm(24)
    model.changed = {number: lambda out, h, parts: model.extra(out) for number in (1, 3, 5)}


@pytest.mark.parametrize("share", [shared_layer, tied_weight, shared_call])
def test_there_is_no_trace_where_branches_share_layers_or_weights(share: Callable[[DiT], None]) -> None:
    model = mutable()
    share(model)
    assert kinds(model) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"branch3": lambda out, h, parts: out + torch.ones(24)[None] * torch.tensor([2.0])},  # a tensor of its own
        {"branch2": lambda out, h, parts: out.mul_(2.0)},
        {"branch4": lambda out, h, parts: out if out.sum() > 0 else -out},
    ],
    ids=["foreign tensor", "in place", "data"],
)
def test_there_is_no_trace_where_a_branch_does_what_traces_can_not_tell(changes: Any) -> None:
    assert kinds(mutable(**changes)) is None


def test_there_is_no_trace_where_a_branch_reads_what_another_one_left() -> None:
    notes: dict[str, Tensor] = {}
    assert kinds(mutable(branch1=remembering(notes), branch3=remembering(notes))) is None


def test_a_model_whose_head_reads_a_branch_is_not_assembled() -> None:
    notes: dict[str, Tensor] = {}

    class Peeking(Mutable):
        def head(self, h: Tensor, blocks: Any) -> Tensor:
            return super().head(h + notes["out"], blocks)

    def leaving(out: Tensor, h: Tensor, parts: Any) -> Tensor:
        notes["out"] = out
        return out

    torch.manual_seed(0)
    model = Peeking(CONFIG, name="small").eval()
    model.changed = {1: leaving, 3: leaving, 5: leaving}
    assert kinds(model) == [0, 1, 0, 1, 0, 1]
    assert assembled(segment_of(model, [True] * 6)) is None


def test_a_model_that_can_not_be_assembled_is_traced_whole(tmp_path: Path) -> None:
    model = small_dit()
    shared_layer(model)
    segment = segment_of(model, [True] * 6)
    assert assembled(segment) is None
    export_segment(segment, tmp_path / "full.onnx", model.spec.branches)
    session = OnnxRuntimeBackend().session(tmp_path / "full.onnx")
    names = list(segment.outputs)
    assert parity_error(segment, lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))) < 1e-5
