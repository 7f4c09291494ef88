"""A bundle and its peers in turn, in one run: guided steps that compute, and whole runs.

A peer without a cache does the same at every step. It is measured in bursts whose first step is not counted, since the
bundle's own steps follow one another too, and its whole run is as many of a burst's mean steps as the bundle has: the
mean, so that what disturbs some of the steps counts in both. A peer with a cache is measured over whole runs, as the
bundle is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

from pydantic import model_serializer, model_validator

from ditc.errors import CheckError, InputError
from ditc.loras import loras_from
from ditc.program import FULL
from ditc.progress import Progress
from ditc.runtime.executor import seeded_noise
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.samplers import no_pairs
from ditc.spec import Record
from ditc.speed.latency import SpreadLatency, latency_of, with_spread
from ditc.speed.options import BenchOptions
from ditc.speed.peer import Peer
from ditc.speed.peer_task import ModelChoice, PeerTask, bench_request, peer_task_of
from ditc.speed.peers import ReadyPeer, ready_peer

__all__ = [
    "RUN",
    "BundleTimes",
    "NoPeer",
    "PeerTimes",
    "SideBySide",
    "Turn",
    "against_peers",
    "bundle_turn",
    "check_not_slower",
    "peer_turn",
    "take_turns",
]

STEP, RUN = "step", "run"
BURST_SECONDS = 0.1
REST_SECONDS = 0.15  # before each turn: the threads of the side before it spin on for up to a tenth of a second

NO_REFERENCE = "the bundle has no FP reference to make it from and hold it to; compile it again with --reference"

Turn = Callable[[], Iterator[tuple[str, float]]]  # one turn of one side: (kind, seconds), as often as measured
Times = Mapping[str, list[float]]


class BundleTimes(Record):
    """Seconds of the bundle's own turns: its whole `run`, a `step` that computes all, other steps by their segment.

    As JSON the latencies lie beside `relative_error`, which is that of a computing step against the FP reference.
    """

    latencies: dict[str, SpreadLatency]
    relative_error: float

    @property
    def step(self) -> SpreadLatency:
        return self.latencies[STEP]

    @property
    def run(self) -> SpreadLatency:
        return self.latencies[RUN]

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        latencies = {kind: latency.model_dump() for kind, latency in self.latencies.items()}
        return {**latencies, "relative_error": self.relative_error}

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "latencies" in given:
            return given
        return {
            "latencies": {name: value for name, value in given.items() if name != "relative_error"},
            "relative_error": given.get("relative_error"),
        }


class PeerTimes(Record):
    """Seconds of a peer's turns, and how many times as long as the bundle it takes, by medians.

    `what` tells its packages and types, `relative_error` is against the FP reference; `run_measured` says whether runs
    were measured whole, or made of its steps.
    """

    what: str
    relative_error: float
    run_measured: bool
    step: SpreadLatency
    run: SpreadLatency
    ratio_step: float
    ratio_run: float


class SideBySide(Record):
    """A bundle and its peers in turn: guided steps at `step` of the trajectory, and whole runs.

    `skipped` has the reason why a peer was not measured.
    """

    guidance: float
    step: int
    bundle: BundleTimes
    peers: dict[str, PeerTimes]
    skipped: dict[str, str]


class NoPeer(Record):
    """The reasons why no peer could be measured."""

    peers: dict[str, PeerTimes] = {}
    skipped: dict[str, str]


def against_peers(pipe: Pipeline, options: BenchOptions, progress: Progress) -> SideBySide | NoPeer:
    """Measure a bundle and its peers, `options.requests` turns of each after `options.warmup` others.

    `pipe` is the bundle's pipeline, not open. Raises InputError for a chosen model that is not the bundle's, and where
    no peer is left to hold a ratio against.
    """
    if not pipe.bundle.has_reference:
        return _none_measured(dict.fromkeys(options.against, NO_REFERENCE), options)
    with TemporaryDirectory(prefix="ditc-bench-") as scratch:
        choice = ModelChoice(options.model, options.heads, loras_from(options.lora))
        task = peer_task_of(pipe.bundle, choice, Path(scratch).resolve())
        ready: dict[str, ReadyPeer | str] = {}
        for done, name in enumerate(options.against):
            progress("peers", done, len(options.against))
            ready[name] = ready_peer(name, task)
        progress("peers", len(ready), len(ready))
        peers = {name: peer for name, peer in ready.items() if isinstance(peer, ReadyPeer)}
        skipped = {name: reason for name, reason in ready.items() if isinstance(reason, str)}
        if not peers:
            return _none_measured(skipped, options)
        with pipe:
            turns = [bundle_turn(pipe), *(peer_turn(ready.peer, task) for ready in peers.values())]
            own, *others = take_turns(turns, options.requests, options.warmup, progress)
    bundle = BundleTimes(latencies=_latencies(own), relative_error=task.error(task.bundle_output))
    return SideBySide(
        guidance=task.run.guidance.weight,
        step=task.index,
        bundle=bundle,
        peers={name: _compared(peer, times, bundle) for (name, peer), times in zip(peers.items(), others, strict=True)},
        skipped=skipped,
    )


def _none_measured(skipped: dict[str, str], options: BenchOptions) -> NoPeer:
    if options.fail_if_slower is not None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise InputError(f"--fail-if-slower needs a peer that can be measured here, found none ({reasons})")
    return NoPeer(skipped=skipped)


def take_turns(turns: list[Turn], rounds: int, warmup: int, progress: Progress) -> list[Times]:
    """Run every side once in each round; what the first `warmup` rounds measure is forgotten."""
    times: list[dict[str, list[float]]] = [defaultdict(list) for _ in turns]
    for number in range(warmup + rounds):
        progress("turns", number, warmup + rounds)
        for turn, seconds_of in zip(turns, times, strict=True):
            sleep(REST_SECONDS)
            measured = list(turn())
            for kind, seconds in measured if number >= warmup else ():
                seconds_of[kind].append(seconds)
    progress("turns", warmup + rounds, warmup + rounds)
    return [dict(side) for side in times]


def bundle_turn(pipe: Pipeline) -> Turn:
    """Return a request of a full batch: its whole run up to the latents, steps that compute all, others by segment."""
    request = bench_request(pipe.bundle)

    def turn() -> Iterator[tuple[str, float]]:
        start, until = perf_counter(), 0.0
        for event in pipe.generate(request, seed=0):
            yield STEP if event.segment == FULL else event.segment, event.seconds
            if event.index == event.steps - 1:  # what comes after it is decoding, which no peer does
                yield RUN, until + event.seconds
            until = perf_counter() - start

    return turn


def peer_turn(peer: Peer, task: PeerTask) -> Turn:
    """Return a burst of steps; one whole run of a peer with a cache of its own."""
    return _steps_in_a_burst(peer, task) if peer.begin is None else _whole_run(peer, peer.begin, task)


def _steps_in_a_burst(peer: Peer, task: PeerTask) -> Turn:
    _, fresh = seeded_noise(0, 0, len(task.x), task.run.spec.latent_shape)

    def timed() -> float:
        start = perf_counter()
        task.run.step(peer.forward, task.index, task.x, fresh)
        return perf_counter() - start

    def turn() -> Iterator[tuple[str, float]]:
        first, burst = timed(), [timed()]
        while first + sum(burst) < BURST_SECONDS:
            burst.append(timed())
        yield from ((STEP, seconds) for seconds in burst)
        yield RUN, task.run.steps * sum(burst) / len(burst)

    return turn


def _whole_run(peer: Peer, begin: Callable[[], None], task: PeerTask) -> Turn:
    program, shape = task.bundle.manifest.program, task.run.spec.latent_shape

    def turn() -> Iterator[tuple[str, float]]:
        x, fresh = seeded_noise(0, 0, len(task.x), shape)
        begin()
        whole, pairs = 0.0, no_pairs(task.run.columns)
        for step in program.steps:
            start = perf_counter()
            x = task.run.step(peer.forward, step.index, x, fresh, pairs)
            seconds = perf_counter() - start
            whole += seconds
            if all(program.segment(step.segment).compute):
                yield STEP, seconds
        yield RUN, whole

    return turn


def _latencies(times: Times) -> dict[str, SpreadLatency]:
    return {kind: with_spread(latency_of(seconds)) for kind, seconds in times.items()}


def _compared(ready: ReadyPeer, times: Times, bundle: BundleTimes) -> PeerTimes:
    latencies = _latencies(times)
    step, run = latencies[STEP], latencies[RUN]
    return PeerTimes(
        what=ready.peer.what,
        relative_error=ready.relative_error,
        run_measured=ready.peer.begin is not None,
        step=step,
        run=run,
        ratio_step=step.median / bundle.step.median,
        ratio_run=run.median / bundle.run.median,
    )


def check_not_slower(measured: SideBySide | NoPeer | None, least_ratio: float) -> None:
    """Raise CheckError unless the bundle's whole run is `least_ratio` times as fast as every measured peer's."""
    if not isinstance(measured, SideBySide):
        raise CheckError("no peer was measured that the bundle could be faster than (--fail-if-slower)")
    slow = [
        f"{name} takes {peer.run.median:.4g} s, {peer.ratio_run:.2f}x"
        for name, peer in measured.peers.items()
        if not peer.ratio_run >= least_ratio
    ]
    if slow:
        raise CheckError(
            f"a whole run of the bundle takes {measured.bundle.run.median:.4g} s, of {'; of '.join(slow)}; "
            f"expected at least {least_ratio:g}x (--fail-if-slower)"
        )
