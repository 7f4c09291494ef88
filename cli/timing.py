"""The commands that say how fast: bench, estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ditc.cli.options import Command, a_bundle, as_json, part_of, takes
from ditc.cli.output import print_arithmetic, print_json, print_table
from ditc.cli.progress import progress_on_stderr
from ditc.runtime.options import Place
from ditc.speed.options import BenchOptions, EstimateOptions

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
        found = bench_bundle(bundle, options, place=place, progress=progress)
    print_json(found) if json_ else print_bench(found)
    if options.fail_if_slower is not None:
        check_not_slower(found["against"], options.fail_if_slower)


@click.command("estimate", cls=Command)
@a_bundle
@takes(options=EstimateOptions)
@as_json
def estimate_command(bundle: Path, options: EstimateOptions, json_: bool) -> None:
    """Predict latency and memory of a bundle on a device from operations, bytes and published rates."""
    from ditc.speed.estimating import estimate_bundle

    found = estimate_bundle(bundle, options.device)
    print_json(found) if json_ else print_estimate(found)


def print_bench(found: dict[str, Any]) -> None:
    """Latencies per request, segment and outside the engines; limits and peers where they were asked for."""
    request = found["request"]
    click.echo(f"{found['machine']['processor']}, {found['machine']['cores']} cores")
    print_arithmetic(found["arithmetic"])
    what = f"{request['n']} requests of {found['batch']} images, {found['bundle']['steps']} steps"
    click.echo(f"{what}, after {found['warmup']} others\n")
    outside = found["outside_engines"]
    rows = {"request": request, **found["segments"], "outside engines": outside}
    print_table(
        ("", "n", "median ms", "p90 ms", "spread", "share"),
        [
            (name, str(times["n"]), *_times(times), f"{times['share']:.1%}" if "share" in times else "")
            for name, times in rows.items()
        ],
    )
    peak = found["host_peak_memory_bytes"] / 1e6
    click.echo(f"\n{found['seconds_per_image'] * 1e3:.2f} ms per image, {peak:,.0f} MB of host memory at most")
    click.echo(
        f"outside the engines: {outside['seconds_per_step'] * 1e3:.3f} ms per step, "
        f"{outside['share']:.1%} of the trajectory"
    )
    if "roofline" in found:
        print_roofline(found["roofline"])
    if "against" in found:
        print_peers(found["against"])
    for file in found.get("trace", []):
        click.echo(f"  {file}")


def _times(latency: dict[str, Any]) -> tuple[str, str, str]:
    return f"{latency['median'] * 1e3:,.3f}", f"{latency['p90'] * 1e3:,.3f}", f"{latency['spread']:.0%}"


def print_roofline(found: dict[str, Any]) -> None:
    """Every segment against the ceilings of the machine."""
    rates = found["rates"]
    click.echo(
        f"\nceilings, measured just now: INT8 {rates['int8_operations'] / 1e9:,.0f} G/s, "
        f"float {rates['float_operations'] / 1e9:,.0f} G/s, memory {rates['bandwidth'] / 1e9:,.1f} GB/s"
    )
    print_table(
        ("", "INT8 G", "float G", "MB at least", "limit ms", "unfused ms", "measured ms", "of the limit", "bound by"),
        [
            (
                name,
                f"{row['int8_operations'] / 1e9:,.3f}",
                f"{row['float_operations'] / 1e9:,.3f}",
                f"{row['least_bytes'] / 1e6:,.2f}",
                *(f"{row[kind] * 1e3:,.3f}" for kind in ("limit", "unfused", "measured")),
                f"{row['share_of_limit']:.1%}",
                row["bound_by"],
            )
            for name, row in found["segments"].items()
        ],
    )


def print_peers(found: dict[str, Any]) -> None:
    """The bundle and its peers, and why others were skipped."""
    click.echo("")
    if found["peers"]:
        print_sides(found, {"bundle": found["bundle"], **found["peers"]})
    for name, reason in found["skipped"].items():
        click.echo(f"  {name} skipped: {reason}")


def print_sides(found: dict[str, Any], sides: dict[str, Any]) -> None:
    """Those that were measured; x is how many times as long as the bundle it takes."""
    click.echo(f"in turn, guidance {found['guidance']:g}, error at step {found['step']} against the FP reference")
    print_table(
        ("", "n", "step ms", "p90 ms", "spread", "x", "whole run ms", "p90 ms", "spread", "x", "error"),
        [
            (
                name,
                str(side["step"]["n"]),
                *_times(side["step"]),
                f"{side['ratio_step']:.2f}" if "ratio_step" in side else "",
                *_times(side["run"]),
                f"{side['ratio_run']:.2f}" if "ratio_run" in side else "",
                f"{side['relative_error']:.2g}",
            )
            for name, side in sides.items()
        ],
    )
    for name, side in found["peers"].items():
        run = "runs measured whole" if side["run_measured"] else "runs made of its steps"
        click.echo(f"  {name}: {side['what']}; {run}")


def print_estimate(found: dict[str, Any]) -> None:
    """Work and time of every segment, and what they were made from."""
    rates = found["device"]
    click.echo(f"{rates['name']}: {rates['source']}")
    click.echo(
        f"INT8 {rates['int8_operations'] / 1e12:,.2f} T/s, float {rates['float_operations'] / 1e12:,.2f} T/s, "
        f"memory {rates['bandwidth'] / 1e9:,.0f} GB/s"
    )
    click.echo(f"expected: {found['shares']['products']:.0%} and {found['shares']['bandwidth']:.0%} of those\n")
    click.echo(
        f"{'':<12}{'INT8 G':>10}{'float G':>10}{'weights MB':>12}{'moved MB':>10}{'bound ms':>11}{'expected ms':>13}"
    )
    for name, row in found["segments"].items():
        work = f"{row['int8_operations'] / 1e9:>10.2f}{row['float_operations'] / 1e9:>10.2f}"
        size = f"{row['weight_bytes'] / 1e6:>12.2f}{row['moved_bytes'] / 1e6:>10.2f}"
        click.echo(f"{name:<12}{work}{size}{row['bound'] * 1e3:>11.3f}{row['expected'] * 1e3:>13.3f}")
    image = found["seconds_per_image"]
    click.echo(f"\nper image: bound {image['bound'] * 1e3:,.2f} ms, expected {image['expected'] * 1e3:,.2f} ms")
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    click.echo(
        f"memory: {found['memory_bytes'] / 1e6:,.0f} MB at least, {fits} in {rates['memory_bytes'] / 1e9:,.0f} GB"
    )
