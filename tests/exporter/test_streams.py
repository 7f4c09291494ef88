"""Models of several streams: taken as they are, or refused with the branch and output that don't fit."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import CheckpointError
from ditc.exporter.onnx_export import export_segment
from ditc.exporter.protocol import TrajectoryModel, branches_add, check_decomposition, example_inputs, relative_error
from ditc.exporter.segments import segments_of
from ditc.passes import program_from_schedule
from ditc.schedule import CacheSchedule
from ditc.spec import ModelSpec
from ditc.streams import IMAGE, BranchStreams, Output
from tests.models import two_streams

TEXT = Output(name="text", shape=(5, 32), stream="text")


@pytest.fixture
def own() -> ModuleType:
    """The user's file; what a test patches in it is put back."""
    return two_streams


def refusal(model: Any) -> str:
    """The one line that a user reads when this model is refused."""
    with pytest.raises(CheckpointError) as caught:
        check_decomposition(model.eval())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_streams(own: ModuleType, monkeypatch: pytest.MonkeyPatch, branch: str, streams: BranchStreams) -> Any:
    """The model with other streams of one branch in its spec."""
    spec: ModelSpec = own.single().spec
    spec = ModelSpec(**{**dict(spec), "streams": {**(spec.streams or {}), branch: streams}})
    monkeypatch.setattr(own.TwoStreams, "spec", property(lambda self: spec))
    return own.single()


@pytest.mark.parametrize("name", ["single", "dual"])
def test_a_model_of_two_streams_is_accepted_and_its_branches_add(name: str, own: ModuleType) -> None:
    model = getattr(own, name)().eval()
    assert isinstance(model, TrajectoryModel)
    check_decomposition(model)
    assert branches_add(model)


