"""Complete tables of the smaller experiments, each from the rows of its JSON, and what is said above them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["OTHERS", "Other"]

Rows = Sequence[Mapping[str, Any]]


def lines_of(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows)]


def approximators(rows: Rows) -> list[str]:
    """Return the quality of each reuse, at two intervals, with and without compensation."""
    columns = (
        "N",
        "`--reuse`",
        "`--vc`",
        "PSNR, dB",
        "less `hold`",
        "error of the samples",
        "of a reuse",
        "std / exact",
    )
    return lines_of(
        columns,
        [
            (
                str(row["interval"]),
                f"`{row['reuse']}`",
                f"`{row['vc']}`",
                f"{row['psnr_db']['mean']:.2f}",
                "" if row["reuse"] == "hold" else "{mean:+.2f} ({low:+.2f} to {high:+.2f})".format(**row["gain_db"]),
                f"{row['trajectory']:.4f}",
                f"{row['eps']:.4f}",
                f"{row['std_ratio']:.4f}",
            )
            for row in rows
        ],
    )


ERRORS = ("hold", "taylor", "half", "fitted", "fitted per channel")
WEIGHT = "fitted weight / taylor's"


def extrapolation(rows: Rows) -> list[str]:
    """Return the error of extrapolating, by sampler and interval: mean and range over the seeds."""
    columns = ("sampler", "N", "hold", "taylor", "half of its weight", "least squares", "per channel", WEIGHT)
    places = dict.fromkeys((row["sampler"], int(row["policy"].split(":")[1])) for row in rows)
    values = []
    for sampler, interval in sorted(places):
        own = [row for row in rows if (row["sampler"], row["policy"]) == (sampler, f"fora:{interval}")]
        errors = [spread([row[name] for row in own]) for name in ERRORS]
        values.append((sampler, str(interval), *errors, f"{np.mean([row[WEIGHT] for row in own]):.2f}"))
    return lines_of(columns, values)


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def smoothing(rows: Rows) -> list[str]:
    """Return the error of the quantized segment, by model, ranges and method: mean and range over the seeds."""
    methods = tuple(dict.fromkeys(row["smooth"] for row in rows))
    at = {(row["model"], row["ranges"], row["smooth"]): row for row in rows}
    return lines_of(
        ("model", "ranges", *(f"`{method}`" for method in methods)),
        [
            (
                model,
                f"`{ranges}`",
                *("{mean:.4f} ({least:.4f} to {largest:.4f})".format(**at[model, ranges, m]) for m in methods),
            )
            for model, ranges in dict.fromkeys((row["model"], row["ranges"]) for row in rows)
        ],
    )


def smoothing_fc2(rows: Rows) -> list[str]:
    """Return the quantized segment's error where the second MLP layer is smoothed too: over all points, and median."""
    errors = ("relative_error", "median_step")
    return lines_of(
        ("ranges", "second MLP layer", "error over all points", "at the median step"),
        [(f"`{row['ranges']}`", f"`{row['fc2']}`", *(f"{row[error]:.4f}" for error in errors)) for row in rows],
    )


def activation_scales(rows: Rows) -> list[str]:
    """Return the effect of scales and midpoints: PSNR with its spread, and the error of each kind of layer's input."""
    layers = ("qkv", "proj", "fc1", "fc2")
    return lines_of(
        ("`--scales`", "`--midpoint`", "PSNR, dB", *layers),
        [
            (
                f"`{row['scales']}`",
                f"`{row['midpoint']}`",
                "{mean:.1f} ({std:.1f})".format(**row["psnr_db"]),
                *(f"{row['input_error'][layer] * 1e4:.2f}" for layer in layers),
            )
            for row in rows
        ],
    )


@dataclass(frozen=True)
class Other:
    """A table of another experiment: heading, what it shows, its JSON seen from here, and the key of its rows there."""

    heading: str
    note: str
    figures: str
    rows: str
    table: Callable[[Rows], list[str]]


OTHERS: tuple[Other, ...] = (
    Other(
        "Approximators",
        """What a reuse returns, W8A8, DDIM-50, guidance 1.5: 256 images of one noise seed, the same for all rows,
against the FP, uncached program; one compile each (200 calibration points, 64 fitted pairs, seed 0). In
brackets 95 % bootstrap intervals over images of the paired difference to `hold` with the same
compensation. Error of the samples: relative, mean over the steps. Error of a reuse: of the noise
prediction at the steps that reuse, against FP on the very same samples, without compensation.""",
        "approximators.json",
        "rows",
        approximators,
    ),
    Other(
        "Extrapolation",
        """The reference model in FP on its own trajectories without a cache: relative error of the sum that the
branches add, at the steps that extrapolate (but those that would take the sum of the first step), mean
over the steps, mean and range over three seeds of 32 images. Least squares are weights fitted on 64 other
images, one per step or one per step and channel.""",
        "extrapolation.json",
        "rows",
        extrapolation,
    ),
    Other(
        "Smoothing of segments",
        """Relative error of the noise prediction of the W8A8 `full` segment against FP, DDIM-50, over 200 points of
FP trajectories that no calibration saw; mean and range over three calibration seeds (256 points each,
TAP).""",
        "smoothing.json",
        "summary",
        smoothing,
    ),
    Other(
        "Smoothing of the second MLP layer",
        """As above, one calibration seed: all other layers smoothed by `smooth`, the second MLP layer by an explicit
product in front of it.""",
        "smoothing_fc2.json",
        "rows",
        smoothing_fc2,
    ),
    Other(
        "Scales and midpoints",
        """W8A8 without a cache, 20 steps, 200 calibration points, `mse` ranges, 50 images, one calibration seed:
PSNR against FP with its spread over the images, and the squared error of what the layers read over its
square, in 1e-4.""",
        "../activation_scales.json",
        "rows",
        activation_scales,
    ),
)
