"""The command that shows a bundle: inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ditc.cli.headings import Command
from ditc.cli.output import print_facts, print_record
from ditc.cli.shared_options import a_bundle, as_json

if TYPE_CHECKING:
    from ditc.bundle import Bundle
    from ditc.cli.listing import CalibrationComparison

__all__ = ["inspect_command"]


@click.command("inspect", cls=Command)
@a_bundle
@as_json
def inspect_command(bundle: Path, json_: bool) -> None:
    """Print a bundle's program, schedule, sizes, and how it was made."""
    from ditc.bundle import open_bundle
    from ditc.cli.listing import inspected

    opened = open_bundle(bundle)
    print_record(inspected(opened)) if json_ else print_inspection(opened)


def print_inspection(bundle: Bundle) -> None:
    """Print everything that `ditc inspect` shows."""
    from ditc.cli.listing import calibration_comparisons, schedule_map, step_runs
    from ditc.report.wording import megabytes

    manifest = bundle.manifest
    print_facts(bundle.path, bundle)
    print_notes(bundle)
    click.echo(f"\nprogram: {' '.join(manifest.program.prologue)} once, then")
    click.echo("  steps      t               segment       reads  writes")
    for row in step_runs(manifest.program):
        click.echo(f"  {row.steps:<9}  {row.t:<14}  {row.segment:<12}  {row.reads:>5}  {row.writes:>6}")
    if manifest.program.epilogue:
        click.echo(f"  then {' '.join(manifest.program.epilogue)}")
    in_float = any(segment.in_float for segment in manifest.program.segments)
    click.echo(f"\nschedule (# computed, {'f computed in floating point, ' if in_float else ''}. reused)")
    for line in schedule_map(manifest.program):
        click.echo(f"  {line}")
    for comparison in calibration_comparisons(bundle):
        print_calibration(comparison)
    click.echo("\nfiles")
    for name, entry in manifest.files.items():
        click.echo(f"  {name:<36} {megabytes(entry.size_bytes):>12}  {entry.sha256[:16]}")
    click.echo("\nmade with")
    for name, value in manifest.settings.items():
        click.echo(f"  {name:<16} {json.dumps(value)}")
    click.echo("  versions         " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))


def print_notes(bundle: Bundle) -> None:
    """Print what was assumed when the model was read, and what speaks against it; nothing where all is stated."""
    notes = bundle.manifest.model.notes
    if notes:
        click.echo("\nof the model")
    for note in notes:
        click.echo(f"  {note}")


def print_calibration(comparison: CalibrationComparison) -> None:
    """Print a calibrator's scales of TensorRT 10 over the bundle's own scales; of a long list its two ends."""
    click.echo(f"\n{comparison.file}: scale over the bundle's own, {comparison.layers} linear layers")
    ranked = sorted(comparison.ratios.items(), key=lambda item: item[1])
    for path, ratio in ranked if len(ranked) <= 6 else [*ranked[:3], ("...", None), *ranked[-3:]]:
        click.echo(f"  {path}" if ratio is None else f"  {path:<36} {ratio:>8.3f}")
