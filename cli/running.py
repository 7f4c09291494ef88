"""The commands that run a bundle: run, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ditc.cli.options import (
    A_PATH,
    as_json,
    place_options,
    processor_options,
    whole_numbers,
)
from ditc.cli.output import print_json
from ditc.cli.progress import steps_on_stderr
from ditc.errors import InputError

__all__ = ["run_command", "verify_command"]


@click.command("run")
@click.argument("bundle", type=A_PATH)
@click.option("--labels", required=True, help="Classes, one image each: 207,360.")
@click.option("-o", "--out", type=A_PATH, required=True, help="Folder for the PNG files.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@place_options
@processor_options
@as_json
def run_command(bundle: Path, labels: str, out: Path, seed: int, json_: bool, **place: Any) -> None:
    """Generate images with a bundle: a PNG each, and a grid of all."""
    from ditc.runtime.running import Place, run_bundle

    with steps_on_stderr("run") as watch:
        found = run_bundle(
            bundle, whole_numbers(labels, "--labels", "207,360"), out, seed=seed, watch=watch, place=Place(**place)
        )
    if json_:
        print_json(found)
        return
    click.echo(f"{len(found['images'])} images and grid.png in {out}")
    click.echo(f"{found['seconds_per_image'] * 1e3:.2f} ms per image")
    for name, times in found["segments"].items():
        click.echo(f"  {name}: {times['calls']} calls, median {times['median_seconds'] * 1e3:.3f} ms")


@click.command("verify")
@click.argument("bundle", type=A_PATH)
@click.option("--images", type=int, default=8, show_default=True, help="Images to compare.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the noise.")
@click.option("--min-psnr", type=float, help="Fail (exit code 1) below this mean PSNR in dB.")
@place_options
@processor_options
@as_json
def verify_command(bundle: Path, images: int, seed: int, min_psnr: float | None, json_: bool, **place: Any) -> None:
    """Run a bundle beside its FP, uncached program on the same noise, and compare step by step."""
    if images < 1:
        raise InputError(f"--images must be at least 1, found {images}")
    from ditc.runtime.running import Place, verify_bundle

    with steps_on_stderr("verify") as watch:
        found = verify_bundle(
            bundle, images=images, seed=seed, least_psnr_db=min_psnr, watch=watch, place=Place(**place)
        )
    if json_:
        print_json(found)
        return
    click.echo("step  relative error  std / exact std")
    for step, (error, ratio) in enumerate(zip(found["relative_error"], found["std_ratio"], strict=True)):
        click.echo(f"{step:4d}  {error:14.5f}  {ratio:15.5f}")
    click.echo(
        f"PSNR of {images} finished latents: mean {found['psnr_db_mean']:.2f} dB, lowest {found['psnr_db_min']:.2f} dB"
    )
