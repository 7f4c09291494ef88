"""The cells of the comparison of fewer steps with the cache: solvers, numbers of steps, intervals and reuses.

Every one is a trial as those of `cells.py` are, but for FP's images beside it: what a cell is held against is a solver
alone, at as many computed steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

from cells import Cell, Settings

from ditc.compiler.options import CompileOptions
from ditc.errors import InputError

__all__ = ["ALONE", "FLOAT", "GRID", "GROUPS", "INT8", "REUSES", "SEEDS", "SOLVERS", "STEP_CELLS", "known"]

SEEDS, IMAGES = 5, 1_000
# the model's own spacing of timesteps is linspace; with few steps leading is the better one
SOLVERS: Mapping[str, Settings] = {
    "DDIM": {"sampler": "ddim"},
    "DPM-Solver++ 2M": {"sampler": "dpm++2m"},
    "UniPC": {"sampler": "unipc"},
    "DPM-Solver++ 2M, leading": {"sampler": "dpm++2m", "spacing": "leading"},
    "UniPC, leading": {"sampler": "unipc", "spacing": "leading"},
}
OWN_SPACING = ("DDIM", "DPM-Solver++ 2M", "UniPC")
GRID = (7, 10, 17, 20, 25, 34, 50)  # steps
INTERVALS = (2, 3, 5)
# the solvers that each is tried under, in the order in which they are run
REUSES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "taylor": ("order 1", tuple(SOLVERS)),
    "hold": ("hold", OWN_SPACING),
    "taylor:2": ("order 2", OWN_SPACING),
    "taylor:3": ("order 3", OWN_SPACING),
}
ALONE = "alone"
FLOAT, INT8 = "steps", "steps, W8A8"
GROUPS = (FLOAT, INT8)

FP: Settings = {"precision": "fp32"}
DEFAULT: Settings = {"precision": "w8a8", "select": "tap", "smooth": "smooth"}  # as ditc compiles by default
# at 10 and at 17 computed steps
FEW = ((10, "none"), (17, "none"), (20, "fora:2"), (34, "fora:2"), (50, "fora:5"))


def step_cell(group: str, solver: str, steps: int, policy: str, reuse: str) -> Cell:
    """Return one cell; a solver alone reuses nothing, so nothing is said of how."""
    name, changes = (ALONE, {}) if policy == "none" else (REUSES[reuse][0], {"reuse": reuse})
    precision = FP if group == FLOAT else DEFAULT
    settings = {**SOLVERS[solver], "steps": steps, "policy": policy, **precision, **changes}
    return Cell(group, name, "plain", settings, SEEDS, IMAGES)


def float_cells() -> Iterator[Cell]:
    """Yield solvers alone first, then with one reuse after the other."""
    for solver, steps in product(SOLVERS, GRID):
        yield step_cell(FLOAT, solver, steps, "none", "hold")
    for reuse, (_, solvers) in REUSES.items():
        for solver, steps, interval in product(solvers, GRID, INTERVALS):
            yield step_cell(FLOAT, solver, steps, f"fora:{interval}", reuse)


def integer_cells() -> Iterator[Cell]:
    """Yield a few of them quantized."""
    for solver, (steps, policy) in product(OWN_SPACING, FEW):
        yield step_cell(INT8, solver, steps, policy, "taylor")


STEP_CELLS: tuple[Cell, ...] = (*float_cells(), *integer_cells())


def known(cell: Cell) -> bool:
    """Does ditc know the cell's settings? Higher orders are asked for before they are there."""
    try:
        CompileOptions(**cell.every_setting)
    except InputError:
        return False
    return True
