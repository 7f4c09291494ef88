"""Models with several streams: what a spec may say of them, and programs that keep no output for nobody."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ditc.choices import Caches
from ditc.passes import program_from_schedule
from ditc.program import Program, Step
from ditc.program_checks import contradictions
from ditc.schedule import CacheSchedule
from ditc.spec import ModelSpec
from ditc.streams import IMAGE, BranchStreams, Output, Wiring

JOINT = (IMAGE, "text")
TEXT = Output(name="text", shape=(5, 8), stream="text")
# SD3's: two double blocks, the last one without an output to the text
BRANCHES = ("0.attn", "0.ff", "0.ff_text", "1.attn", "1.ff")
STREAMS = {
    "0.attn": BranchStreams(reads=JOINT, outputs=(Output(name="image"), TEXT)),
    "0.ff_text": BranchStreams(reads=("text",), outputs=(TEXT,)),
    "1.attn": BranchStreams(reads=JOINT),
}
PLAIN = {
    "name": "two",
    "family": "mine",
    "in_channels": 1,
    "height": 2,
    "width": 2,
    "num_classes": 2,
    "cfg_channels": 1,
    "branches": BRANCHES,
    "branch_shape": (4, 8),
    "parameters": 7,
}


def spec_of(**changes: Any) -> ModelSpec:
    return ModelSpec(**{**PLAIN, "streams": STREAMS, **changes})


def rows(*marks: str) -> CacheSchedule:
    return CacheSchedule(compute=tuple(tuple(mark == "x" for mark in row) for row in marks))


def compiled(schedule: CacheSchedule, wiring: Wiring | None = None, caches: Caches = "branches") -> Program:
    wiring = wiring or Wiring(BRANCHES, STREAMS)
    times = [float(t) for t in range(schedule.steps - 1, -1, -1)]
    return program_from_schedule(schedule, times, wiring.branches, streams=wiring.listed, caches=caches)


def test_a_model_without_streams_is_written_as_before_there_were_any() -> None:
    assert "streams" not in ModelSpec(**PLAIN).model_dump(mode="json")
    assert "streams" not in compiled(rows("xx", ".."), Wiring(("a", "b"), {})).model_dump(mode="json")


def test_a_model_with_streams_is_read_as_it_was_written() -> None:
    spec, program = spec_of(), compiled(rows("xxxxx", "....."))
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert Program.model_validate_json(program.model_dump_json()) == program


def test_an_output_among_several_is_cached_under_its_own_name() -> None:
    assert list(Wiring(BRANCHES, STREAMS).values) == [
        "0.attn.image",
        "0.attn.text",
        "0.ff",
        "0.ff_text",
        "1.attn",
        "1.ff",
    ]


def test_the_numbers_that_branches_give_are_those_of_all_outputs() -> None:
    assert spec_of().cached_numbers == 4 * (4 * 8) + 2 * (5 * 8)
    assert ModelSpec(**PLAIN).cached_numbers == 5 * (4 * 8)


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ({"2.attn": BranchStreams(reads=JOINT)}, "streams names '2.attn', which is none of the branches"),
        (
            {"0.attn": BranchStreams(outputs=(Output(name="a"), Output(name="a")))},
            "branch '0.attn' names an output twice: a, a",
        ),
        ({"0.attn": BranchStreams(reads=(IMAGE, IMAGE))}, "branch '0.attn' names a stream that it reads twice"),
        (
            {"1.attn": BranchStreams(reads=JOINT, outputs=(Output(name="image"), TEXT))},
            "output 'text' of branch '1.attn' goes to the stream 'text', which no later branch reads",
        ),
        (
            dict.fromkeys(BRANCHES, BranchStreams(reads=("text",), outputs=(TEXT,))),
            "output 'text' of branch '1.ff' goes to the stream 'text', which no later branch reads",
        ),
        ({"0.attn": {"outputs": []}}, "at least 1 item"),
        ({"0.attn": {"reads": []}}, "at least 1 item"),
        ({"0.attn": {"outputs": [{"name": "a.b"}]}}, "should match pattern"),
        ({"0.attn": {"outputs": [{"name": "a", "shape": [4, 0]}]}}, "greater than 0"),
        ({}, "at least 1 item"),
    ],
)
def test_streams_that_contradict_themselves_are_refused_by_branch_and_output(streams: Any, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        spec_of(streams=streams)
    assert said in str(refused.value)


def test_a_model_of_which_nothing_reaches_the_head_is_refused() -> None:
    loop = {"a": BranchStreams(reads=("text",), outputs=(TEXT,)), "b": BranchStreams(reads=("text",), outputs=(TEXT,))}
    sentences = list(Wiring(("a", "b"), loop).contradictions())
    assert sentences[-1] == "no branch adds to the stream 'image', which is what the head reads"


def test_outputs_that_would_be_cached_under_one_name_are_refused() -> None:
    two = BranchStreams(outputs=(Output(name="b"), Output(name="c")))
    assert list(Wiring(("a", "a.b"), {"a": two}).contradictions()) == ["two outputs are cached as 'a.b'"]


def test_a_step_that_reuses_everything_knows_no_text() -> None:
    program = compiled(rows("xxxxx", ".....", ".....", "xxxxx"))
    assert (
        program.segment("full").writes == program.segment("reuse").reads == ("0.attn.image", "0.ff", "1.attn", "1.ff")
    )
    assert program.slots == 4


def test_sums_made_ahead_are_one_for_each_step_however_many_streams_there_are() -> None:
    program = compiled(rows("xxxxx", ".....", ".....", "xxxxx"), caches="sums")
    assert program.segment("full").writes == ("ahead.1", "ahead.2")
    assert program.segment("reuse").reads == ("ahead",)


def test_a_step_that_computes_some_branches_takes_the_text_as_far_as_they_read_it() -> None:
    program = compiled(rows("xxxxx", "...x.", ".x...", "x...."))
    reads = {"".join(".x"[own] for own in plan.compute): plan.reads for plan in program.segments}
    assert reads["...x."] == ("0.attn.image", "0.attn.text", "0.ff", "0.ff_text", "1.ff")
    assert reads[".x..."] == ("0.attn.image", "1.attn", "1.ff")
    assert reads["x...."] == ("0.ff", "1.attn", "1.ff")  # what its text goes to is reused


def test_a_text_is_taken_for_what_is_kept_for_later_steps_as_well() -> None:
    program = compiled(rows("xxxxx", "..x..", "...x."))
    assert program.steps[1].writes.keys() == {"0.ff_text"}
    assert "0.attn.text" in program.steps[1].reads


def test_what_only_a_dead_branch_reads_is_not_kept() -> None:
    program = compiled(rows("xxxxx", "..x..", "xxxxx"))
    assert program.segment("full").writes == ("0.attn.image", "0.ff", "1.attn", "1.ff")


def test_a_free_slot_of_another_shape_is_left_alone() -> None:
    program = compiled(rows("xxxxx", ".....", "..xx.", "...x."))
    assert program.steps[2].writes == {"0.ff_text": program.slots - 1}


def test_a_slot_holds_values_of_one_shape() -> None:
    program = compiled(rows("xxxxx", "...x.", "xxxxx", "...x."))
    assert program.slots == 5
    assert not list(contradictions(program))
    swapped = {0: 1, 1: 0}  # from the third step on

    def moved(slots: dict[str, int]) -> dict[str, int]:
        return {value: swapped.get(slot, slot) for value, slot in slots.items()}

    later = [
        step.model_copy(update={"reads": moved(step.reads), "writes": moved(step.writes)}) for step in program.steps[2:]
    ]
    wrong = program.model_copy(update={"steps": (*program.steps[:2], *later)})
    assert "slot 1 holds '0.attn.text' and '0.attn.image', which have different shapes" in list(contradictions(wrong))


def test_a_program_that_reads_a_text_for_nobody_contradicts_itself() -> None:
    program = compiled(rows("xxxxx", "....."))
    plan = program.segment("reuse").model_copy(update={"reads": tuple(program.wiring.values)})
    wrong = program.model_copy(update={"segments": (program.segment("full"), plan)})
    assert "segment 'reuse' reads" in next(contradictions(wrong))


def test_a_program_whose_streams_contradict_themselves_is_none() -> None:
    program = compiled(rows("xxxxx", "....."))
    wrong = program.model_copy(update={"streams": {**STREAMS, "other": BranchStreams(reads=JOINT)}})
    assert next(contradictions(wrong)) == "streams names 'other', which is none of the branches"


@st.composite
def wirings(draw: st.DrawFn) -> Wiring:
    """Up to five branches on up to three streams, of which each output reaches the head in some way."""
    names = tuple(f"b{number}" for number in range(draw(st.integers(1, 5))))
    listed, read = {}, {IMAGE}
    for name in reversed(names):
        reads = draw(st.lists(st.sampled_from((IMAGE, "text", "sound")), min_size=1, unique=True))
        targets = draw(st.lists(st.sampled_from(sorted(read)), min_size=1, max_size=3))
        outputs = tuple(Output(name=f"o{n}", stream=target) for n, target in enumerate(targets))
        listed[name] = BranchStreams(reads=tuple(reads), outputs=outputs)
        read |= set(reads)
    return Wiring(names, listed)


@st.composite
def scheduled(draw: st.DrawFn) -> tuple[Wiring, CacheSchedule]:
    wiring = draw(wirings())
    row = st.tuples(*[st.booleans()] * len(wiring.branches))
    later = draw(st.lists(row, min_size=1, max_size=6))
    return wiring, CacheSchedule(compute=((True,) * len(wiring.branches), *later))


Term = tuple[Any, ...]


def predictions(wiring: Wiring, program: Program | None, schedule: CacheSchedule) -> list[Term]:
    """Walk a schedule on terms in place of tensors: with slots as a program has them, else with everything at hand."""
    slots: dict[int, Term] = {}
    newest: dict[str, Term] = {}
    predicted = []
    for index, row in enumerate(schedule.compute):
        step = None if program is None else program.steps[index]
        cached = dict(newest) if step is None else {value: slots[slot] for value, slot in step.reads.items()}
        streams: dict[str, Term] = {name: (index, name) for name in wiring.streams}
        fresh: dict[str, Term] = {}
        for branch, computes in zip(wiring.branches, row, strict=True):
            given = tuple(streams[name] for name in wiring.of(branch).reads)
            for value, output in wiring.outputs(branch).items():
                if computes:
                    fresh[value] = (value, given)
                if computes or value in cached:
                    streams[output.stream] += ((fresh if computes else cached)[value],)
        newest |= fresh
        slots |= _written(step, fresh)
        predicted.append(streams[IMAGE])
    return predicted


def _written(step: Step | None, fresh: dict[str, Term]) -> dict[int, Term]:
    return {} if step is None else {slot: fresh[value] for value, slot in step.writes.items()}


@given(scheduled())
def test_a_program_gives_what_a_walk_that_keeps_everything_gives(case: tuple[Wiring, CacheSchedule]) -> None:
    wiring, schedule = case
    program = compiled(schedule, wiring)
    assert predictions(wiring, program, schedule) == predictions(wiring, None, schedule)


@given(scheduled())
def test_nothing_is_written_that_no_later_step_reads(case: tuple[Wiring, CacheSchedule]) -> None:
    wiring, schedule = case
    program = compiled(schedule, wiring)
    read: set[tuple[str, str]] = set()
    maker: dict[str, str] = {}
    for step in program.steps:
        read |= {(maker[value], value) for value in step.reads}
        maker |= dict.fromkeys(wiring.computed_by(schedule.compute[step.index]), step.segment)
    assert {(plan.name, value) for plan in program.segments for value in plan.writes} == read
