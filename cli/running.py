"""The commands that run a bundle: run, verify."""

from __future__ import annotations

from pathlib import Path

import click

from ditc.cli.headings import Command
from ditc.cli.options import takes
from ditc.cli.output import print_record
from ditc.cli.progress import steps_on_stderr
from ditc.cli.shared_options import a_bundle, as_json, out_option
from ditc.runtime.options import Place, RunOptions, VerifyOptions

__all__ = ["run_command", "verify_command"]


@click.command("run", cls=Command)
@a_bundle
@takes(options=RunOptions, place=Place)
@out_option("Folder for the PNG files.", required=True)
@as_json
def run_command(bundle: Path, options: RunOptions, place: Place, out: Path, json_: bool) -> None:
    """Generate images with a bundle: a PNG each, and a grid of all."""
    from ditc.runtime.running import run_bundle

    with steps_on_stderr("run") as watch:
        generated = run_bundle(bundle, options, out, watch=watch, place=place)
    if json_:
        print_record(generated)
        return
    click.echo(f"{len(generated.images)} images and {generated.grid} in {out}")
    if generated.start is not None:
        click.echo(f"began with {options.begin_with} at step {generated.start}")
    click.echo(f"{generated.seconds_per_image * 1e3:.2f} ms per image")
    for name, times in generated.segments.items():
        click.echo(f"  {name}: {times.calls} calls, median {times.median_seconds * 1e3:.3f} ms")


@click.command("verify", cls=Command)
@a_bundle
@takes(options=VerifyOptions, place=Place)
@as_json
def verify_command(bundle: Path, options: VerifyOptions, place: Place, json_: bool) -> None:
    """Run a bundle beside its FP, uncached program on the same noise, and compare step by step."""
    from ditc.runtime.running import verify_bundle

    with steps_on_stderr("verify") as watch:
        verification = verify_bundle(
            bundle,
            images=options.images,
            seed=options.seed,
            least_psnr_db=options.min_psnr,
            watch=watch,
            place=place,
        )
    if json_:
        print_record(verification)
        return
    click.echo("step  relative error  std / exact std")
    for step, (error, ratio) in enumerate(zip(verification.relative_error, verification.std_ratio, strict=True)):
        click.echo(f"{step:4d}  {error:14.5f}  {ratio:15.5f}")
    mean, lowest = verification.psnr_db_mean, verification.psnr_db_min
    click.echo(f"PSNR of {options.images} finished latents: mean {mean:.2f} dB, lowest {lowest:.2f} dB")
