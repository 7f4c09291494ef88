"""Plots of the experiment, as SVG beside docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from cells import MODELS, POINTS, SELECTORS
from effects import Effect, TriedCell, distance, psnr
from matplotlib.figure import Figure

__all__ = ["draw"]

COLOUR = "#2458a6"
FAR_OUT = 20  # times the median of its panel: written at the edge, so that the others can be told apart
EDGE = ("axes fraction", "data")
SELECTOR_COLOURS = dict(zip(SELECTORS, ("#2458a6", "#777777", "#c4572b", "#3f8f5b"), strict=True))
mpl.rcParams.update(
    {
        "svg.hashsalt": "ditc",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "figure.constrained_layout.use": True,
    }
)


def draw(tables: Mapping[str, Sequence[TriedCell]], folder: Path) -> None:
    """One file for each group that has a plot."""
    for group, plot in (("ddim", strategies), ("ddpm", strategies), ("points", by_points)):
        if group in tables:
            plot(tables[group]).savefig(folder / f"results-{group}.svg", metadata={"Date": None})


def strategies(cells: Sequence[TriedCell]) -> Figure:
    """Every strategy's Frechet distance less FP's with its interval: a panel for each model and policy."""
    panels = list(dict.fromkeys((f.cell.model, f.cell.every_setting["policy"]) for f in cells))
    panels = [panel for panel in panels if panel[1] != "none"]
    names = list(dict.fromkeys(f.cell.name for f in cells if f.cell.every_setting["policy"] != "none"))
    policies, models = (list(dict.fromkeys(part)) for part in (sorted(p for _, p in panels), MODELS))
    figure = Figure(figsize=(4.2 * len(policies), 0.6 + 2 * 0.26 * len(names)))
    axes: Any = figure.subplots(len(models), len(policies), squeeze=False, sharey=True, sharex="col")
    for row, model in enumerate(models):
        for column, policy in enumerate(policies):
            axis = axes[row][column]
            axis.set_title(f"{model}, {policy}")
            axis.axvline(0, color="#999999", linewidth=0.8)
            effects = {
                names.index(tried.cell.name): tried.effect(distance)
                for tried in cells
                if (tried.cell.model, tried.cell.every_setting["policy"]) == (model, policy)
            }
            usual = median([abs(effect.mean) for effect in effects.values()])
            for place, effect in effects.items():
                if effect.mean > FAR_OUT * usual:
                    axis.annotate(f"{effect.mean:+.1f} →", (1, place), xycoords=EDGE, ha="right", va="center")
                else:
                    _interval(axis, effect, place)
            axis.set_yticks(range(len(names)), names)
            axis.tick_params(axis="y", length=0)
            axis.locator_params(axis="x", nbins=5)
            if row == len(models) - 1:
                axis.set_xlabel("Frechet distance less FP's")
    axes[0][0].invert_yaxis()
    return figure


def _interval(axis: Any, effect: Effect, place: float) -> None:
    if effect.n > 1:
        axis.plot([effect.low, effect.high], [place, place], color=COLOUR, linewidth=1.4, solid_capstyle="butt")
    axis.plot([effect.mean], [place], color=COLOUR, marker="o", markersize=4)


def by_points(cells: Sequence[TriedCell]) -> Figure:
    """PSNR against the number of calibration points, a line for each selector with its intervals."""
    figure = Figure(figsize=(8.4, 3.2))
    axes: Any = figure.subplots(1, len(MODELS), squeeze=False)
    for axis, model in zip(axes[0], MODELS, strict=True):
        axis.set_title(model)
        for name, colour in SELECTOR_COLOURS.items():
            own = [f for f in cells if f.cell.model == model and f.cell.name.startswith(f"{name}, ")]
            effects = {f.cell.every_setting["points"]: f.effect(psnr) for f in own}
            at = [points for points in POINTS if points in effects]
            middle = [effects[points].mean for points in at]
            axis.plot(at, middle, color=colour, marker="o", markersize=4, label=name)
            axis.fill_between(
                at, [effects[p].low for p in at], [effects[p].high for p in at], color=colour, alpha=0.12, linewidth=0
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(POINTS, [f"{points:,}" for points in POINTS])
        axis.set_xlabel("calibration points")
    axes[0][0].set_ylabel("PSNR against FP, dB")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
