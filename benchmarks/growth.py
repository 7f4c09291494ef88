"""The growth of a compiled step's cost and of a whole run's: with blocks, tokens, batch and cache interval.

    python benchmarks/growth.py [--quick] [--work out/growth]

Small DiTs with random weights, each compiled whole into a bundle, all measured in turn in one run. Beside what was
measured stands what the counted operations predict, and the cost model of `ditc estimate` at this machine's measured
rates. Of each the exponent: the slope of log cost over log size by least squares, with the residual, and the slope
between each two neighbours, since attention's share of the work grows with the tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import ditc
from ditc.bundle import Bundle, open_bundle
from ditc.cli.output import print_table
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.exporter.dit import DiTConfig
from ditc.exporter.models import random_dit
from ditc.machine import machine
from ditc.program import CONDITION
from ditc.progress import silent
from ditc.speed.ceilings import measured_rates
from ditc.speed.latency import latency_of
from ditc.speed.rates import MEASURED, Rates, segment_seconds
from ditc.speed.roofline import footprints_here
from ditc.speed.side_by_side import bundle_turn, take_turns

HERE = Path(__file__).parent
WIDTH, HEADS, PATCH = 192, 3, 2  # heads of 64, as in the released sizes but the largest
OPTIONS = CompileOptions(steps=20, points=8, pool_images=4, reuse="hold", smooth="none", vc="none", verify_images=1)


@dataclass(frozen=True)
class Grid:
    """The sizes of every sweep; its other sizes are those of `base` (blocks, tokens, interval), and one image."""

    blocks: tuple[int, ...]
    tokens: tuple[int, ...]
    batch: tuple[int, ...]
    interval: tuple[int, ...]
    base: tuple[int, int, int]


FULL = Grid((4, 8, 16, 28), (64, 144, 256, 576, 1024), (1, 2, 4, 8), (1, 2, 3, 4, 5, 6, 8, 10), (5, 256, 2))
QUICK = Grid((1, 2, 4), (16, 64, 256), (1, 2, 4), (1, 2, 4), (2, 64, 2))


def compiled(work: Path, blocks: int, tokens: int, interval: int, batch: int = 1) -> Bundle:
    """Return the bundle of a size, for so many images at a time, compiled unless it is there."""
    path = work / f"blocks{blocks}-tokens{tokens}-fora{interval}-batch{batch}"
    if not path.exists():
        start = perf_counter()
        config = DiTConfig(
            input_size=PATCH * math.isqrt(tokens),
            patch_size=PATCH,
            hidden_size=WIDTH,
            depth=blocks,
            num_heads=HEADS,
            num_classes=10,
        )
        options = OPTIONS.model_copy(update={"policy": f"fora:{interval}", "batch": batch})
        compile_model(random_dit(config, path.name), path, options)
        print(f"{path.name}: compiled in {perf_counter() - start:.0f} s", flush=True)
    return open_bundle(path)


def sweeps(work: Path, grid: Grid) -> dict[str, dict[int, Path]]:
    """Return size -> bundle, for each of the four."""
    blocks, tokens, interval = grid.base
    return {
        "blocks": {n: compiled(work, n, tokens, interval).path for n in grid.blocks},
        "tokens": {n: compiled(work, blocks, n, interval).path for n in grid.tokens},
        "batch": {n: compiled(work, *grid.base, n).path for n in grid.batch},
        "interval": {n: compiled(work, blocks, tokens, n).path for n in grid.interval},
    }


def measured(paths: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """Return the latencies of a step and of a whole run of every bundle, all in turn."""
    with ExitStack() as stack:
        pipes = [stack.enter_context(ditc.load(path)) for path in paths]
        times = take_turns([bundle_turn(pipe) for pipe in pipes], rounds, 1, silent)
    return [{kind: latency_of(times_of[kind]).model_dump() for kind in ("step", "run")} for times_of in times]


def predicted(path: Path, rates: Rates) -> dict[str, dict[str, float]]:
    """Return operations, and seconds by the cost model, of a step and of a whole run."""
    bundle = open_bundle(path)
    works, program = footprints_here(bundle), bundle.manifest.program

    def both(cost: Callable[[str], float]) -> dict[str, float]:
        steps = sum(cost(step.segment) for step in program.steps)
        return {"step": cost(program.steps[0].segment), "run": cost(CONDITION) + steps}

    return {
        "operations": both(lambda name: works[name].int8_operations + works[name].float_operations),
        "model_seconds": both(lambda name: segment_seconds(works[name], rates, MEASURED)),
    }


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> dict[str, Any]:
    """Return the slope of log cost over log size, its residuals' root mean square (log units), and local slopes."""
    x, y = np.log(np.asarray(sizes, np.float64)), np.log(np.asarray(costs, np.float64))
    slope, offset = np.polyfit(x, y, 1)
    return {
        "exponent": float(slope),
        "residual": float(np.sqrt(np.mean((y - slope * x - offset) ** 2))),
        "between_neighbours": (np.diff(y) / np.diff(x)).tolist(),
    }


def fitted(points: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return exponents of a sweep, by step and run: of the median, of the least, in operations, by the cost model."""
    sizes = list(points)
    sources: dict[str, Callable[[dict[str, Any], str], float]] = {
        "measured": lambda point, kind: point[kind]["median"],
        "least": lambda point, kind: point[kind]["least"],
        "operations": lambda point, kind: point["operations"][kind],
        "model": lambda point, kind: point["model_seconds"][kind],
    }
    return {
        kind: {
            source: exponent(sizes, [cost(point, kind) for point in points.values()])
            for source, cost in sources.items()
        }
        for kind in ("step", "run")
    }


def show(results: dict[str, Any]) -> None:
    rows = []
    for name, sweep in results["sweeps"].items():
        for kind, fits in sweep["exponents"].items():
            ends = [f"{fits[source]['between_neighbours'][-1]:.2f}" for source in ("measured", "operations")]
            slopes = [f"{fit['exponent']:.2f} ± {fit['residual']:.2f}" for fit in fits.values()]
            rows.append((f"{kind} over {name}", f"{sweep['sizes'][0]}..{sweep['sizes'][-1]}", *slopes, *ends))
    print_table(("", "sizes", "median", "least", "operations", "cost model", "median, end", "operations, end"), rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/growth"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes, to try the script")
    parser.add_argument("--out", type=Path, default=HERE / "growth.json")
    options = parser.parse_args()
    grid = QUICK if options.quick else FULL
    shutil.rmtree(options.work, ignore_errors=True)
    bundles = sweeps(options.work, grid)
    rates = measured_rates()
    paths = sorted({path for sweep in bundles.values() for path in sweep.values()})
    points = {
        path: times | predicted(path, rates) for path, times in zip(paths, measured(paths, options.rounds), strict=True)
    }
    results: dict[str, Any] = {
        "machine": machine().model_dump(),
        "rates": rates.model_dump(),
        "model": {
            "width": WIDTH,
            "heads": HEADS,
            **dict(zip(("blocks", "tokens", "interval"), grid.base, strict=True)),
        },
        "settings": OPTIONS.model_dump(),
        "rounds": options.rounds,
        "sweeps": {},
    }
    for name, sweep in bundles.items():
        at = {size: points[path] for size, path in sweep.items()}
        results["sweeps"][name] = {"sizes": list(at), "points": list(at.values()), "exponents": fitted(at)}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
