"""The cost of running `--reuse taylor`: a step that computes, one that reuses and a whole run, against `hold`, in turn.

    python benchmarks/reuse_cost.py [--work out/reuse] [--depth 4]

The reference model, and blocks of DiT-XL/2's size with random weights: fewer of them than DiT-XL/2 has, since what a
reuse adds to a step grows with their number as the step does.
"""

from __future__ import annotations

import argparse
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ditc
from ditc.cli.output import print_table
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.exporter.models import builtin_digits, random_model
from ditc.machine import machine
from ditc.progress import silent
from ditc.speed.latency import latency_of
from ditc.speed.side_by_side import bundle_turn, take_turns

HERE = Path(__file__).parent
OPTIONS = CompileOptions(points=8, pool_images=4, smooth="none", vc="none", verify_images=1, reference=False)
WAYS = ("hold", "taylor")


def in_turn(model: Any, work: Path, interval: int, rounds: int) -> dict[str, Any]:
    """Return the latencies of a model's bundles, and the ratio of `taylor`'s to `hold`'s."""
    with ExitStack() as stack:
        pipes = []
        for way in WAYS:
            path = work / f"fora{interval}-{way}"
            compile_model(model, path, OPTIONS.model_copy(update={"policy": f"fora:{interval}", "reuse": way}))
            pipes.append(stack.enter_context(ditc.load(path)))
        times = take_turns([bundle_turn(pipe) for pipe in pipes], rounds, 1, silent)
    latencies: dict[str, Any] = {
        way: {kind: latency_of(seconds).model_dump() for kind, seconds in of.items()}
        for way, of in zip(WAYS, times, strict=True)
    }
    hold, taylor = (latencies[way] for way in WAYS)
    return latencies | {"ratio": {kind: taylor[kind]["median"] / hold[kind]["median"] for kind in ("step", "run")}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/reuse"))
    parser.add_argument("--depth", type=int, default=4, help="blocks of DiT-XL/2's size")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, default=HERE / "reuse_cost.json")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    models = {"digits": builtin_digits(), "blocks of DiT-XL/2": random_model("dit-xl-2-256", depth=options.depth)}
    results = {
        f"{name}, N = {interval}": in_turn(model, options.work / name.split(maxsplit=1)[0], interval, options.rounds)
        for name, model in models.items()
        for interval in (3, 5)
    }
    about = {"machine": machine().model_dump(), "depth": options.depth, "rounds": options.rounds}
    options.out.write_text(json.dumps(about | {"found": results}, indent=1) + "\n")
    print_table(
        ("", "a step that computes", "whole run"),
        [(name, *(f"{times['ratio'][kind]:.3f}" for kind in ("step", "run"))) for name, times in results.items()],
    )


if __name__ == "__main__":
    main()
