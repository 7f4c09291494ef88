"""The command line. Each command parses, calls one function, prints; heavy imports wait inside the command body.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from ditc.cli.measuring import MEASURING
from ditc.cli.options import (
    ModelSettings,
    as_json,
    compile_options,
    echo_note,
    feature_options,
    model_options,
    place_options,
    processor_options,
    target_options,
    whole_numbers,
)
from ditc.cli.output import (
    print_demo,
    print_facts,
    print_findings,
    print_inspection,
    print_json,
    print_plan,
    print_trial,
    print_tuning,
)
from ditc.cli.progress import advice_on_stderr, progress_on_stderr, steps_on_stderr
from ditc.errors import CheckError, DitcError, InputError, one_line

__all__ = ["cli", "main"]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main() -> None:
    """Run the command line; every error that is ours becomes one line on stderr."""
    for stream in (sys.stdout, sys.stderr):  # a path may hold what the locale can't write
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command line."""
    try:
        with advice_on_stderr():
            return int(cli.main(args=list(arguments), prog_name="ditc", standalone_mode=False) or 0)
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except CheckError as e:
        click.echo(f"ditc: check failed: {one_line(str(e))}", err=True)
        return FAILED
    except DitcError as e:
        click.echo(f"ditc: {one_line(str(e))}", err=True)
        return BAD_INPUT
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] == "ditc":
            raise
        click.echo(f"ditc: this command needs {e.name}; install it with: pip install 'ditc[export]'", err=True)
        return BAD_INPUT
    except OSError as e:
        click.echo(one_line(f"ditc: {e.filename or 'a file'}: {e.strerror or e}"), err=True)
        return BAD_INPUT
    except (KeyboardInterrupt, click.Abort):
        click.echo("ditc: interrupted; nothing half-written is left, the same command goes on from here", err=True)
        return INTERRUPTED


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ditc")
def cli() -> None:
    """Compile the whole denoising trajectory of a diffusion transformer: INT8, feature cache, variance compensation."""


@cli.command("compile")
@model_options
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The bundle to write.")
@click.option("--force", is_flag=True, help="Replace a bundle that exists.")
@click.option(
    "--exports", type=click.Path(path_type=Path), help="Folder that keeps FP segments for compiles with other settings."
)
@compile_options
@as_json
def compile_command(out: Path, force: bool, exports: Path | None, json_: bool, **settings: Any) -> None:
    """Compile MODEL into a bundle.

    MODEL is "digits" (built in), a .pt or .safetensors file with the keys of the original DiT release, a diffusers
    folder, or MODULE:FUNCTION that returns a model of your own.
    """
    from ditc.compiler.driver import compile_model
    from ditc.compiler.options import CompileOptions

    model = ModelSettings.of(settings)
    options = CompileOptions(**settings).checked()
    with progress_on_stderr() as progress:
        bundle = compile_model(
            model.name,
            out,
            options,
            progress=progress,
            force=force,
            exports=exports,
            on_note=echo_note,
            **model.reading,
        )
    if json_:
        print_json({"bundle": str(out), "manifest": bundle.manifest.model_dump(mode="json")})
    else:
        print_facts(out, bundle)


@cli.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--labels", required=True, help="Classes, one image each: 207,360.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the PNG files.")
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


@cli.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", metavar="tensorrt", default="tensorrt", show_default=True, help="What to build for.")
@click.option("--engines", type=click.Path(path_type=Path), help="Folder for the engines; default is the bundle's own.")
@click.option(
    "--optimization-level", type=int, default=3, show_default=True, help="How long TensorRT searches, 0 to 5."
)
@click.option("--workspace", type=int, default=1024, show_default=True, help="MiB of scratch memory TensorRT may take.")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    help="Timing cache to use and extend; default lies by the engines.",
)
@click.option("--replay", is_flag=True, help="Build from the timing cache alone, and leave it as it is.")
@click.option("--version-compatible", is_flag=True, help="Plans that a later TensorRT's lean runtime takes.")
@click.option("--hardware-compatible", is_flag=True, help="Plans for every GPU from Ampere on, at some cost in speed.")
@click.option(
    "--calibration",
    metavar="explicit|entropy|minmax",
    default="explicit",
    show_default=True,
    help="Scales of the bundle, or those of a calibrator of TensorRT 10.",
)
@click.option("--dla", type=int, help="Refused: says why a diffusion transformer does not run on a DLA core.")
@click.option("--dry-run", is_flag=True, help="Print the engines' keys and the memory plan, and build nothing.")
@as_json
def build_command(bundle: Path, json_: bool, dry_run: bool, **settings: Any) -> None:
    """Build a bundle's TensorRT engines on this machine.

    Every segment is built in a process of its own; what is built stays, and a second build does nothing.
    """
    from ditc.cli.building import build_bundle, planned_build

    if dry_run:
        planned = planned_build(bundle, **settings)
        print_json(planned) if json_ else print_plan(planned)
        return
    with progress_on_stderr() as progress:
        found = build_bundle(bundle, progress=progress, on_plan=None if json_ else print_plan, **settings)
    if json_:
        print_json(found)
        return
    for engine in found["engines"]:
        state = f"built in {engine['build_seconds']:.1f} s" if engine["built"] else "built earlier"
        click.echo(f"  {engine['segment']:<14} {engine['size_bytes'] / 1e6:>10,.2f} MB  {state:<18} {engine['file']}")


