"""DiT-XL/2 at 256 pixels, random weights: the cost of its compile and of serving, and its bundle against its peers.

    python benchmarks/dit_xl.py --work out/xl [--measure-only] [--steps-only] [--against PEER,...]

Compiles a bundle for each cache interval, each in a child process whose wall time and peak resident memory are taken.
Then, in one run and in turn: the peers of `ditc bench --against` and the bundles, guided, batch 1 (so 2 rows), single
steps and whole runs of 50. Each torch model also walks 50 steps once, to hold the runs made of its steps to. Random
weights say something about time and memory and nothing about images.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ditc
from ditc.bundle import open_bundle
from ditc.machine import machine
from ditc.progress import silent
from ditc.runtime.executor import seeded_noise
from ditc.speed.latency import latency_of
from ditc.speed.options import peer_names
from ditc.speed.peer_task import ModelChoice, PeerTask, peer_task_of
from ditc.speed.peers import ReadyPeer, ready_peer
from ditc.speed.side_by_side import bundle_turn, peer_turn, take_turns

HERE = Path(__file__).parent
STEPS, POINTS = 50, 64
SETTINGS = f"--steps {STEPS} --points {POINTS} --reuse hold --smooth none --vc none --verify-images 1".split()
INTERVALS = (3, 4, 5)
PEERS = "torch-f32,torch-bf16,openvino-int8"
SERVE = """
import json, sys, time
from pathlib import Path
import ditc
from ditc.bundle import open_bundle
open_bundle(Path(sys.argv[1]))  # from here on the files are in the system's cache
start = time.perf_counter()
open_bundle(Path(sys.argv[1]))
hashed = time.perf_counter()
with ditc.load(sys.argv[1]) as pipe:
    opened = time.perf_counter()
    pipe.latents([207])
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith(("VmRSS", "VmHWM")))
print(json.dumps({
    "hashing_seconds": hashed - start,
    "opening_seconds": opened - hashed - (hashed - start),
    "resident_bytes": int(status["VmRSS"].split()[0]) * 1024,
    "peak_resident_bytes": int(status["VmHWM"].split()[0]) * 1024,
}))
"""


def compile_cost(size: str, interval: int, out: Path) -> dict[str, float]:
    """Return the wall seconds of the compile, and the peak resident bytes of this and earlier ones."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "ditc.cli", "compile", "--random", size, "--policy", f"fora:{interval}"]
    images = math.ceil(POINTS / len(range(0, STEPS, interval)))  # whose computing steps hold that many points
    subprocess.run([*command, "-o", str(out), "--force", "--pool", str(images), *SETTINGS], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - start, "peak_resident_bytes": peak}


