"""Programs: every read gets the newest value, and the passes leave nothing superfluous."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.choices import Caches
from ditc.errors import InputError
from ditc.passes import NothingQuantizedError, ends_in_float, program_from_schedule
from ditc.program import Program, SegmentPlan, Step
from ditc.program_checks import check_program, contradictions, reads_get_the_newest
from ditc.schedule import CacheSchedule

LAW = settings(deadline=None)  # a busy machine stalls now and then

NAMES = ("b0", "b1", "b2", "b3", "b4")


@st.composite
def schedules(draw: st.DrawFn) -> CacheSchedule:
    width = draw(st.integers(1, 5))
    row = st.tuples(*[st.booleans()] * width)
    later = draw(st.lists(row, min_size=1, max_size=11))
    return CacheSchedule(compute=((True,) * width, *later))


def compiled(schedule: CacheSchedule, *, decode: bool = False, caches: Caches = "branches") -> Program:
    timesteps = [float(t) for t in range(schedule.steps - 1, -1, -1)]
    return program_from_schedule(schedule, timesteps, NAMES[: len(schedule.compute[0])], decode=decode, caches=caches)


def computed_by(step: Step, program: Program, schedule: CacheSchedule) -> list[str]:
    row = schedule.compute[step.index]
    return [branch for branch, computes in zip(program.branches, row, strict=True) if computes]


def rows(*marks: str) -> CacheSchedule:
    return CacheSchedule(compute=tuple(tuple(mark == "x" for mark in row) for row in marks))


def fora(interval: int, steps: int, width: int = 3) -> CacheSchedule:
    return rows(*("x" * width if step % interval == 0 else "." * width for step in range(steps)))


@LAW
@given(schedules())
def test_every_read_gets_what_the_last_computing_step_left(schedule: CacheSchedule) -> None:
    program = compiled(schedule)
    newest: dict[str, int] = {}
    slots: dict[int, tuple[str, int]] = {}
    for step in program.steps:
        for branch, slot in step.reads.items():
            assert slots[slot] == (branch, newest[branch])
        newest |= dict.fromkeys(computed_by(step, program, schedule), step.index)
        slots |= {slot: (branch, step.index) for branch, slot in step.writes.items()}


@LAW
@given(schedules())
def test_a_step_reads_exactly_what_it_does_not_compute(schedule: CacheSchedule) -> None:
    program = compiled(schedule)
    for step in program.steps:
        assert step.reads.keys() == set(program.branches) - set(computed_by(step, program, schedule))


@LAW
@given(schedules())
def test_a_step_never_writes_a_slot_that_it_reads_nor_one_slot_twice(schedule: CacheSchedule) -> None:
    for step in compiled(schedule).steps:
        used = [*step.reads.values(), *step.writes.values()]
        assert len(set(used)) == len(used)


@LAW
@given(schedules())
def test_slots_are_numbered_from_zero_without_gaps(schedule: CacheSchedule) -> None:
    program = compiled(schedule)
    used = {slot for step in program.steps for slot in (*step.reads.values(), *step.writes.values())}
    assert used == set(range(program.slots))


@LAW
@given(schedules())
def test_a_step_binds_exactly_the_caches_of_its_segment(schedule: CacheSchedule) -> None:
    program = compiled(schedule)
    for step, row in zip(program.steps, schedule.compute, strict=True):
        plan = program.segment(step.segment)
        assert plan.compute == row
        assert set(plan.reads) == step.reads.keys()
        assert set(plan.writes) == step.writes.keys()


@LAW
@given(schedules())
def test_a_program_has_one_segment_per_distinct_row(schedule: CacheSchedule) -> None:
    program = compiled(schedule)
    assert len(program.segments) == len(set(schedule.compute))
    assert len({plan.name for plan in program.segments}) == len(program.segments)


@LAW
@given(schedules())
def test_a_segment_returns_a_cache_only_where_a_later_step_reads_it(schedule: CacheSchedule) -> None:
    program = compiled(schedule)
    read_from: set[tuple[str, str]] = set()
    maker: dict[str, str] = {}
    for step in program.steps:
        read_from |= {(maker[branch], branch) for branch in step.reads}
        maker |= dict.fromkeys(computed_by(step, program, schedule), step.segment)
    assert {(plan.name, branch) for plan in program.segments for branch in plan.writes} == read_from


def test_without_reuse_there_is_one_full_segment_and_no_cache() -> None:
    program = compiled(rows("xx", "xx", "xx"))
    assert program.slots == 0
    assert program.segments == (SegmentPlan(name="full", compute=(True, True)),)
    assert all(not step.reads and not step.writes for step in program.steps)


def test_fora_has_exactly_a_full_and_a_reuse_segment() -> None:
    program = compiled(fora(3, 9))
    assert {plan.name for plan in program.segments} == {"full", "reuse"}
    assert [step.segment for step in program.steps] == ["full", "reuse", "reuse"] * 3
    assert program.segment("full").writes == program.segment("reuse").reads == ("b0", "b1", "b2")


def test_steps_with_equal_rows_share_a_segment() -> None:
    program = compiled(rows("xx", "x.", ".x", "x.", "..", "x."))
    names = [step.segment for step in program.steps]
    assert names[1] == names[3] == names[5]
    assert len({names[0], names[1], names[2], names[4]}) == 4
    assert (names[0], names[4]) == ("full", "reuse")


def test_a_segment_name_depends_on_its_row_alone() -> None:
    first = compiled(rows("xx", "x.", "xx")).steps[1].segment
    later = compiled(rows("xx", "..", ".x", "x.")).steps[3].segment
    assert first == later


def test_a_branch_keeps_its_slot_where_it_can() -> None:
    program = compiled(rows("xxx", "...", "xx.", "x.x"))
    assert program.steps[0].writes == {"b0": 0, "b1": 1, "b2": 2}
    assert program.steps[2].writes == {"b1": 1}  # slot 0 is free by then, too


def test_under_fora_every_branch_stays_where_it_is() -> None:
    homes = [step.writes for step in compiled(fora(3, 12)).steps if step.segment == "full"]
    assert homes == [{"b0": 0, "b1": 1, "b2": 2}] * 4


def test_a_slot_whose_value_nobody_needs_any_more_is_used_again() -> None:
    program = compiled(rows("xx", ".x", "x.", "x.", "x."))
    assert program.slots == 2


def test_a_branch_that_is_never_reused_takes_no_slot() -> None:
    program = compiled(rows("xxx", "x.x", "x.x"))
    assert program.slots == 1
    assert program.segment("full").writes == ("b1",)


def test_conditioning_runs_once_before_the_loop() -> None:
    program = compiled(fora(2, 6))
    assert program.prologue == ("condition",)
    assert all(step.before == () for step in program.steps)


def test_decoding_is_a_call_after_the_loop_and_only_on_request() -> None:
    assert compiled(fora(2, 4), decode=True).epilogue == ("decode",)
    assert compiled(fora(2, 4)).epilogue == ()


def test_each_step_carries_its_place_and_its_timestep() -> None:
    program = program_from_schedule(fora(2, 3), [999.0, 500.0, 1.0], NAMES[:3])
    assert [(step.index, step.t) for step in program.steps] == [(0, 999.0), (1, 500.0), (2, 1.0)]


@LAW
@given(schedules(), st.booleans())
def test_a_program_survives_json(schedule: CacheSchedule, decode: bool) -> None:
    program = compiled(schedule, decode=decode)
    assert Program.model_validate_json(program.model_dump_json()) == program


def test_the_same_schedule_gives_the_same_bytes() -> None:
    schedule = rows("xxx", "x.x", "..x", "xxx", ".x.")
    assert compiled(schedule).model_dump_json() == compiled(schedule).model_dump_json()


@LAW
@given(st.integers(2, 6), st.integers(2, 20))
def test_a_sum_is_read_once_and_by_the_step_it_was_made_for(interval: int, steps: int) -> None:
    program = compiled(fora(interval, steps, width=5), caches="sums")
    slots: dict[int, tuple[str, int]] = {}
    for step in program.steps:
        for value, slot in step.reads.items():
            writer = step.index - int(value.removeprefix("ahead."))
            assert slots.pop(slot) == (value, writer)
            assert writer == step.index // interval * interval
        slots |= {slot: (value, step.index) for value, slot in step.writes.items()}
        assert bool(step.reads) == (step.index % interval > 0)
    assert program.slots == min(interval, steps) - 1


def test_with_sums_the_full_step_looks_ahead_and_the_reuse_step_has_one_cache() -> None:
    program = compiled(fora(3, 8), caches="sums")
    full, reuse = program.segments
    assert (full.writes, full.ahead) == (("ahead.1", "ahead.2"), 2)
    assert (reuse.reads, reuse.ahead) == (("ahead",), 0)
    assert [list(program.cache_ports(step)) for step in program.steps[:3]] == [
        [("cache.ahead.1", 0), ("cache.ahead.2", 1)],
        [("cache.ahead", 0)],
        [("cache.ahead", 1)],
    ]
    assert set(program.steps[6].writes) == {"ahead.1", "ahead.2"}  # the last interval is shorter, the segment the same


@pytest.mark.parametrize(
    "schedule",
    [
        rows("xxx", "x..", "...", "xxx"),  # a step that computes some branches needs the others by themselves
        rows("xxx", "xxx"),
        rows("xx", "..", "..", ".."),  # three sums take more memory than two branches
    ],
)
def test_a_schedule_that_gains_nothing_from_sums_keeps_the_branches(schedule: CacheSchedule) -> None:
    assert compiled(schedule, caches="sums") == compiled(schedule)


def extrapolating(schedule: CacheSchedule, reuse: str = "taylor") -> CacheSchedule:
    return schedule.model_copy(update={"reuse": reuse})


ORDERS = {"taylor": 1, "taylor:2": 2, "taylor:3": 3}
SUM_PORTS = ("cache.ahead", "cache.before", "cache.before.2", "cache.before.3")


@LAW
@given(st.sampled_from([*ORDERS]), st.lists(st.integers(0, 4), min_size=1, max_size=7), st.integers(0, 4))
def test_an_extrapolating_step_reads_its_sums_of_the_last_steps_that_computed(
    reuse: str, skips: list[int], last: int
) -> None:
    """Intervals of any length: the sum each of them made for just this step, from a slot that still holds it.

    An early step gives the earliest sum that it has once more for each that it lacks.
    """
    marks = [mark for count in [*skips, last + 1] for mark in ("xxxxx", *["....."] * count)]
    program = compiled(extrapolating(rows(*marks), reuse), caches="sums")
    looks_back = ORDERS[reuse] + 1
    slots: dict[int, tuple[str, int]] = {}
    computed: list[int] = []
    for step, row in zip(program.steps, marks, strict=True):
        made_by = [] if row[0] == "x" else computed[-looks_back:][::-1]
        read = dict(program.cache_ports(step))
        bound = made_by if len(made_by) < 2 else [*made_by, *[made_by[-1]] * (looks_back - len(made_by))]
        for maker, port in zip(bound, SUM_PORTS, strict=False):
            assert slots[read[port]] == (f"ahead.{step.index - maker}", maker)
        assert step.segment == ("full", "reuse", "extrapolate")[min(len(made_by), 2)]
        assert len(step.reads) == len(made_by)
        assert len(read) == len(bound) + len(step.writes)
        computed += [step.index] if row[0] == "x" else []
        slots |= {slot: (value, step.index) for value, slot in step.writes.items()}


def test_only_sums_that_some_step_reads_are_made() -> None:
    program = compiled(extrapolating(fora(3, 9)), caches="sums")
    full, reuse, extrapolate = program.segments
    assert (full.writes, full.ahead) == (("ahead.1", "ahead.2", "ahead.4", "ahead.5"), 5)
    assert (reuse.reads, reuse.rows) == (("ahead",), 0)
    assert (extrapolate.reads, extrapolate.rows) == (("ahead", "before"), 2)


def test_higher_orders_have_the_segments_of_the_first() -> None:
    program = compiled(extrapolating(fora(3, 15), "taylor:3"), caches="sums")
    full, reuse, extrapolate = program.segments
    assert (full.writes, full.ahead) == (tuple(f"ahead.{k}" for k in (1, 2, 4, 5, 7, 8, 10, 11)), 11)
    assert (reuse.reads, reuse.rows) == (("ahead",), 0)
    assert (extrapolate.reads, extrapolate.rows) == (("ahead", "before", "before.2", "before.3"), 4)
    assert [len(step.reads) for step in program.steps] == [0, 1, 1, 0, 2, 2, 0, 3, 3, 0, 4, 4, 0, 4, 4]


@LAW
@given(st.sampled_from([*ORDERS]), st.lists(st.booleans(), min_size=1, max_size=16))
def test_no_step_has_two_sums_in_one_slot(reuse: str, computes: list[bool]) -> None:
    schedule = extrapolating(rows(*("x" * 5 if mark else "." * 5 for mark in (True, *computes))), reuse)
    if all(computes) or schedule_skips(computes) > len(NAMES):
        return
    program = compiled(schedule, caches="sums")
    for step in program.steps:
        used = [*step.reads.values(), *step.writes.values()]
        assert len(set(used)) == len(used)
        written = {slot for port, slot in program.cache_ports(step) if port.removeprefix("cache.") in step.writes}
        assert written.isdisjoint(step.reads.values())
    assert not list(contradictions(program))


def schedule_skips(computes: list[bool]) -> int:
    """Return the most steps in a row that reuse."""
    return max(len(part) for part in "".join(".x"[mark] for mark in computes).split("x"))


@pytest.mark.parametrize(
    ("change", "contradiction"),
    [
        ({"reads": {"ahead.1": 1, "ahead.3": 0}}, "takes [0, 2, 4]"),  # not the earliest
        ({"reads": {"ahead.1": 1}}, "step 5 binds ['cache.ahead'], and segment 'extrapolate' has"),
        ({"segment": "reuse"}, "step 5 binds ['cache.ahead', 'cache.before', 'cache.before.2'], and segment 'reuse'"),
    ],
)
def test_a_step_without_its_sums_is_named(change: dict[str, object], contradiction: str) -> None:
    program = compiled(extrapolating(fora(2, 8), "taylor:2"), caches="sums")
    sums = dict(sorted(program.steps[5].reads.items()))
    assert [*sums] == ["ahead.1", "ahead.3", "ahead.5"]
    if "reads" in change:
        change = {"reads": {name: sums[name] for name in change["reads"]}}  # type: ignore[attr-defined]
    steps = [step if step.index != 5 else step.model_copy(update=change) for step in program.steps]
    assert contradiction in "\n".join(contradictions(program.model_copy(update={"steps": tuple(steps)})))


@pytest.mark.parametrize(("reuse", "refused"), [("hold", False), ("taylor", False), ("taylor:2", True)])
def test_the_name_of_a_port_of_sums_is_no_branchs(reuse: str, refused: bool) -> None:
    schedule = extrapolating(rows("xx", "..", "xx", "..", "xx", ".."), reuse)
    times, names = [float(6 - step) for step in range(6)], ("before.2", "b1")
    if not refused:
        assert program_from_schedule(schedule, times, names, caches="sums").slots
        return
    with pytest.raises(InputError, match=r"a branch is called 'before\.2', as sums made ahead are"):
        program_from_schedule(schedule, times, names, caches="sums")


def test_a_correction_takes_its_numbers_at_every_step_that_reuses() -> None:
    program = compiled(fora(3, 9).model_copy(update={"reuse": "affine"}), caches="sums")
    plain = compiled(fora(3, 9), caches="sums")
    assert [(plan.name, plan.rows) for plan in program.segments] == [("full", 0), ("reuse", 2)]
    assert program.steps == plain.steps


@pytest.mark.parametrize(
    "schedule", [rows("xxx", "x..", "...", "xxx"), rows("xxx", "xxx"), rows("xx", "..", "..", "..")]
)
@pytest.mark.parametrize("caches", ["sums", "branches"])
def test_what_has_no_sums_is_only_held(schedule: CacheSchedule, caches: Caches) -> None:
    with pytest.raises(InputError, match="--reuse taylor works on sums made ahead: it needs a policy that reuses"):
        compiled(extrapolating(schedule), caches=caches)


def hand_made(*steps: Step) -> Program:
    """A program of two branches whose steps call a segment that computes both, one of them, or none."""
    masks = {"full": (True, True), "first": (True, False), "second": (False, True), "reuse": (False, False)}
    plans = tuple(SegmentPlan(name=name, compute=mask) for name, mask in masks.items())
    return Program(branches=("b0", "b1"), steps=steps, segments=plans, slots=2)


READS_AGAINST_WRITES = [
    (
        "step 1 reads b0 from slot 0, which holds nothing",
        (
            Step(index=0, t=1, segment="full"),
            Step(index=1, t=0, segment="reuse", reads={"b0": 0}),
        ),
    ),
    (
        "step 2 reads b0 from slot 0, which holds b1 of step 1",
        (
            Step(index=0, t=2, segment="full", writes={"b0": 0}),
            Step(index=1, t=1, segment="second", writes={"b1": 0}),
            Step(index=2, t=0, segment="reuse", reads={"b0": 0}),
        ),
    ),
    (
        "step 2 reads ahead.2 from slot 0, which holds ahead.2 of step 1",
        (
            Step(index=0, t=2, segment="full", writes={"ahead.2": 0}),
            Step(index=1, t=1, segment="full", writes={"ahead.2": 0}),
            Step(index=2, t=0, segment="reuse", reads={"ahead.2": 0}),
        ),
    ),
    (
        "step 0 reads b0 from slot 0, which holds nothing",  # only what it writes itself
        (Step(index=0, t=0, segment="full", reads={"b0": 0}, writes={"b0": 0}),),
    ),
    (
        "step 2 reads b0 from slot 0, which holds b0 of step 0",  # step 1 has computed a newer one
        (
            Step(index=0, t=2, segment="full", writes={"b0": 0}),
            Step(index=1, t=1, segment="first", writes={"b0": 1}),
            Step(index=2, t=0, segment="reuse", reads={"b0": 0}),
        ),
    ),
    (
        "step 2 reads sums of the steps [0], and reuse 'hold' takes [1]",
        (
            Step(index=0, t=2, segment="full", writes={"ahead.2": 0}),
            Step(index=1, t=1, segment="full", writes={"ahead.1": 1}),
            Step(index=2, t=0, segment="reuse", reads={"ahead.2": 0}),
        ),
    ),
]


@pytest.mark.parametrize(("contradiction", "steps"), READS_AGAINST_WRITES)
def test_a_read_that_does_not_get_the_newest_value_is_named(contradiction: str, steps: tuple[Step, ...]) -> None:
    assert next(reads_get_the_newest(hand_made(*steps))) == contradiction


def test_a_program_that_writes_first_reads_the_newest() -> None:
    steps = (
        Step(index=0, t=1, segment="full", writes={"b0": 0, "b1": 1}),
        Step(index=1, t=0, segment="reuse", reads={"b1": 1, "b0": 0}),
    )
    assert not list(reads_get_the_newest(hand_made(*steps)))


@LAW
@given(schedules(), st.sampled_from(["branches", "sums"]), st.booleans())
def test_what_the_passes_make_has_no_contradiction(schedule: CacheSchedule, caches: Caches, decode: bool) -> None:
    assert not list(contradictions(compiled(schedule, decode=decode, caches=caches)))


def test_a_contradiction_is_refused_by_name() -> None:
    program = compiled(fora(2, 4))
    with pytest.raises(InputError, match="the program contradicts itself: it says 7 slots, and its steps use "):
        check_program(program.model_copy(update={"slots": 7}))


def test_a_branch_with_the_name_of_a_sum_is_refused() -> None:
    with pytest.raises(InputError, match=r"a branch is called 'ahead\.1', as sums made ahead are"):
        program_from_schedule(rows("xx", "xx"), [1.0, 0.0], ("ahead.1", "b1"))


def test_both_ends_call_the_unquantized_segment_where_they_compute() -> None:
    program = ends_in_float(compiled(fora(3, 12), caches="sums"), 4, 3)
    assert [step.segment for step in program.steps] == [
        *("float", "reuse", "reuse"),
        *("float", "reuse", "reuse"),
        *("full", "reuse", "reuse"),
        *("float", "reuse", "reuse"),
    ]
    assert program.calls == ["condition", "float", "reuse", "full"]


def test_a_step_in_floating_point_leaves_what_the_quantized_one_would() -> None:
    quantized = compiled(fora(3, 12), caches="sums")
    program = ends_in_float(quantized, 1, 0)
    in_float, full = program.segment("float"), program.segment("full")
    assert in_float == full.model_copy(update={"name": "float", "in_float": True})
    assert [(step.reads, step.writes) for step in program.steps] == [
        (step.reads, step.writes) for step in quantized.steps
    ]
    assert [plan.name for plan in program.segments if plan.quantizes] == ["full"]


@pytest.mark.parametrize(
    ("schedule", "ends", "message"),
    [
        (fora(3, 11), (0, 1), "--float-steps 0:1 names no step that computes"),
        (rows("xxx", "x..", "xxx"), (2, 0), "step 1 computes some branches"),
        (rows("xxx", "x..", "x.."), (1, 0), "leaves no step that computes everything to quantize"),
    ],
)
def test_ends_that_can_not_be_in_floating_point_are_refused(
    schedule: CacheSchedule, ends: tuple[int, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ends_in_float(compiled(schedule), *ends)


def test_a_program_without_a_quantized_step_is_an_error_of_its_own() -> None:
    with pytest.raises(NothingQuantizedError, match="leaves no step that computes everything to quantize"):
        ends_in_float(compiled(fora(3, 6)), 1, 3)
    with pytest.raises(NothingQuantizedError):
        ends_in_float(compiled(fora(3, 6)), 9_999, 0)