@cli.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@as_json
def inspect_command(bundle: Path, json_: bool) -> None:
    """Print a bundle's program, schedule, sizes, and how it was made."""
    from ditc.bundle import open_bundle
    from ditc.cli.listing import calibration_comparisons

    opened = open_bundle(bundle)
    if json_:
        found = {"calibrations": calibration_comparisons(opened)}
        print_json(opened.manifest.model_dump(mode="json") | found)
        return
    print_inspection(opened)


@cli.command("export-polygraphy")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--points", type=int, default=4, show_default=True, help="Calls recorded of each segment.")
@click.option("--force", is_flag=True, help="Replace an earlier export.")
@as_json
def export_polygraphy_command(bundle: Path, out: Path, points: int, force: bool, json_: bool) -> None:
    """Write data loaders and commands for Polygraphy: compare backends, inspect and reduce a failing segment."""
    from ditc.diagnosis.polygraphy_export import export_polygraphy

    found = export_polygraphy(bundle, out, points=points, force=force)
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


@cli.command("doctor")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@target_options
@as_json
def doctor_command(bundle: Path | None, target: str | None, engines: Path | None, json_: bool) -> None:
    """Say which backends work on this machine, and why the others don't.

    With a BUNDLE also whether each of its segments gives here what it gave where it was compiled.
    """
    from ditc.diagnosis.doctor import compared, examine

    if bundle is None and (target or engines):
        raise InputError("--target and --engines say where a bundle runs; name the bundle, or leave them out")
    findings = examine()
    segments = [] if bundle is None else compared(bundle, target, engines)
    if json_:
        print_json([finding._asdict() for finding in findings + segments])
    else:
        print_findings(findings + segments)
    if different := [finding.name for finding in segments if not finding.works]:
        raise CheckError(
            f"{bundle} gives something else here than where it was compiled: {different[0]} is the first that does; "
            "don't use it here, or use another --target"
        )


@cli.command("demo")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@compile_options
@as_json
def demo_command(out: Path, json_: bool, **settings: Any) -> None:
    """Compile the built-in reference model and hold it against plain torch: a picture and a table."""
    from ditc.compiler.options import CompileOptions
    from ditc.quality.demo import run_demo

    with progress_on_stderr() as progress:
        found = run_demo(out, CompileOptions(**settings).checked(), progress)
    if json_:
        print_json(found)
        return
    print_demo(found)


@cli.command("tune")
@model_options
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The bundle to write.")
@click.option("--force", is_flag=True, help="Replace a bundle that exists.")
@click.option("--worse-by", type=float, help="Most that the Frechet distance may lie above FP's, interval and all.")
@click.option("--least-psnr", "least_psnr_db", type=float, help="Least mean PSNR against FP in dB, interval and all.")
@click.option("--seconds", type=float, help="Most seconds per image on this machine.")
@click.option("--images", type=int, default=500, show_default=True, help="Images of each seed that judge a candidate.")
@click.option("--seeds", default="0", show_default=True, help="Seeds of their noise: 0,1,2.")
@feature_options
@click.option("--intervals", default="2,3,4,5,6,8,10", show_default=True, help="Cache intervals to try.")
@compile_options
@as_json
@click.pass_context
def tune_command(
    context: click.Context,
    /,
    out: Path,
    force: bool,
    worse_by: float | None,
    least_psnr_db: float | None,
    seconds: float | None,
    images: int,
    seeds: str,
    features: str | None,
    real: str | None,
    intervals: str,
    json_: bool,
    **settings: Any,
) -> None:
    """Search for the fastest bundle of MODEL within a budget of quality, by compiling and measuring candidates."""
    from ditc.compiler.options import CompileOptions
    from ditc.quality.tuning import SEARCHED, Budget, TuneOptions, tune_model

    for name in SEARCHED:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is what tune searches; leave it out, or use ditc compile")
    model = ModelSettings.of(settings)
    base = CompileOptions(**settings).checked()
    budget = Budget(worse_by=worse_by, least_psnr_db=least_psnr_db, seconds=seconds)
    options = TuneOptions(
        budget=budget,
        images=images,
        seeds=whole_numbers(seeds, "--seeds"),
        features=features,
        real=real,
        intervals=whole_numbers(intervals, "--intervals", "2,3,4"),
    )
    with progress_on_stderr(lines=False) as progress:  # a line for each candidate says more
        found = tune_model(
            model.name,
            out,
            base,
            options,
            progress=progress,
            on_trial=print_trial,
            on_note=echo_note,
            force=force,
            **model.reading,
        )
    print_json(found) if json_ else print_tuning(found)


for _command in MEASURING:
    cli.add_command(_command)
