"""The commands that say what is wrong, and where: doctor, bisect, export-polygraphy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ditc.cli.options import A_PATH, Command, a_bundle, as_json, force_option, out_option, part_of, takes
from ditc.cli.output import print_json
from ditc.cli.progress import progress_on_stderr
from ditc.diagnosis.options import BisectOptions, PolygraphyOptions
from ditc.errors import CheckError, InputError
from ditc.runtime.options import Place

__all__ = ["bisect_command", "doctor_command", "export_polygraphy_command"]


@click.command("doctor", cls=Command)
@click.argument("bundle", type=A_PATH, required=False)
@takes(place=part_of(Place, "target", "engines"))
@as_json
def doctor_command(bundle: Path | None, place: Place, json_: bool) -> None:
    """Say which backends work on this machine, and why the others don't.

    With a BUNDLE also whether each of its segments gives here what it gave where it was compiled.
    """
    from ditc.diagnosis.doctor import compared, examine

    if bundle is None and (place.target or place.engines):
        raise InputError("--target and --engines say where a bundle runs; name the bundle, or leave them out")
    findings = examine()
    segments = [] if bundle is None else compared(bundle, place.target, place.engines)
    if json_:
        print_json([finding._asdict() for finding in findings + segments])
    else:
        print_findings(findings + segments)
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
        found = bisect_bundle(bundle, options, target=where, progress=progress)
    if json_:
        print_json(found.model_dump(mode="json"))
    else:
        print_bisection(found, options.top)


@click.command("export-polygraphy", cls=Command)
@a_bundle
@takes(options=PolygraphyOptions)
@out_option("The folder to write.", required=True)
@force_option()
@as_json
def export_polygraphy_command(bundle: Path, options: PolygraphyOptions, out: Path, force: bool, json_: bool) -> None:
    """Write data loaders and commands for Polygraphy: compare backends, inspect and reduce a failing segment."""
    from ditc.diagnosis.polygraphy_export import export_polygraphy

    found = export_polygraphy(bundle, out, points=options.points, force=force)
    if json_:
        print_json(found)
        return
    click.echo(f"{out}")
    for name, segment in found["segments"].items():
        at = f" at steps {', '.join(map(str, segment['steps']))}" if segment["steps"] else ""
        click.echo(f"  {name}: {segment['points']} points{at}")
    if not found["tensorrt"]:
        click.echo("  nothing for TensorRT: this bundle has no form for it")
    click.echo(f"next: read {out / 'README.md'}, run {out / 'compare_onnxrt.sh'}")


def print_findings(findings: Sequence[Any]) -> None:
    """What works and what doesn't, a line each."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        click.echo(f"{'yes' if finding.works else 'no ':<3}  {finding.name:<{width}}  {finding.detail}")


def print_bisection(found: Any, top: int) -> None:
    """The worst groups of layers, `top` of them."""
    from ditc.report.wording import joined_names

    steps = len(found.together_steps)
    click.echo(f"{found.points} points at {steps} steps, {found.backend}; relative error of the prediction")
    click.echo(f"everything quantized: {found.together:.5f}\n")
    shown = found.groups[:top]
    places = [joined_names(group.branches) for group in shown]
    width = max(map(len, ["branch", *places]))
    error = {"only": "error caused", "without": "error left"}[found.mode]
    click.echo(f"rank  {error:>12}   share  worst step       t  error there  {'branch':<{width}}  layers")
    for rank, (group, place) in enumerate(zip(shown, places, strict=True), start=1):
        worst = group.worst
        click.echo(
            f"{rank:4d}  {group.error:12.5f}  {group.share:6.1%}  {worst.step:10d}  {worst.t:6g}  {worst.error:11.5f}  "
            f"{place:<{width}}  {joined_names(group.layers)}"
        )
    if len(found.groups) > top:
        click.echo(f"and {len(found.groups) - top} more; --top shows them")
    click.echo(
        f"\nthe groups' squares sum to {found.squares_ratio:.2f} of the square with everything quantized "
        "(1 where errors are independent)"
    )