def serving_cost(bundle: Path) -> dict[str, float]:
    """Return opening time and memory of a process that serves one image."""
    done = subprocess.run([sys.executable, "-c", SERVE, str(bundle)], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def in_turn(bundles: dict[str, Path], peers: dict[str, ReadyPeer], task: PeerTask, rounds: int) -> dict[str, Any]:
    """Return the latencies of every bundle and peer: a step that computes, one that reuses, a whole run.

    A bundle's name ends in @TARGET where that is not the one it was compiled for.
    """
    with ExitStack() as stack:
        pipes = {
            name: stack.enter_context(ditc.load(path, target=name.partition("@")[2] or None))
            for name, path in bundles.items()
        }
        turns = {name: bundle_turn(pipe) for name, pipe in pipes.items()}
        turns |= {name: peer_turn(ready.peer, task) for name, ready in peers.items()}
        times = take_turns(list(turns.values()), rounds, 1, silent)
    return {
        name: {kind: latency_of(seconds).model_dump() for kind, seconds in times_of.items()}
        for name, times_of in zip(turns, times, strict=True)
    }


def ratios(times: dict[str, Any], bundles: dict[str, Path], kind: str) -> dict[str, dict[str, float]]:
    """Return for each bundle the ratio of every peer's time to its own."""
    return {
        own: {
            name: other[kind]["median"] / times[own][kind]["median"]
            for name, other in times.items()
            if name not in bundles
        }
        for own in bundles
    }


def walked_once(task: PeerTask, peers: dict[str, ReadyPeer]) -> dict[str, float]:
    """Return the seconds of one real run of each torch peer."""
    seconds = {}
    for name, ready in peers.items():
        if name.startswith("torch"):
            noise, fresh = seeded_noise(0, 0, len(task.x), task.run.spec.latent_shape)
            start = time.perf_counter()
            task.run.last(ready.peer.forward, noise, fresh)
            seconds[name] = time.perf_counter() - start
    return seconds


def measured(bundles: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    first = next(iter(bundles.values()))
    with TemporaryDirectory() as scratch:
        task = peer_task_of(open_bundle(first), ModelChoice(f"random:{options.size}"), Path(scratch).resolve())
        ready_or_reason = {name: ready_peer(name, task) for name in peer_names([options.against])}
        peers = {name: ready for name, ready in ready_or_reason.items() if isinstance(ready, ReadyPeer)}
        times = in_turn(bundles, peers, task, options.rounds)
        walked = {} if options.steps_only or options.no_walk else {"walked_once": walked_once(task, peers)}
    return {
        "peers": {name: {"what": r.peer.what, "relative_error": r.relative_error} for name, r in peers.items()},
        "skipped": {name: reason for name, reason in ready_or_reason.items() if isinstance(reason, str)},
        "relative_error": task.error(task.bundle_output),
        "times": times,
        "ratio_step": ratios(times, bundles, "step"),
        "ratio_run": ratios(times, bundles, "run"),
        **walked,
        "serving": serving_cost(first),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("out/xl"))
    parser.add_argument("--size", default="dit-xl-2-256", help="another size, to try the script")
    parser.add_argument("--intervals", type=int, nargs="+", default=list(INTERVALS))
    parser.add_argument("--also", metavar="NAME=BUNDLE", nargs="*", default=[], help="further bundles to measure")
    parser.add_argument(
        "--targets", nargs="*", default=["openvino", "openvino-bf16"], help="where to run every bundle besides the cpu"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--against", default=PEERS)
    parser.add_argument("--measure-only", action="store_true", help="take the bundles that are there, keep their cost")
    parser.add_argument("--steps-only", action="store_true", help="the same with the first interval alone, in minutes")
    parser.add_argument("--no-walk", action="store_true", help="leave out the one real run of each torch model")
    parser.add_argument("--out", type=Path, help="default is dit_xl.json or dit_xl_steps.json beside this script")
    options = parser.parse_args()
    out = options.out or HERE / ("dit_xl_steps.json" if options.steps_only else "dit_xl.json")
    intervals = options.intervals[:1] if options.steps_only else options.intervals
    bundles = {f"fora:{n}": options.work / f"fora{n}" for n in intervals}
    bundles |= {f"{name}@{target}": path for target in options.targets for name, path in list(bundles.items())}
    bundles |= {name: Path(path) for name, path in (other.split("=", 1) for other in options.also)}
    if options.measure_only or options.steps_only:
        cost = json.loads(out.read_text()).get("compile") if out.exists() else None
    else:
        cost = {f"fora:{n}": compile_cost(options.size, n, bundles[f"fora:{n}"]) for n in intervals}
    manifest = open_bundle(next(iter(bundles.values()))).manifest
    results = {
        "machine": machine().model_dump(),
        "size": options.size,
        "settings": manifest.settings,
        "compile": cost,
        "deployed_bytes": manifest.size_bytes(reference=False),
        "reference_bytes": manifest.size_bytes(reference=True),
        **measured(bundles, options),
    }
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: results[key] for key in ("compile", "ratio_step", "ratio_run", "skipped")}, indent=1))


if __name__ == "__main__":
    main()
