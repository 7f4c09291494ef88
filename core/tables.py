"""The tables of a bundle: every number that a step takes, by name, each with a row for every step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.errors import BundleError
from ditc.files import atomic_write
from ditc.program import OF_STEP, REUSE_ROWS

__all__ = [
    "COMPENSATION",
    "DYNAMIC",
    "LOG_VARIANCES",
    "MIDPOINTS_INPUT",
    "MIDPOINTS_TABLE",
    "SAMPLER",
    "SAMPLER_COLUMNS",
    "SCALES_INPUT",
    "SCALES_TABLE",
    "STEP_INPUTS",
    "Tables",
    "history_columns",
    "memory_of",
    "read_tables",
    "sampler_columns",
    "sampler_tables",
    "step_inputs",
    "tables_of_steps",
    "write_tables",
]

Tables = Mapping[str, NDArray[Any]]

SAMPLER = "sampler."  # in front of a column of the sampler's, (steps,)
SAMPLER_COLUMNS = ("t", "clip", "x0_x", "x0_out", "prev_x0", "prev_x", "prev_out", "sigma")
LOG_VARIANCES = ("log_var_min", "log_var_max")  # only where the sampler takes a learned variance
COMPENSATION = ("compensation.k", "compensation.mu")  # (steps, channels)
# inputs of a segment, one row of a table each
SCALES_INPUT, SCALES_TABLE = "scales", "scales.activation"  # magnitudes, (steps, columns)
MIDPOINTS_INPUT, MIDPOINTS_TABLE = "midpoints", "scales.midpoint"  # of the columns that have any, in steps of the scale
# the binding of scales that are measured at run time, of all images that an engine call holds
DYNAMIC = "dynamic"
STEP_INPUTS = {SCALES_INPUT: SCALES_TABLE, MIDPOINTS_INPUT: MIDPOINTS_TABLE, REUSE_ROWS: REUSE_ROWS}


def write_tables(path: Path, tables: Tables) -> None:
    """Named arrays as one safetensors file."""
    from safetensors.numpy import save

    atomic_write(path, save({name: np.ascontiguousarray(table) for name, table in tables.items()}))


def read_tables(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file; raises BundleError where it can't be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())  # not by its name, which may be none in this locale
    except OSError as e:
        raise BundleError(f"can't read the tables {path}: {e.strerror or e}; copy the bundle again") from e
    except (SafetensorError, KeyError, TypeError, ValueError) as e:  # of a type that NumPy lacks, a KeyError
        raise BundleError(f"can't read the tables {path}: {_first_line(e)}; compile the bundle again") from e


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def history_columns(memory: int) -> list[tuple[str, str]]:
    """Return the sampler's columns for each of so many kept pairs, latest first: of the sample, of the output."""
    return [(f"x.{back}", f"out.{back}") for back in range(1, memory + 1)]


def memory_of(columns: Mapping[str, Any]) -> int:
    """Return how many pairs of sample and output the sampler of these columns keeps; 0 for most."""
    return sum(name.startswith("x.") for name in columns)


def sampler_columns(tables: Tables) -> dict[str, NDArray[np.float64]]:
    """Return what of a bundle's tables is the sampler's: name of the column -> (steps,)."""
    return {name.removeprefix(SAMPLER): table for name, table in tables.items() if name.startswith(SAMPLER)}


def sampler_tables(columns: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Return the sampler's columns under the names that they have among a bundle's tables."""
    return {f"{SAMPLER}{name}": column for name, column in columns.items()}


def step_inputs(tables: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Return those of a bundle's tables that segments take a row of at each step: name of the input -> (steps, ...)."""
    own = {name: tables[table].astype(np.float32) for name, table in STEP_INPUTS.items() if table in tables}
    return own | tables_of_steps(tables)


def tables_of_steps(tables: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Return those of a bundle's tables that the model makes of timesteps alone, by their inputs: (steps, ...)."""
    return {name: table.astype(np.float32, copy=False) for name, table in tables.items() if name.startswith(OF_STEP)}