def test_an_output_to_the_text_may_do_more_than_add(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never reaches a step that reuses everything."""
    monkeypatch.setattr(own.TextBranch, "merge", lambda self, h, out, parts, output: 0.5 * h + out)
    assert branches_add(own.single())


def test_one_of_two_outputs_to_the_image_that_does_not_add_is_seen(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = own.AttentionBranch.merge

    def scaling(self: Any, h: Tensor, out: Tensor, parts: Any, output: str) -> Any:
        return 0.5 * h + out if output == "alone" else merge(self, h, out, parts, output)

    monkeypatch.setattr(own.AttentionBranch, "merge", scaling)
    assert branches_add(own.single())
    assert not branches_add(own.dual())


def test_a_merge_that_takes_the_gate_of_another_output_is_refused(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(own.GATES, "alone", 2)
    assert "don't compose to its forward pass" in refusal(own.dual())


def test_an_output_of_another_shape_is_refused_by_branch_and_output(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = BranchStreams(reads=(IMAGE, "text"), outputs=(Output(name="image"), Output(name="text", stream="text")))
    model = with_streams(own, monkeypatch, "blocks.0.attn", other)
    assert "output text of blocks.0.attn is (5, 32), spec.streams says (16, 32)" in refusal(model)


def test_outputs_too_few_are_refused(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    more = BranchStreams(reads=(IMAGE, "text"), outputs=(Output(name="image"), Output(name="alone"), TEXT))
    model = with_streams(own, monkeypatch, "blocks.0.attn", more)
    assert "blocks.0.attn gives 2 outputs, spec.streams names 3: image, alone, text" in refusal(model)


def test_a_stream_that_a_branch_asks_for_and_does_not_read_is_named(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_streams(own, monkeypatch, "blocks.0.ff_text", BranchStreams(outputs=(TEXT,)))
    assert refusal(model) == "compute() of blocks.0.ff_text asks for 'text', and reads image by spec.streams"


def test_a_stream_that_decides_nothing_of_a_text_is_named(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    both = BranchStreams(reads=(IMAGE, "text"), outputs=(TEXT,))
    message = refusal(with_streams(own, monkeypatch, "blocks.0.ff_text", both))
    assert message.startswith(
        "blocks.0.ff_text says that it reads the stream 'image', and what it gives to another one"
    )


def test_a_stream_that_decides_nothing_of_the_image_is_named(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that mixes the text into the text alone: a step that reuses everything would have no use for it."""

    def apart(self: Any, image: Tensor, text: Tensor, rows: Any) -> tuple[Tensor, ...]:
        outs = attention(self, image, 0 * text.detach(), rows)
        return (outs[0], outs[1] + text) if len(outs) > 1 else outs

    attention = own.Block.attention
    monkeypatch.setattr(own.Block, "attention", apart)
    message = refusal(own.single())
    assert message.startswith("blocks.0.attn says that it reads the stream 'text', and what it gives to image does not")


@pytest.mark.parametrize("context", [None, lambda self, parts: {"words": parts["model"]["tokens"]}])
def test_a_context_that_begins_other_streams_is_refused(
    context: Any, own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if context is None:
        monkeypatch.delattr(own.TwoStreams, "context")
    else:
        monkeypatch.setattr(own.TwoStreams, "context", context)
    begun = "none" if context is None else "['words']"
    assert f"context(parts) must begin the streams ['text'] that spec.streams names, found {begun}" in refusal(
        own.single()
    )


def test_a_merge_that_changes_the_shape_of_its_stream_is_refused(
    own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.TextBranch, "merge", lambda self, h, out, parts, output: torch.cat([h, out], dim=1))
    assert "merge() of blocks.0.ff_text makes (10, 32) of the stream 'text' with output text, expected (5, 32)" in (
        refusal(own.single())
    )


def test_a_head_that_asks_for_the_text_is_refused(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the image's stream alone, so that it can't depend on another."""
    head = own.TwoStreams.head
    monkeypatch.setattr(own.TwoStreams, "head", lambda self, h, parts: head(self, h["image"] + h["text"].mean(), parts))
    assert "can't run on inputs" in refusal(own.single())


def held_by_hand(model: Any, rows: list[str]) -> list[Tensor]:
    """The predictions at steps whose branches compute or hold the last output, by the model's own modules in torch."""
    x, _, y = example_inputs(model.spec, 2)
    times = torch.linspace(900.0, 1.0, len(rows))
    tables = model.condition(times, y)
    held: dict[str, list[Tensor]] = {}
    predictions = []
    for index, row in enumerate(rows):
        parts = model.unpack({name: table[index] for name, table in tables.items()})
        image, text = model.embed(x), model.context(parts)["text"]
        for branch, mark in zip(model.branches, row, strict=True):
            block, own = model.blocks[int(branch.number)], parts[branch.number]
            if mark == "x":
                if branch.name.endswith("attn"):
                    held[branch.name] = list(block.attention(image, text, own))
                else:
                    to_text = branch.name.endswith("text")
                    stream, layer = (text, block.of_text) if to_text else (image, block.of_image)
                    held[branch.name] = [layer(stream, own["text" if to_text else "image"])]
            outs = list(held[branch.name])
            if branch.name.endswith("ff_text"):
                text = text + own["text"][:, 5:6] * outs[0]
            elif branch.name.endswith("ff"):
                image = image + own["image"][:, 5:6] * outs[0]
            else:
                image = image + own["image"][:, 2:3] * outs.pop(0)
                image = image + (own["image"][:, 8:9] * outs.pop(0) if block.dual else 0)
                text = text + (0 if block.last else own["text"][:, 2:3] * outs.pop(0))
        predictions.append(model.head(image, parts))
    return predictions


@torch.no_grad()
@pytest.mark.parametrize(("name", "caches"), [("single", "branches"), ("dual", "branches"), ("dual", "sums")])
def test_segments_give_what_torch_gives_with_outputs_held_by_hand(
    name: str, caches: Any, own: ModuleType, tmp_path: Path
) -> None:
    """Steps that compute all, nothing, only the text's feed-forward of a block, and attention on a held text."""
    model = getattr(own, name)().eval()
    rows = ["xxxxxxxx", "........", "..x.....", "...x..x.", "xxxxxxxx", "........"]
    rows = rows[:2] + rows[4:] if caches == "sums" else rows
    schedule = CacheSchedule(compute=tuple(tuple(mark == "x" for mark in row) for row in rows))
    times = torch.linspace(900.0, 1.0, len(rows)).tolist()
    spec = model.spec
    program = program_from_schedule(schedule, times, spec.branches, streams=spec.streams, caches=caches)
    sessions = {}
    for segment in segments_of(model, program):
        export_segment(segment, tmp_path / f"{segment.name}.onnx", spec.branches)
        sessions[segment.name] = OnnxRuntimeBackend().session(tmp_path / f"{segment.name}.onnx")
    x, _, y = example_inputs(spec, 2)
    tables = {n: v.numpy() for n, v in model.condition(torch.linspace(900.0, 1.0, len(rows)), y).items()}
    slots: dict[int, np.ndarray] = {}
    for step, expected in zip(program.steps, held_by_hand(model, rows), strict=True):
        session, ports = sessions[step.segment], dict(program.cache_ports(step))
        own_rows = {n: table[step.index] for n, table in tables.items()}
        later = {f"ahead.{n}": table[[min(step.index + 1, len(rows) - 1)]] for n, table in tables.items()}
        feeds = {
            "x": x.numpy(),
            **own_rows,
            **later,
            **{port: slots[slot] for port, slot in ports.items() if slot in slots},
        }
        names = [port.name for port in session.get_outputs()]
        outs = dict(zip(names, session.run(names, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))
        slots |= {slot: outs[f"cache.{value}"] for value, slot in step.writes.items()}
        assert relative_error(torch.from_numpy(outs["out"]), expected) < 1e-4, step.index
