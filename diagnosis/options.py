"""The settings of `ditc bisect` and `ditc export-polygraphy`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ditc.choices import BisectMode, BisectTarget, Grouping
from ditc.settings import Option, Settings

__all__ = ["BisectOptions", "PolygraphyOptions"]


class BisectOptions(Settings):
    """The settings of `ditc bisect`: how layers are grouped, which way they are toggled, at how many points.

    `top` is how many groups are printed.
    """

    by: Annotated[
        Grouping,
        Option("What a group is: layers that share one Q/DQ pair (as q, k and v do), a branch's, or a block's."),
    ] = "layer"
    mode: Annotated[
        BisectMode,
        Option("Quantize only the group (the error it causes), or all but it (the error that is left)."),
    ] = "only"
    points: Annotated[
        int, Field(ge=1), Option("Calibration points to measure at, spread over the steps that quantize.")
    ] = 16
    top: Annotated[int, Field(ge=1), Option("Groups the table shows; --json has all.")] = 20
    target: Annotated[BisectTarget, Option("Where the variants run; TensorRT builds an engine of each.")] = "cpu"


class PolygraphyOptions(Settings):
    """The settings of `ditc export-polygraphy`: how many calls of each segment are recorded."""

    points: Annotated[int, Field(ge=1), Option("Calls recorded of each segment.")] = 4
