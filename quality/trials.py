"""The candidates of a search as measured, and which of them nothing beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ditc.spec import Record

__all__ = ["Changes", "Trial", "described", "pareto_front", "settings_text", "versus"]

Changes = dict[str, str | int | None]  # settings of a compile that a candidate has otherwise than the base


class Trial(Record):
    """A candidate as measured: what it changes, seconds per image, PSNR and, where there are features, the distance.

    `worse_by` is Frechet distance less FP's and `recall_by` recall less FP's, both against the real images; `psnr_low`,
    `worse_high` and `recall_low` are the ends of the intervals that count against it. PSNR is against FP of the same
    sampler and steps, the others are against the base's.
    """

    stage: str
    changes: Changes
    seconds: float
    psnr_db: float
    psnr_low: float
    worse_by: float | None
    worse_high: float | None
    size_bytes: int
    within: bool
    recall_by: float | None = None
    recall_low: float | None = None

    @property
    def quality(self) -> float:
        """The quality that the front holds against time; higher is better."""
        return self.psnr_db if self.worse_by is None else -self.worse_by

    @property
    def key(self) -> tuple[tuple[str, str | int | None], ...]:
        """The settings, by which trials of the same candidate are known."""
        return tuple(sorted(self.changes.items()))

    @property
    def cached(self) -> bool:
        """Does it reuse anything?"""
        return self.changes["policy"] != "none"


def settings_text(changes: Mapping[str, str | int | None]) -> str:
    """Return the settings that a candidate changes as text; one that it leaves out is not told."""
    return ", ".join(f"{name} {value}" for name, value in changes.items() if value is not None)


def described(trial: Trial) -> str:
    """Return a trial as text."""
    worse = (
        "" if trial.worse_by is None else f", Frechet distance {trial.worse_by:+.3f} (up to {trial.worse_high:+.3f})"
    )
    return f"{settings_text(trial.changes)}: {trial.seconds:.4g} s per image, PSNR {trial.psnr_db:.1f} dB{worse}"


def versus(cached: Trial, alone: Trial) -> str:
    """Return what a cache brings over fewer steps as text; both were measured in turn, on the same noise."""
    sides = (
        f"{settings_text(trial.changes)}: {trial.seconds:.4g} s per image, distance {trial.worse_by:+.3f}, recall "
        f"{trial.recall_by:+.3f}"
        for trial in (cached, alone)
    )
    ratio = alone.seconds / cached.seconds
    return f"a cache against fewer steps, {ratio:.2f} times as fast: {' | against '.join(sides)}"


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Return those that no other one beats in time and quality both, fastest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.seconds, -trial.quality)):
        if not front or trial.quality > front[-1].quality:
            front.append(trial)
    return front
