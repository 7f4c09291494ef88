"""Charts as inline SVG: pure functions from numbers to markup.

All charts of steps share one horizontal scale, a band for each step, so charts under one another line up. Horizontal
places are shares of the width and vertical ones are pixels: a chart fills whatever width the page gives it, and its
text keeps its size. Axis labels stand in the padding that the page's style sheet gives to `svg.plot`. Colours are
classes, so light, dark and print are the style sheet's business too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, floor, isfinite, log10

from ditc.report.markup import Markup, element, joined

__all__ = ["Axis", "Chart", "Dot", "Line", "axis_for", "dots", "level", "lines", "step_map", "steps_stacked"]

BELOW = 26  # pixels under the plot for the labels of its steps; the style sheet pads as much
ABOVE = 8
MOST_STEP_LABELS = 7


@dataclass(frozen=True)
class Axis:
    """A vertical axis from `low` to `high` with labelled ticks."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def y(self, value: float, height: float) -> float:
        """Return pixels below the top of a plot; a value beyond the axis lies on its edge."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return height * (1 - share)


@dataclass(frozen=True)
class Chart:
    """A chart's name, what it shows in words, its height in pixels, and how many steps it spans.

    `hints` are one per step, shown where a pointer rests on it.
    """

    title: str
    description: str
    height: float
    steps: int
    hints: tuple[str, ...] = ()

    def x(self, step: float) -> str:
        """Return the place of a step on the horizontal axis."""
        return f"{100 * step / self.steps:.3f}%"


@dataclass(frozen=True)
class Line:
    """Values at some steps, drawn in the colour of a class; `name` is shown where a pointer rests on it."""

    values: Sequence[float]
    kind: str
    name: str = ""
    at: Sequence[int] | None = None  # the step of each value; None is every step from 0 on


@dataclass(frozen=True)
class Dot:
    """A dot at a step, `y` pixels below the top, of an area in proportion to `weight`."""

    step: int
    y: float
    weight: float


def axis_for(values: Sequence[float], *, unit: str = "", signed: bool = False, scale: float = 1) -> Axis:
    """Return an axis with round ticks, over 0 and all finite values; labels are values times `scale` with the unit."""
    finite = [value for value in values if isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if high - low < 1e-12:
        high = low + 1
    width = _round_width((high - low) / 4)
    first, last = floor(low / width + 1e-9), ceil(high / width - 1e-9)
    decimals = max(0, -floor(log10(width * scale) + 1e-9))
    sign = "+" if signed else ""
    ticks = []
    for number in range(first, last + 1):
        text = f"{number * width * scale:{sign},.{decimals}f}{unit}" if number else "0"
        ticks.append((number * width, text.replace("-", "\N{MINUS SIGN}")))
    return Axis(first * width, last * width, tuple(ticks))


def _round_width(width: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** floor(log10(width))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width * (1 - 1e-9))


def lines(chart: Chart, axis: Axis, series: Sequence[Line], *marks: Markup) -> Markup:
    """Draw a line for each series over the steps; `marks` lie under them."""
    drawn = joined(_path(chart, axis, line) for line in series)
    stretched = element(
        "svg",
        drawn,
        viewBox=f"0 0 {chart.steps} {chart.height:g}",
        preserveAspectRatio="none",
        width="100%",
        height=chart.height,
        class_="stretched",
    )
    return _frame(chart, [*_grid(chart, axis), *marks, stretched], _hits(chart) if chart.hints else Markup())


def level(chart: Chart, axis: Axis, value: float, kind: str, label: str = "") -> Markup:
    """Draw a horizontal line across a chart, named at its right end."""
    y = axis.y(value, chart.height)
    rule = element("line", x1=0, x2="100%", y1=y, y2=y, class_=f"level {kind}")
    return joined((rule, element("text", label, x="100%", y=y - 5, class_=f"mark {kind}"))) if label else rule


def _path(chart: Chart, axis: Axis, line: Line) -> Markup:
    """Draw a line through the middles of its steps, with a gap where a value is not finite."""
    places, pen = [], "M"
    at = range(len(line.values)) if line.at is None else line.at
    for step, value in zip(at, line.values, strict=True):
        if not isfinite(value):
            pen = "M"
            continue
        places.append(f"{pen}{step + 0.5:g} {axis.y(value, chart.height):.1f}")
        pen = "L"
    named = (element("title", line.name),) if line.name else ()
    return element("path", *named, d="".join(places), class_=f"line {line.kind}", vector_effect="non-scaling-stroke")


def steps_stacked(chart: Chart, axis: Axis, bars: Sequence[Sequence[tuple[float, str]]], *marks: Markup) -> Markup:
    """Draw a bar for each step, of (value, class) parts on top of one another."""
    drawn = []
    for step, parts in enumerate(bars):
        base = 0.0
        for value, kind in parts:
            top = axis.y(base + value, chart.height)
            size = axis.y(base, chart.height) - top
            drawn.append(_bar(chart, step, top, size, kind))
            base += value
    return _frame(chart, [*_grid(chart, axis), *drawn, *marks], _hits(chart))


def _bar(chart: Chart, step: int, top: float, size: float, kind: str) -> Markup:
    """Draw a rectangle in a step's band, a fifth of which stays free."""
    width = f"{80 / chart.steps:.3f}%"
    return element("rect", x=chart.x(step + 0.1), y=top, width=width, height=max(size, 0), class_=kind)


