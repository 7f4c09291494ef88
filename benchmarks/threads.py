"""The cost of threads and batches on a processor: requests side by side and in turn, merged and one by one.

    MALLOC_PERTURB_=165 python benchmarks/threads.py [--work out/threads] [--requests 1000]

Two bundles of the reference model, W8A8 and float32, serve requests of one to three images from eight threads; each
image is compared, bit for bit, with that of the same request in turn. Then each way to share the cores takes its turn
in one run: `in turn` is one thread, `a lock` holds one lock for a whole request, `the gate` is what ditc does, with
every core for a run and with one, and `no gate` lets all eight compute at once. Last, the images of 32 labels: as
`images` makes them, as one batch of `generate`, and one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import ditc
from ditc.cli.output import print_table
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.engines.cores import CoreGate, core_gate
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.machine import machine
from ditc.speed.latency import latency_of

HERE = Path(__file__).parent
THREADS = 8
BUNDLES: Mapping[str, CompileOptions] = {
    "w8a8": CompileOptions(points=64, pool_images=8, verify_images=2),
    "fp32": CompileOptions(precision="fp32", verify_images=2),
}
LABELS = [number % 10 for number in range(32)]
UNBOUNDED = CoreGate(1_000_000)
Work = Callable[[], None]


def request(number: int) -> tuple[list[int], int]:
    """Return labels and seed of a request of one to three images."""
    return [(number + place) % 10 for place in range(1 + number % 3)], number


def equal_images(pipes: Mapping[str, ditc.Pipeline], requests: int) -> dict[str, Any]:
    """Hold requests over all pipelines from eight threads, against the same in turn."""
    jobs = [(pipes[name], *request(number)) for number in range(requests // len(pipes)) for name in pipes]
    expected = [pipe.images(labels, seed=seed) for pipe, labels, seed in jobs]

    def same(number: int) -> bool:
        pipe, labels, seed = jobs[number]
        return np.array_equal(pipe.images(labels, seed=seed), expected[number])

    with ThreadPoolExecutor(THREADS) as pool:
        equal = list(pool.map(same, range(len(jobs))))
    return {"requests": len(jobs), "images": sum(len(images) for images in expected), "different": equal.count(False)}


def sharing(path: Path, stack: ExitStack, requests: int) -> dict[str, Work]:
    """Return the ways in which eight threads can share a pipeline, each doing the same requests."""
    cores, lock = core_gate(), threading.Lock()
    kinds = {
        "every core": OnnxRuntimeBackend(),
        "one core": OnnxRuntimeBackend(1),
        "every core, no gate": OnnxRuntimeBackend(cores.cores, cores=UNBOUNDED),
        "one core, no gate": OnnxRuntimeBackend(1, cores=UNBOUNDED),
    }
    pipes = {name: stack.enter_context(ditc.load(path, backend=backend)) for name, backend in kinds.items()}

    def spread(pipe: ditc.Pipeline, threads: int, *, locked: bool = False) -> Work:
        def serve(number: int) -> None:
            labels, seed = request(number)
            if not locked:
                pipe.images(labels, seed=seed)
                return
            with lock:
                pipe.images(labels, seed=seed)

        def work() -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(serve, range(requests)))

        return work

    return {
        "in turn, every core": spread(pipes["every core"], 1),
        "a lock, every core": spread(pipes["every core"], THREADS, locked=True),
        "the gate, every core": spread(pipes["every core"], THREADS),
        "the gate, one core": spread(pipes["one core"], THREADS),
        "no gate, every core": spread(pipes["every core, no gate"], THREADS),
        "no gate, one core": spread(pipes["one core, no gate"], THREADS),
    }


def batches(path: Path, stack: ExitStack) -> dict[str, Work]:
    """Return the images of 32 labels, made in three ways."""
    pipe, single = stack.enter_context(ditc.load(path)), stack.enter_context(ditc.load(path, batch=1))

    def generated() -> None:
        *_, _ = pipe.generate(LABELS, seed=0)

    return {
        "images": lambda: void(pipe.images(LABELS, seed=0)),
        "generate": generated,
        "one by one": lambda: void(single.images(LABELS, seed=0)),
    }


def void(_: object) -> None:
    """Return nothing."""


def in_turns(ways: Mapping[str, Work], rounds: int, images: int) -> dict[str, Any]:
    """Return milliseconds per image of each way, all in turn in each round, and the median ratio to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, work in ways.items():
            start = perf_counter()
            work()
            if number:  # the first round warms up
                seconds[name].append(perf_counter() - start)
    first = np.array(next(iter(seconds.values())))
    return {
        name: {
            "ms_per_image": latency_of([1e3 * whole / images for whole in times]).model_dump(),
            "takes": float(np.median(np.array(times) / first)),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/threads"))
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "threads.json")
    options = parser.parse_args()
    paths = {name: options.work / name for name in BUNDLES}
    for name, path in paths.items():
        if not path.exists():
            compile_model("digits", path, BUNDLES[name])
    with ExitStack() as stack:
        pipes = {name: stack.enter_context(ditc.load(path)) for name, path in paths.items()}
        same = equal_images(pipes, options.requests)
    print(same, flush=True)
    served = 24
    images = sum(len(request(number)[0]) for number in range(served))
    with ExitStack() as stack:
        shared = in_turns(sharing(paths["w8a8"], stack, served), options.rounds, images)
    with ExitStack() as stack:
        merged = in_turns(batches(paths["w8a8"], stack), options.rounds, len(LABELS))
    results = {
        "machine": machine().model_dump(),
        "threads": THREADS,
        "malloc_perturb": os.environ.get("MALLOC_PERTURB_"),
        "equal": same,
        "sharing": shared,
        "batches": merged,
    }
    for rows in (shared, merged):
        lines = [(name, f"{row['ms_per_image']['median']:.2f}", f"{row['takes']:.2f}") for name, row in rows.items()]
        print_table(("way", "ms per image", "takes"), lines)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
