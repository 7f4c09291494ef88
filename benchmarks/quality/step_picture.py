"""The picture of `steps.py`: Frechet distance and recall over the number of steps that compute, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

from effects import Effect
from step_cells import OWN_SPACING
from step_results import Measure, StepResults, StepTrials, best, measure

from ditc.report.markup import Markup, element, joined

__all__ = ["step_picture"]

WIDTH, HEIGHT = 700, 352
COLOURS = dict(zip(OWN_SPACING, ("#777777", "#2458a6", "#c4572b"), strict=True))
CALLS = (4, 5, 7, 10, 17, 25, 34, 50)  # labelled; cells with fewer calls are left out
INK, GRID_INK = "#222222", "#e2e2e2"


@dataclass(frozen=True)
class Panel:
    """A panel's title, measure, and vertical axis: its ends, its ticks, and whether it is logarithmic.

    A value beyond the axis is cut off at the edge.
    """

    title: str
    of: Measure
    left: float
    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False
    top: float = 34
    width: float = 288
    height: float = 232

    def x(self, calls: float) -> float:
        return self.left + self.width * (log(calls) - log(CALLS[0])) / (log(CALLS[-1]) - log(CALLS[0]))

    def y(self, value: float) -> float:
        low, high, value = (log(v) if self.logarithmic else v for v in (self.low, self.high, max(value, 1e-3)))
        return self.top + self.height * (1 - (value - low) / (high - low))


PANELS = (
    Panel(
        "Frechet distance (less is better)",
        measure("frechet_distance"),
        42,
        0.34,
        0.8,
        (0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8),
        True,
    ),
    Panel("Recall (more is better)", measure("recall"), 396, 0.35, 0.75, (0.4, 0.5, 0.6, 0.7)),
)


def step_picture(results: StepResults) -> str:
    """Return the picture: for each solver a line alone and one with a cache.

    Both are the best cell with at most so many calls of the network, by distance, of all spacings, steps and reuses.
    """
    drawn = joined(panel_of(panel, number, results) for number, panel in enumerate(PANELS))
    title = element("title", "Frechet distance and recall over computed steps, solvers alone and with a cache")
    background = element("rect", width=WIDTH, height=HEIGHT, fill="#ffffff")
    return (
        element(
            "svg",
            title,
            background,
            drawn,
            legend(),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            width=WIDTH,
            height=HEIGHT,
            font_family="Helvetica, Arial, sans-serif",
            font_size=12,
            fill=INK,
        ).replace("><", ">\n<")
        + "\n"
    )


def panel_of(panel: Panel, number: int, results: StepResults) -> Markup:
    """Draw a panel: axes, and two lines for each family of solvers."""
    clip = f"panel{number}"
    area = element("rect", x=panel.left - 4, y=panel.top - 4, width=panel.width + 8, height=panel.height + 8)
    lines = []
    for family, colour in COLOURS.items():
        for cached in (False, True):
            side = results.cached if cached else results.alone
            own = [trials for trials in side if trials.solver.split(",")[0] == family]
            lines.append(line_of(panel, best_within(own, results.seeds), colour, cached=cached))
    return joined(
        (
            axes(panel),
            element("clipPath", area, id=clip),
            element("g", *lines, clip_path=f"url(#{clip})"),
        )
    )


def best_within(cells: Sequence[StepTrials], seeds: Sequence[int]) -> dict[int, StepTrials]:
    """Return the best cell with at most so many calls of the network, for each number that is drawn."""
    counts = sorted({trials.computed for trials in cells if trials.computed >= CALLS[0]})
    return {count: best([trials for trials in cells if trials.computed <= count], seeds) for count in counts}


def line_of(panel: Panel, cells: Mapping[int, StepTrials], colour: str, *, cached: bool) -> Markup:
    """Draw a line with a mark and an interval at each cell: full with a cache, dashed and hollow alone."""
    effects = [(panel.x(calls), trials.effect(panel.of)) for calls, trials in cells.items()]
    path = "M" + "L".join(f"{x:.1f} {panel.y(effect.mean):.1f}" for x, effect in effects)
    stroke: dict[str, str | float | None] = {"stroke": colour, "stroke_width": 1.8, "fill": "none"}
    dashes = None if cached else "5 3"
    return joined(
        (
            *(interval(panel, x, effect, colour) for x, effect in effects),
            *((element("path", d=path, stroke_dasharray=dashes, **stroke),) if effects else ()),
            *(mark(x, panel.y(effect.mean), colour, cached=cached) for x, effect in effects),
        )
    )


def interval(panel: Panel, x: float, effect: Effect, colour: str) -> Markup:
    """Draw the interval of a cell; one trial has none."""
    if effect.n == 1:
        return Markup()
    low, high = (f"{panel.y(end):.1f}" for end in (effect.low, effect.high))
    return element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=low, y2=high, stroke=colour, stroke_opacity="0.45")


def mark(x: float, y: float, colour: str, *, cached: bool) -> Markup:
    fill = colour if cached else "#ffffff"
    return element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, fill=fill, stroke=colour, stroke_width=1.4)


def axes(panel: Panel) -> Markup:
    """Draw title, grid, ticks and the name of the horizontal axis."""
    right, bottom = panel.left + panel.width, panel.top + panel.height
    parts = [element("text", panel.title, x=panel.left, y=panel.top - 14, font_weight="bold")]
    for value in panel.ticks:
        y = f"{panel.y(value):.1f}"
        parts.append(element("line", x1=panel.left, x2=right, y1=y, y2=y, stroke=GRID_INK))
        parts.append(element("text", f"{value:g}", x=panel.left - 8, y=y, dy="0.35em", text_anchor="end"))
    for calls in CALLS:
        parts.append(element("text", str(calls), x=f"{panel.x(calls):.1f}", y=bottom + 18, text_anchor="middle"))
    parts.append(element("line", x1=panel.left, x2=right, y1=bottom, y2=bottom, stroke=INK))
    middle = panel.left + panel.width / 2
    parts.append(element("text", "steps that compute", x=middle, y=bottom + 36, text_anchor="middle"))
    return joined(parts)


def legend() -> Markup:
    """Draw the colours of the solvers, and what is full and what is dashed."""
    y, parts = HEIGHT - 16, []
    keys: list[tuple[str, str, str | None, bool]] = [(name, colour, None, True) for name, colour in COLOURS.items()]
    keys += [("with a cache", INK, None, True), ("alone", INK, "5 3", False)]
    for x, (text, colour, dashes, cached) in zip((42, 122, 282, 410, 540), keys, strict=True):
        stroke: dict[str, str | float | None] = {"stroke": colour, "stroke_width": 1.8}
        parts.append(element("line", x1=x, x2=x + 26, y1=y, y2=y, stroke_dasharray=dashes, **stroke))
        parts.append(mark(x + 13, y, colour, cached=cached))
        parts.append(element("text", text, x=x + 32, y=y, dy="0.35em"))
    return joined(parts)
