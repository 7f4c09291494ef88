"""Checks of a bundle's tables: their form, their numbers, and what the program and the settings say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ditc.manifest import TABLES, Manifest
from ditc.precision import quantized
from ditc.program import OF_STEP, REUSE_ROWS
from ditc.sampler_checks import sampler_contradictions
from ditc.tables import (
    COMPENSATION,
    LOG_VARIANCES,
    MIDPOINTS_TABLE,
    SAMPLER,
    SAMPLER_COLUMNS,
    SCALES_TABLE,
    Tables,
    history_columns,
    memory_of,
    sampler_columns,
)

__all__ = ["TABLE_CHECKS", "table_contradictions"]

TableCheck = Callable[[Manifest, Tables], Iterator[str]]

Form = tuple[str, tuple[int | None, ...]]  # type and shape; None is any length


def table_contradictions(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """A sentence for each contradiction; a check takes for granted what those in front of it found to hold."""
    return (f"{TABLES}: {text}" for check in TABLE_CHECKS for text in check(manifest, tables))


def forms(manifest: Manifest) -> dict[str, Form]:
    """The type and shape of every table that a bundle may have, but for the sampler's further columns and OF_STEP's."""
    steps, spec = len(manifest.program.steps), manifest.model
    rows = max(plan.rows for plan in manifest.program.segments)
    return {
        **{f"{SAMPLER}{name}": ("float64", (steps,)) for name in (*SAMPLER_COLUMNS, *LOG_VARIANCES)},
        **dict.fromkeys(COMPENSATION, ("float64", (steps, spec.in_channels))),
        REUSE_ROWS: ("float32", (steps, rows, *spec.branch_shape[-1:])),
        SCALES_TABLE: ("float32", (steps, None)),
        MIDPOINTS_TABLE: ("float32", (steps, None)),
    }


def tables_have_their_form(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """Every table is one that is known, of the type and shape that all else asks for."""
    known = forms(manifest)
    for name, table in tables.items():
        column = known[f"{SAMPLER}t"] if name.startswith(SAMPLER) else None
        rows = ("float32", (len(manifest.program.steps), *[None] * (table.ndim - 1)))
        form = known.get(name, rows if name.startswith(OF_STEP) else column)
        if form is None:
            yield f"{name!r} is none of the tables: {', '.join(known)}"
        elif str(table.dtype) != form[0] or not _fits(table.shape, form[1]):
            yield f"{name!r} is {table.dtype} {list(table.shape)}, expected {form[0]} {_described(form[1])}"


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(asked in (None, size) for size, asked in pairs)


def _described(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def tables_are_complete(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """Nothing is missing that a step or a table beside it asks for."""
    needed = [f"{SAMPLER}{name}" for name in SAMPLER_COLUMNS]
    history = [name for name in tables if name.startswith((f"{SAMPLER}x.", f"{SAMPLER}out."))]
    needed += [f"{SAMPLER}{name}" for pair in history_columns(-(-len(history) // 2)) for name in pair]
    needed += [REUSE_ROWS] * any(plan.rows for plan in manifest.program.segments)
    needed += [SCALES_TABLE] * (MIDPOINTS_TABLE in tables)
    for pair in ([f"{SAMPLER}{name}" for name in LOG_VARIANCES], COMPENSATION):
        needed += pair if any(name in tables for name in pair) else ()
    for name in dict.fromkeys(needed):
        if name not in tables:
            yield f"{name!r} is missing"


def tables_follow_the_settings(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """A learned variance and a compensation are there where the bundle was made with them, and only there."""
    sampler, vc = manifest.asked.sampler, manifest.asked.vc
    if sampler is not None:
        learned = sampler.name == "ddpm" and sampler.variance == "learned"
        yield from _presence(tables, f"{SAMPLER}{LOG_VARIANCES[0]}", learned, f"variance {sampler.variance}")
        if sampler.name is not None and not sampler.is_read_off:
            yield from _presence(tables, f"{SAMPLER}{history_columns(1)[0][0]}", False, f"--sampler {sampler.name}")
        own = manifest.model.sampler.scheduler
        if sampler.scheduler not in (None, own):
            yield f"the bundle was made with {sampler.told}, and the model's own is {own.told if own else 'none'}"
    if vc not in (None, "auto"):
        something = quantized(manifest.precision) or manifest.program.slots > 0
        yield from _presence(tables, COMPENSATION[0], vc != "none" and something, f"--vc {vc}")


def compensation_is_the_one_that_was_measured(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """K has the range that `checks` say it has."""
    k, measured = tables.get(COMPENSATION[0]), manifest.checks.get("compensation")
    if k is None or not isinstance(measured, dict):
        return
    for name, end in (("k_min", float(k.min())), ("k_max", float(k.max()))):
        if measured.get(name, end) != end:
            yield f"{COMPENSATION[0]!r} has {name} {end:g}, and `checks` say {measured[name]!r}"


def _presence(tables: Tables, name: str, wanted: bool, made_with: str) -> Iterator[str]:
    if (name in tables) != wanted:
        yield f"{name!r} is {'missing' if wanted else 'there'}, and the bundle was made with {made_with}"


def numbers_are_possible(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """Numbers are finite, but for a bound that clips nothing; noise and scales are no less than nothing."""
    clip, sigma = f"{SAMPLER}clip", f"{SAMPLER}sigma"
    for name, table in tables.items():
        usable = ~np.isnan(table) if name == clip else np.isfinite(table)
        if not usable.all():
            yield f"{name!r} holds {table[~usable].flat[0]}, expected numbers"
    for name, least in ((sigma, 0.0), (clip, np.nextafter(0, 1)), (SCALES_TABLE, np.nextafter(0, 1))):
        if name in tables and (tables[name] < least).any():
            yield f"{name!r} holds {tables[name].min():g}, expected {'0 or more' if least == 0 else 'more than 0'}"
    if MIDPOINTS_TABLE in tables and (tables[MIDPOINTS_TABLE] % 1 != 0).any():
        yield f"{MIDPOINTS_TABLE!r} holds parts of steps, expected whole numbers"


def sums_that_are_not_there_weigh_nothing(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """An early step has fewer sums than its segment takes: it gives one of them again, and that must add nothing."""
    for step in manifest.program.steps:
        plan = manifest.program.segment(step.segment)
        if plan.rows and tables[REUSE_ROWS][step.index, len(step.reads) : len(plan.reads)].any():
            yield f"{REUSE_ROWS!r} of step {step.index} weighs {len(plan.reads)} sums, and it reads {len(step.reads)}"


def timesteps_are_those_of_the_steps(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """The sampler's "t" is what the program's steps say."""
    for step, t in zip(manifest.program.steps, tables[f"{SAMPLER}t"], strict=True):
        if step.t != t:
            yield f"'{SAMPLER}t' of step {step.index} is {t:g}, and the program says {step.t:g}"


def history_is_linear_and_begins_with_nothing(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """A sampler that was read off clips nothing, and no step looks back to before the first."""
    columns, sampler = sampler_columns(tables), manifest.asked.sampler
    memory = memory_of(columns)
    if np.isfinite(columns["clip"]).any() and (memory or (sampler is not None and sampler.is_read_off)):
        yield f"'{SAMPLER}clip' holds {columns['clip'].min():g}, and a sampler that looks back clips nothing"
    for back, pair in enumerate(history_columns(memory), 1):
        for name in pair:
            if columns[name][:back].any():
                yield f"'{SAMPLER}{name}' looks back to before the first step"


def columns_are_of_a_sampler(manifest: Manifest, tables: Tables) -> Iterator[str]:
    """The sampler's columns fit each other; those that were mixed up don't."""
    return sampler_contradictions(sampler_columns(tables), manifest.model.diffusion.prediction)


TABLE_CHECKS: tuple[TableCheck, ...] = (
    tables_have_their_form,
    tables_are_complete,
    tables_follow_the_settings,
    compensation_is_the_one_that_was_measured,
    numbers_are_possible,
    sums_that_are_not_there_weigh_nothing,
    timesteps_are_those_of_the_steps,
    history_is_linear_and_begins_with_nothing,
    columns_are_of_a_sampler,
)
