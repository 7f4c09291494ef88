"""Charts: marks stand where their values are, on axes with round ticks."""

from __future__ import annotations

import re
from itertools import pairwise
from math import inf, nan
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditc.report.svg import Axis, Chart, Dot, Line, axis_for, dots, level, lines, step_map, steps_stacked

UNIT = Axis(0.0, 1.0, ((0.0, "0"), (1.0, "1")))
CHART = Chart("Name <of it>", "What it shows", height=100, steps=4, hints=("a", "b", "c", "d"))


def parsed(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+) ([^ML]+)", path)]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_an_axis_holds_zero_and_every_value_between_round_ticks(values: list[float]) -> None:
    axis = axis_for(values)
    slack = 1e-9 * (axis.high - axis.low)
    assert axis.low - slack <= min([0.0, *values]) <= max([0.0, *values]) <= axis.high + slack
    at = [value for value, _ in axis.ticks]
    assert 2 <= len(at) <= 7
    assert (at[0], at[-1]) == (axis.low, axis.high)
    gaps = [b - a for a, b in pairwise(at)]
    assert max(gaps) == pytest.approx(min(gaps))
    assert f"{gaps[0]:.3e}"[0] in "125"


def test_ticks_are_labelled_with_their_unit_as_finely_as_they_lie() -> None:
    assert [text for _, text in axis_for([0.0213], scale=100, unit="%").ticks] == ["0", "1%", "2%", "3%"]
    assert [text for _, text in axis_for([-0.003, 0.0010], signed=True, scale=100, unit="%").ticks] == [
        "\N{MINUS SIGN}0.3%",
        "\N{MINUS SIGN}0.2%",
        "\N{MINUS SIGN}0.1%",
        "0",
        "+0.1%",
    ]
    assert axis_for([]).ticks[0] == (0, "0")
    assert axis_for([nan, inf, 3.0]).high == 3


def test_a_line_runs_through_the_middle_of_each_step_at_its_value() -> None:
    (path,) = parsed(lines(CHART, UNIT, [Line([0.0, 0.25, 1.0, 7.0], "bundle")])).iter("path")
    assert places(path.attrib["d"]) == [(0.5, 100), (1.5, 75), (2.5, 0), (3.5, 0)]  # the last lies on the edge


def test_a_line_has_a_gap_where_a_value_is_not_finite() -> None:
    (path,) = parsed(lines(CHART, UNIT, [Line([0.5, nan, 0.5, 0.5], "bundle")])).iter("path")
    assert path.attrib["d"] == "M0.5 50.0M2.5 50.0L3.5 50.0"


def test_values_of_some_steps_stand_at_those_steps() -> None:
    (path,) = parsed(lines(CHART, UNIT, [Line([0.0, 1.0], "thin", "q & k", at=(0, 3))])).iter("path")
    assert places(path.attrib["d"]) == [(0.5, 100), (3.5, 0)]
    assert [title.text for title in path] == ["q & k"]


def test_bars_stand_on_one_another_in_the_band_of_their_step() -> None:
    whole = parsed(steps_stacked(CHART, UNIT, [[(0.5, "computed"), (0.25, "outside")], [(0.0, "reused")]]))
    bars = [rect.attrib for rect in whole.iter("rect") if rect.attrib["class"] != "hit"]
    assert [(bar["class"], bar["x"], bar["y"], bar["height"]) for bar in bars] == [
        ("computed", "2.500%", "50", "50"),
        ("outside", "2.500%", "25", "25"),
        ("reused", "27.500%", "100", "0"),
    ]


def test_a_map_fills_cells_by_their_kind() -> None:
    chart = Chart("Program", "two branches", height=28, steps=3)
    chart_svg = parsed(
        step_map(chart, ["attn", "mlp"], [("float", "float"), ("reused", "computed"), ("reused", "reused")])
    )
    cells = {path.attrib["class"]: re.findall(r"M(\S+) ([\d.]+)h", path.attrib["d"]) for path in chart_svg.iter("path")}
    assert cells["float"] == [("0.08", "0.1"), ("0.08", "1.1")]
    assert cells["computed"] == [("1.08", "1.1")]
    assert cells["reused"] == [("1.08", "0.1"), ("2.08", "0.1"), ("2.08", "1.1")]
    assert [text.text for text in chart_svg.iter("text") if text.attrib["x"] == "-8"] == ["attn", "mlp", "step"]


def test_names_of_narrow_rows_leave_each_other_room() -> None:
    chart = Chart("Program", "many branches", height=300, steps=1)
    chart_svg = parsed(step_map(chart, [f"b{n}" for n in range(100)], [("computed",) * 100]))
    at = [float(text.attrib["y"]) for text in chart_svg.iter("text") if text.text.startswith("b")]
    assert min(b - a for a, b in pairwise(at)) >= 12


def test_a_dot_has_an_area_in_proportion_to_its_weight() -> None:
    small, large = parsed(dots(CHART, [Dot(0, 5.0, 1), Dot(2, 6.0, 4)])).iter("circle")
    assert float(large.attrib["r"]) == pytest.approx(2 * float(small.attrib["r"]))
    assert (large.attrib["cx"], large.attrib["cy"]) == ("62.500%", "6")


def test_a_level_is_named_where_it_lies() -> None:
    group = parsed(f"<g>{level(CHART, UNIT, 0.75, 'fp', 'INT8')}</g>")
    line, text = group
    assert (line.attrib["y1"], line.attrib["y2"], text.text) == ("25", "25", "INT8")


def test_a_chart_is_an_image_with_a_title_a_description_and_a_hint_for_each_step() -> None:
    chart_svg = parsed(lines(CHART, UNIT, [Line([0.0] * 4, "bundle")]))
    assert chart_svg.attrib["role"] == "img"
    assert chart_svg.attrib["aria-label"] == "Name <of it>. What it shows"
    assert [(child.tag, child.text) for child in chart_svg][:2] == [
        ("title", "Name <of it>"),
        ("desc", "What it shows"),
    ]
    assert [rect[0].text for rect in chart_svg.iter("rect")] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("steps", [2, 4, 50, 250, 1000])
def test_few_steps_are_labelled_however_many_there_are(steps: int) -> None:
    chart = Chart("t", "d", height=10, steps=steps)
    chart_svg = parsed(lines(chart, UNIT, [Line([0.0] * steps, "bundle")]))
    labels = [int(text.text) for text in chart_svg.iter("text") if text.attrib["class"] == "tick x"]
    assert labels[0] == 0
    assert 2 <= len(labels) <= 7
