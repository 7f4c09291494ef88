"""The commands that say how fast: bench, estimate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ditc.cli.headings import Command
from ditc.cli.options import part_of, takes
from ditc.cli.output import print_arithmetic, print_record, print_table
from ditc.cli.progress import progress_on_stderr
from ditc.cli.shared_options import a_bundle, as_json
from ditc.runtime.options import Place
from ditc.speed.options import BenchOptions, EstimateOptions

if TYPE_CHECKING:
    from ditc.speed.bench_result import Bench
    from ditc.speed.estimating import Estimate
    from ditc.speed.latency import SpreadLatency
    from ditc.speed.roofline import Roofline
    from ditc.speed.side_by_side import NoPeer, SideBySide

__all__ = ["bench_command", "estimate_command"]


@click.command("bench", cls=Command)
@a_bundle
@takes(options=BenchOptions, place=part_of(Place, "target", "engines", "graphs", "threads"))
@as_json
def bench_command(bundle: Path, options: BenchOptions, place: Place, json_: bool) -> None:
    """Measure a bundle's latency per request, step and segment: beside its peers, and against the machine's limits."""
    from ditc.speed.benching import bench_bundle
    from ditc.speed.side_by_side import check_not_slower

    with progress_on_stderr() as progress:
        bench = bench_bundle(bundle, options, place=place, progress=progress)
    print_record(bench) if json_ else print_bench(bench)
    if options.fail_if_slower is not None:
        check_not_slower(bench.against, options.fail_if_slower)


@click.command("estimate", cls=Command)
@a_bundle
@takes(options=EstimateOptions)
@as_json
def estimate_command(bundle: Path, options: EstimateOptions, json_: bool) -> None:
    """Predict latency and memory of a bundle on a device from operations, bytes and published rates."""
    from ditc.speed.estimating import estimate_bundle

    estimate = estimate_bundle(bundle, options.device)
    print_record(estimate) if json_ else print_estimate(estimate)


def print_bench(bench: Bench) -> None:
    """Print latencies per request, segment and outside the engines; limits and peers where they were asked for."""
    click.echo(f"{bench.machine.processor}, {bench.machine.cores} cores")
    print_arithmetic(bench.arithmetic)
    requests = f"{bench.request.n} requests of {bench.batch} images, {bench.bundle.steps} steps"
    click.echo(f"{requests}, after {bench.warmup} others\n")
    outside = bench.outside_engines
    parts = {**bench.segments, "outside engines": outside}
    print_table(
        ("", "n", "median ms", "p90 ms", "spread", "share"),
        [
            ("request", str(bench.request.n), *_times(bench.request), ""),
            *((name, str(part.n), *_times(part), f"{part.share:.1%}") for name, part in parts.items()),
        ],
    )
    peak = bench.host_peak_memory_bytes / 1e6
    click.echo(f"\n{bench.seconds_per_image * 1e3:.2f} ms per image, {peak:,.0f} MB of host memory at most")
    click.echo(
        f"outside the engines: {outside.seconds_per_step * 1e3:.3f} ms per step, {outside.share:.1%} of the trajectory"
    )
    if bench.roofline is not None:
        print_roofline(bench.roofline)
    if bench.against is not None:
        print_peers(bench.against)
    for file in bench.trace or ():
        click.echo(f"  {file}")


def _times(latency: SpreadLatency) -> tuple[str, str, str]:
    return f"{latency.median * 1e3:,.3f}", f"{latency.p90 * 1e3:,.3f}", f"{latency.spread:.0%}"


def print_roofline(roofline: Roofline) -> None:
    """Print every segment against the ceilings of the machine."""
    rates = roofline.rates
    click.echo(
        f"\nceilings, measured just now: INT8 {rates.int8_operations / 1e9:,.0f} G/s, "
        f"float {rates.float_operations / 1e9:,.0f} G/s, memory {rates.bandwidth / 1e9:,.1f} GB/s"
    )
    print_table(
        ("", "INT8 G", "float G", "MB at least", "limit ms", "unfused ms", "measured ms", "of the limit", "bound by"),
        [
            (
                name,
                f"{roof.int8_operations / 1e9:,.3f}",
                f"{roof.float_operations / 1e9:,.3f}",
                f"{roof.least_bytes / 1e6:,.2f}",
                *(f"{seconds * 1e3:,.3f}" for seconds in (roof.limit, roof.unfused, roof.measured)),
                f"{roof.share_of_limit:.1%}",
                roof.bound_by,
            )
            for name, roof in roofline.segments.items()
        ],
    )


def print_peers(against: SideBySide | NoPeer) -> None:
    """Print the bundle and its peers, and why others were skipped."""
    from ditc.speed.side_by_side import SideBySide

    click.echo("")
    if isinstance(against, SideBySide):
        print_sides(against)
    for name, reason in against.skipped.items():
        click.echo(f"  {name} skipped: {reason}")


def print_sides(sides: SideBySide) -> None:
    """Print the measured peers; x is how many times as long as the bundle one takes."""
    click.echo(f"in turn, guidance {sides.guidance:g}, error at step {sides.step} against the FP reference")
    own = sides.bundle
    rows = [("bundle", str(own.step.n), *_times(own.step), "", *_times(own.run), "", f"{own.relative_error:.2g}")]
    for name, peer in sides.peers.items():
        step = (str(peer.step.n), *_times(peer.step), f"{peer.ratio_step:.2f}")
        rows.append((name, *step, *_times(peer.run), f"{peer.ratio_run:.2f}", f"{peer.relative_error:.2g}"))
    columns = ("", "n", "step ms", "p90 ms", "spread", "x", "whole run ms", "p90 ms", "spread", "x", "error")
    print_table(columns, rows)
    for name, peer in sides.peers.items():
        run = "runs measured whole" if peer.run_measured else "runs made of its steps"
        click.echo(f"  {name}: {peer.what}; {run}")


def print_estimate(estimate: Estimate) -> None:
    """Print work and time of every segment, and what they were made from."""
    rates = estimate.device
    click.echo(f"{rates.name}: {rates.source}")
    click.echo(
        f"INT8 {rates.int8_operations / 1e12:,.2f} T/s, float {rates.float_operations / 1e12:,.2f} T/s, "
        f"memory {rates.bandwidth / 1e9:,.0f} GB/s"
    )
    click.echo(f"expected: {estimate.shares.products:.0%} and {estimate.shares.bandwidth:.0%} of those\n")
    click.echo(
        f"{'':<12}{'INT8 G':>10}{'float G':>10}{'weights MB':>12}{'moved MB':>10}{'bound ms':>11}{'expected ms':>13}"
    )
    for name, segment in estimate.segments.items():
        work = f"{segment.int8_operations / 1e9:>10.2f}{segment.float_operations / 1e9:>10.2f}"
        size = f"{segment.weight_bytes / 1e6:>12.2f}{segment.moved_bytes / 1e6:>10.2f}"
        click.echo(f"{name:<12}{work}{size}{segment.bound * 1e3:>11.3f}{segment.expected * 1e3:>13.3f}")
    image = estimate.seconds_per_image
    click.echo(f"\nper image: bound {image.bound * 1e3:,.2f} ms, expected {image.expected * 1e3:,.2f} ms")
    fits = "fits" if estimate.fits else "DOES NOT FIT"
    click.echo(f"memory: {estimate.memory_bytes / 1e6:,.0f} MB at least, {fits} in {rates.memory_bytes / 1e9:,.0f} GB")