def step_map(chart: Chart, rows: Sequence[str], kinds: Sequence[Sequence[str]]) -> Markup:
    """Draw a row for each branch and a column for each step. `kinds` is the class of every cell, [steps][rows]."""
    tall = chart.height / len(rows)
    labelled = ceil(12 / tall)  # every how manieth row has room for its name
    labels = [
        element("text", name, x=-8, y=(number + 0.5) * tall + 4, class_="tick y")
        for number, name in enumerate(rows)
        if number % labelled == 0
    ]
    cells = {
        kind: "".join(
            f"M{step + 0.08:g} {row + 0.1:g}h.84v.8h-.84z"
            for step, column in enumerate(kinds)
            for row, cell in enumerate(column)
            if cell == kind
        )
        for kind in dict.fromkeys(chain.from_iterable(kinds))
    }
    stretched = element(
        "svg",
        *(element("path", d=path, class_=kind) for kind, path in cells.items()),
        viewBox=f"0 0 {chart.steps} {len(rows)}",
        preserveAspectRatio="none",
        width="100%",
        height=chart.height,
    )
    return _frame(chart, [*labels, stretched], _hits(chart))


def dots(chart: Chart, marks: Sequence[Dot], *labels: Markup) -> Markup:
    """Draw a dot for each mark."""
    drawn = [
        element("circle", cx=chart.x(dot.step + 0.5), cy=dot.y, r=1.6 * dot.weight**0.5, class_="dot") for dot in marks
    ]
    return _frame(chart, [*labels, *drawn], _hits(chart) if chart.hints else Markup())


def _frame(chart: Chart, content: Sequence[Markup], hits: Markup) -> Markup:
    """Draw a chart as an image with a title and a description, the steps named below."""
    return element(
        "svg",
        element("title", chart.title),
        element("desc", chart.description),
        *content,
        *_step_labels(chart),
        hits,
        class_="plot",
        role="img",
        aria_label=f"{chart.title}. {chart.description}",
        width="100%",
        height=chart.height + ABOVE + BELOW,
    )


def _grid(chart: Chart, axis: Axis) -> list[Markup]:
    marks = []
    for value, text in axis.ticks:
        y = axis.y(value, chart.height)
        kind = "base" if value == 0 else "grid"
        marks.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_=kind))
        marks.append(element("text", text, x=-8, y=y + 4, class_="tick y"))
    return marks


def _step_labels(chart: Chart) -> list[Markup]:
    every = next(
        width * power
        for power in (1, 10, 100, 1000)
        for width in (1, 2, 5)
        if ceil(chart.steps / (width * power)) <= MOST_STEP_LABELS
    )
    y = chart.height + 19
    labels = [
        element("text", str(step), x=chart.x(step + 0.5), y=y, class_="tick x") for step in range(0, chart.steps, every)
    ]
    return [element("text", "step", x=-8, y=y, class_="tick y unit"), *labels]


def _hits(chart: Chart) -> Markup:
    """Show the hint of a step where a pointer rests on it."""
    return joined(
        element(
            "rect",
            element("title", hint),
            x=chart.x(step),
            y=0,
            width=f"{100 / chart.steps:.3f}%",
            height=chart.height,
            class_="hit",
        )
        for step, hint in enumerate(chart.hints)
    )
