"""The commands that say what is wrong, and where: doctor, bisect, export-polygraphy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ditc.cli.headings import Command
from ditc.cli.option_types import A_PATH
from ditc.cli.options import part_of, takes
from ditc.cli.output import print_record
from ditc.cli.progress import progress_on_stderr
from ditc.cli.shared_options import a_bundle, as_json, force_option, out_option
from ditc.diagnosis.options import BisectOptions, PolygraphyOptions
from ditc.errors import CheckError, InputError
from ditc.runtime.options import Place

if TYPE_CHECKING:
    from ditc.diagnosis.bisection import Bisection
    from ditc.diagnosis.doctor import Findings
    from ditc.diagnosis.polygraphy_export import PolygraphyExport

__all__ = ["bisect_command", "doctor_command", "export_polygraphy_command"]


@click.command("doctor", cls=Command)
@click.argument("bundle", type=A_PATH, required=False)
@takes(place=part_of(Place, "target", "engines"))
@as_json
def doctor_command(bundle: Path | None, place: Place, json_: bool) -> None:
    """Say which backends work on this machine, and why the others don't.

    With a BUNDLE also whether each of its segments gives here what it gave where it was compiled.
    """
    from ditc.diagnosis.doctor import Findings, compared, examine

    if bundle is None and (place.target or place.engines):
        raise InputError("--target and --engines say where a bundle runs; name the bundle, or leave them out")
    machine = examine()
    segments = [] if bundle is None else compared(bundle, place.target, place.engines)
    findings = Findings((*machine, *segments))
    print_record(findings) if json_ else print_findings(findings)
    if different := [finding.name for finding in segments if not finding.works]:
        raise CheckError(
            f"{bundle} gives something else here than where it was compiled: {different[0]} is the first that does; "
            "don't use it here, or use another --target"
        )


@click.command("bisect", cls=Command)
@a_bundle
@takes(options=BisectOptions)
@as_json
def bisect_command(bundle: Path, options: BisectOptions, json_: bool) -> None:
    """Rank the linear layers of a bundle by the error that quantizing them causes."""
    from ditc.diagnosis.bisecting import bisect_bundle, open_target

    with progress_on_stderr() as progress, open_target(options.target, bundle) as where:
        bisection = bisect_bundle(bundle, options, target=where, progress=progress)
    print_record(bisection) if json_ else print_bisection(bisection, options.top)


@click.command("export-polygraphy", cls=Command)
@a_bundle
@takes(options=PolygraphyOptions)
@out_option("The folder to write.", required=True)
@force_option()
@as_json
def export_polygraphy_command(bundle: Path, options: PolygraphyOptions, out: Path, force: bool, json_: bool) -> None:
    """Write data loaders and commands for Polygraphy: compare backends, inspect and reduce a failing segment."""
    from ditc.diagnosis.polygraphy_export import export_polygraphy

    exported = export_polygraphy(bundle, out, points=options.points, force=force)
    print_record(exported) if json_ else print_export(exported)


def print_export(exported: PolygraphyExport) -> None:
    """Print the steps that each segment was recorded at, and what to do next."""
    click.echo(exported.folder)
    for name, segment in exported.segments.items():
        at = f" at steps {', '.join(map(str, segment.steps))}" if segment.steps else ""
        click.echo(f"  {name}: {segment.points} points{at}")
    if not exported.tensorrt:
        click.echo("  nothing for TensorRT: this bundle has no form for it")
    out = Path(exported.folder)
    click.echo(f"next: read {out / 'README.md'}, run {out / 'compare_onnxrt.sh'}")


def print_findings(findings: Findings) -> None:
    """Print what works and what doesn't, a line each."""
    width = max(len(finding.name) for finding in findings.root)
    for finding in findings.root:
        click.echo(f"{'yes' if finding.works else 'no ':<3}  {finding.name:<{width}}  {finding.detail}")


def print_bisection(bisection: Bisection, top: int) -> None:
    """Print the worst groups of layers, `top` of them."""
    from ditc.report.wording import joined_names

    steps = len(bisection.together_steps)
    click.echo(f"{bisection.points} points at {steps} steps, {bisection.backend}; relative error of the prediction")
    click.echo(f"everything quantized: {bisection.together:.5f}\n")
    shown = bisection.groups[:top]
    places = [joined_names(group.branches) for group in shown]
    width = max(map(len, ["branch", *places]))
    error = {"only": "error caused", "without": "error left"}[bisection.mode]
    click.echo(f"rank  {error:>12}   share  worst step       t  error there  {'branch':<{width}}  layers")
    for rank, (group, place) in enumerate(zip(shown, places, strict=True), start=1):
        worst = group.worst
        click.echo(
            f"{rank:4d}  {group.error:12.5f}  {group.share:6.1%}  {worst.step:10d}  {worst.t:6g}  {worst.error:11.5f}  "
            f"{place:<{width}}  {joined_names(group.layers)}"
        )
    if len(bisection.groups) > top:
        click.echo(f"and {len(bisection.groups) - top} more; --top shows them")
    click.echo(
        f"\nthe groups' squares sum to {bisection.squares_ratio:.2f} of the square with everything quantized "
        "(1 where errors are independent)"
    )
