"""The cost of one session's idle threads to the others: whole runs as ONNX Runtime waits by default, and as bundles do.

    python benchmarks/spinning.py [--work out/spinning]

By default a session's threads wait for its next run in a busy loop, here for some 40 ms. A cached run goes from `full`
to `reuse` and back, so one session's threads hold the cores that the other needs. The reference model and a wider
small DiT, with a cache and without, both ways in turn in one run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ditc
from ditc.cli.output import print_table
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines.onnxrt import SPINNING_STOPS, OnnxRuntimeBackend
from ditc.exporter.dit import DiTConfig
from ditc.exporter.models import builtin_digits, random_dit
from ditc.machine import machine
from ditc.progress import silent
from ditc.speed.latency import latency_of
from ditc.speed.side_by_side import bundle_turn, take_turns

HERE = Path(__file__).parent
OPTIONS = CompileOptions(points=8, pool_images=4, reuse="hold", smooth="none", vc="none", verify_images=1)
WIDER = DiTConfig(input_size=32, patch_size=2, hidden_size=192, depth=5, num_heads=3, num_classes=10)


@contextmanager
def spinning() -> Iterator[None]:
    """Let sessions that are opened inside wait as ONNX Runtime does by default."""
    options_of = OnnxRuntimeBackend._options

    def as_default(self: OnnxRuntimeBackend, segment: Path) -> Any:
        options = options_of(self, segment)
        options.add_session_config_entry(SPINNING_STOPS, "0")
        return options

    with mock.patch.object(OnnxRuntimeBackend, "_options", as_default):
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/spinning"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE / "spinning.json")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    results = {}
    for name, model in (("digits", builtin_digits()), ("192 wide, 5 blocks", random_dit(WIDER, "wider"))):
        for policy in ("none", "fora:3"):
            path = options.work / f"{name.split(maxsplit=1)[0].strip(',')}-{policy.replace(':', '')}"
            compile_model(model, path, OPTIONS.model_copy(update={"policy": policy}))
            results[f"{name}, {policy}"] = in_turn(path, options.rounds)
    options.out.write_text(
        json.dumps({"machine": machine().model_dump(), "rounds": options.rounds, "found": results}, indent=1) + "\n"
    )
    print_table(
        ("", "default, ms per run", "stopped", "ratio"),
        [
            (
                name,
                *(f"{times[way]['run']['median'] * 1e3:.1f}" for way in ("default", "stopped")),
                f"{times['ratio']:.2f}",
            )
            for name, times in results.items()
        ],
    )


def in_turn(path: Path, rounds: int) -> dict[str, Any]:
    """Return the latencies of a step and a whole run both ways, and the ratio of the default's run to the other."""
    with ExitStack() as stack:
        with spinning():
            pipes = [stack.enter_context(ditc.load(path))]
        pipes.append(stack.enter_context(ditc.load(path)))
        times = take_turns([bundle_turn(pipe) for pipe in pipes], rounds, 1, silent)
    ways = {
        way: {kind: latency_of(seconds).model_dump() for kind, seconds in times_of.items()}
        for way, times_of in zip(("default", "stopped"), times, strict=True)
    }
    return ways | {"ratio": ways["default"]["run"]["median"] / ways["stopped"]["run"]["median"]}


if __name__ == "__main__":
    main()
