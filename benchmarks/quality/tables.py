"""The figures as Markdown: complete tables of the groups, and the few rows of them that carry a conclusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cells import MODELS, Cell
from effects import BESIDE, NAIVE, Effect, TriedCell, distance, psnr, recall, significant, variance

__all__ = ["SUMMARIES", "Rows", "in_short", "shown", "summary", "table"]


@dataclass(frozen=True)
class Rows:
    """Rows of a small table: cells of one group, sampler and policy by name; `label` is what a row says instead."""

    group: str
    sampler: str
    policy: str
    names: tuple[str, ...]
    label: str | None = None


ALONE, STRATEGIES = ("quantization alone",), ("cache alone", "naive", "tap + vc std", "smooth + tap + taylor")
SUMMARIES: Mapping[str, tuple[Rows, ...]] = {
    "strategies": (
        Rows("ddim", "ddim", "none", ALONE),
        Rows("ddim", "ddim", "fora:3", STRATEGIES),
        Rows("ddim", "ddim", "fora:5", STRATEGIES[1:]),
        Rows("ddpm", "ddpm", "none", ALONE),
        Rows("ddpm", "ddpm", "fora:3", STRATEGIES),
        Rows("ddpm", "ddpm", "fora:5", STRATEGIES[1:]),
        Rows("seven", "ddpm", "fora:5", ("w8a8",), "smooth + tap + hold"),
    ),
    "noise": tuple(
        Rows("noise", "ddpm", policy, ("smooth + tap + hold", "smooth + tap + taylor"))
        for policy in ("fora:2", "fora:4", "window:5:2:2")
    ),
}


def header(beside: str) -> list[str]:
    """Return the head of a table whose cells are held against FP and one other."""
    names = ("model", "sampler", "policy", "", "trials x images", "Frechet distance less FP's", f"less {beside}'s")
    columns = [*names, "recall less FP's", "PSNR", "variance"]
    return [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]


def table(cells: Sequence[TriedCell]) -> list[str]:
    """Return the Markdown lines of a group."""
    against_fp = [tried.effect(distance) for tried in cells]
    changes = [tried.change for tried in cells]
    known = [change for change in changes if change is not None]
    stars = dict(zip(map(id, [*against_fp, *known]), [*significant(against_fp), *significant(known)], strict=True))
    lines = header(BESIDE.get(cells[0].cell.group, NAIVE))
    for tried, own, change in zip(cells, against_fp, changes, strict=True):
        settings = tried.cell.every_setting
        columns = (
            tried.cell.model,
            settings["sampler"],
            settings["policy"],
            tried.cell.name,
            f"{len(tried.rows)} x {tried.cell.images:,}",
            shown(own) + (" *" if stars[id(own)] else ""),
            "" if change is None else shown(change) + (" *" if stars[id(change)] else ""),
            shown(tried.effect(recall)),
            shown(tried.effect(psnr), "{:.1f}"),
            f"{tried.effect(variance).mean:.3f}",
        )
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def key_of(cell: Cell) -> tuple[str, ...]:
    """Return the key of a cell in small tables: its group, sampler, policy and name, and the model."""
    settings = cell.every_setting
    return cell.group, settings["sampler"], settings["policy"], cell.name, cell.model


def in_short(cells: Sequence[TriedCell]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return distance with interval and star, recall and PSNR of each cell of a group."""
    effects = [tried.effect(distance) for tried in cells]
    return {
        key_of(tried.cell): (
            shown(effect) + (" *" if star else ""),
            f"{tried.effect(recall).mean:+.3f}",
            f"{tried.effect(psnr).mean:.1f}",
        )
        for tried, effect, star in zip(cells, effects, significant(effects), strict=True)
    }


def summary(rows: Sequence[Rows], figures: Mapping[tuple[str, ...], tuple[str, ...]]) -> list[str]:
    """Return the Markdown lines of a small table from the figures of its groups, the models side by side."""
    columns = ("", "", *(f"{model}: {measure}" for model in MODELS for measure in ("distance", "recall", "PSNR")))
    lines = [f"| {' | '.join(columns)} |".replace("|  |  |", "| | |"), "|---" * len(columns) + "|"]
    for part in rows:
        for name in part.names:
            own = [figures.get((part.group, part.sampler, part.policy, name, model), ("",) * 3) for model in MODELS]
            if not any(value for values in own for value in values):
                raise SystemExit(f"no trial of {name}, {part.sampler} {part.policy}, in the group {part.group}")
            values = (f"{part.sampler} {part.policy}", part.label or name, *own[0], *own[1])
            lines.append(f"| {' | '.join(values)} |")
    return lines


def shown(effect: Effect, form: str = "{:+.3f}") -> str:
    mean, low, high = (form.format(value) for value in (effect.mean, effect.low, effect.high))
    return f"{mean} ({low} to {high})" if effect.n > 1 else mean
