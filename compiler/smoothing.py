"""The stage that smooths: factors from the calibration set, folded into the FP segments before scales are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ditc.calibset import CalibSet
from ditc.checks import SmoothedLayer, Smoothing
from ditc.compiler.calibrating import calibration_feeds, open_probe
from ditc.compiler.changed_segments import parity_of
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.point_conditions import PointConditions
from ditc.compiler.work import write_json
from ditc.precision import INT8
from ditc.program import CONDITION, OF_STEP
from ditc.quantize.fold_sites import Site, common_sites, fold_into_segment, shapes_of_rows, table_factors
from ditc.quantize.linears import linears_of
from ditc.quantize.output_factors import multiply_output
from ditc.quantize.transforms import ChannelStatistics, Choice, choose_factors
from ditc.tables import read_tables, write_tables

__all__ = ["FACTORS", "smooth", "smoothed_plan"]

# of the stage's folder
FACTORS = "factors.safetensors"
STEP_TABLES = "steps.safetensors"  # tables of timesteps, where a model has any


def smooth(plan: Plan, segments: Segments, calib_file: Path, folder: Path) -> None:
    """Fold factors into the FP segments, the same function to rounding; smooth.json says which layers have them.

    The factors themselves go to FACTORS, by activation, (channels,) each. Where no place to fold into is found, a layer
    stays as it is. Raises CheckError where a segment's outputs differ.
    """
    from ditc.exporter.onnx_files import load_graph

    calib = CalibSet.load(calib_file)
    models = {part.name: load_graph(segments[part.name]) for part in plan.cached_program.segments}
    paths = dict.fromkeys(linear.path for linear in linears_of(models["full"]))
    sites = common_sites(models)
    choices = choose(plan, models["full"], statistics_of(plan, segments, calib, sites))
    factors = {site: choice.factors for site, choice in choices.items() if choice.alpha is not None}
    by_table = table_factors(factors, shapes_of_rows(models["full"]))
    folded = write_folded(models, segments[CONDITION], factors, by_table, folder)
    after = replace(plan, step_tables=multiplied(plan.step_tables, by_table))
    if after.step_tables:
        write_tables(folder / STEP_TABLES, after.step_tables)
    write_tables(folder / FACTORS, {site.activation: factor for site, factor in factors.items()})
    smoothing = Smoothing(
        method=plan.options.smooth,
        linears=len(paths),
        smoothed=sum(len(site.layers) for site in factors),
        layers={layer: smoothed_layer(choice) for site, choice in choices.items() for layer in site.layers},
        left=tuple(path for path in paths if not any(path in site.layers for site in choices)),
        parity=parity_of((plan, segments), (after, {**segments, **folded}), calib, ("smoothing", "--smooth none")),
    )
    write_json(folder / "smooth.json", smoothing.model_dump(mode="json"))


def smoothed_plan(plan: Plan, folder: Path) -> Plan:
    """Return a plan with the tables of timesteps that `smooth` left in its folder."""
    path = folder / STEP_TABLES
    return replace(plan, step_tables=read_tables(path)) if path.is_file() else plan


def multiplied(
    tables: Mapping[str, NDArray[np.float32]], factors: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float32]]:
    """Return tables (steps, ...) with each row times its factors, where it has any."""
    return {name: np.float32(table * factors[name]) if name in factors else table for name, table in tables.items()}


def write_folded(
    models: Mapping[str, ir.Model],
    condition: Path,
    factors: Mapping[Site, NDArray[np.float64]],
    by_table: Mapping[str, NDArray[np.float64]],
    folder: Path,
) -> dict[str, Path]:
    """Write the segments that factors change, and `condition` with its tables to match; changes `models` in place."""
    from ditc.exporter.onnx_files import load_graph, save_graph

    changed = {name: model for name, model in models.items() if fold_into_segment(model, factors)}
    if own := [name for name in by_table if not name.startswith(OF_STEP)]:
        changed[CONDITION] = load_graph(condition)
        for table in own:
            multiply_output(changed[CONDITION], table, by_table[table])
    for name, model in changed.items():
        save_graph(model, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in changed}


def smoothed_layer(choice: Choice) -> SmoothedLayer:
    """Return the manifest's record of a layer's factors."""
    return SmoothedLayer(alpha=choice.alpha, least=float(choice.factors.min()), largest=float(choice.factors.max()))


def statistics_of(
    plan: Plan, segments: Segments, calib: CalibSet, sites: Sequence[Site]
) -> dict[Site, ChannelStatistics]:
    """Return the statistics of each site's activation at the calibration points, in one streaming pass."""
    if not sites:
        return {}
    probe, condition = open_probe(plan, segments), plan.backend.session(segments[CONDITION])
    rng = np.random.default_rng(plan.options.seed)
    seen: dict[Site, ChannelStatistics] = {}
    done = 0
    for step in np.unique(calib.step):
        at_step = calib.take(np.flatnonzero(calib.step == step))
        feeds = calibration_feeds(condition, at_step, PointConditions.of_plan(plan), probe.points_at_once)
        for turn, feed in enumerate(feeds):
            plan.progress("smooth", done, len(calib))
            done += len(feed["x"]) // plan.halves
            activations = probe.run(feed)
            for site in sites:
                values = activations[site.activation]
                before = seen.get(site) or ChannelStatistics.empty(values.shape[-1])
                seen[site] = before.add(values, turn == 0, rng)
    return seen


def choose(plan: Plan, full: ir.Model, seen: Mapping[Site, ChannelStatistics]) -> dict[Site, Choice]:
    """Choose the factors of every site."""
    linears, options = {linear.name: linear for linear in linears_of(full)}, plan.options
    chosen = {}
    for done, (site, statistics) in enumerate(seen.items()):
        plan.progress("smooth", done, len(seen))
        weight = np.concatenate([linears[layer].weight_array() for layer in site.layers], axis=1)
        chosen[site] = choose_factors(options.smooth, statistics, weight, options.ranges, options.bits or INT8)
    return chosen
