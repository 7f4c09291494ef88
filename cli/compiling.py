"""The commands that make something: compile, demo, build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ditc.choices import BuiltIn, names_of
from ditc.cli.headings import BUNDLE, Command, SettingOption
from ditc.cli.model_options import ModelOptions, echo_note, model_argument
from ditc.cli.options import takes
from ditc.cli.output import print_arithmetic, print_facts, print_record
from ditc.cli.progress import progress_on_stderr
from ditc.cli.shared_options import a_bundle, as_json, exports_option, force_option, out_option
from ditc.compiler.options import CompileOptions
from ditc.engines.options import BuildOptions

if TYPE_CHECKING:
    from ditc.cli.building import BuildPreview, BuiltEngines
    from ditc.quality.demo import Demo
    from ditc.quality.prompt_demo import PromptDemo

__all__ = ["build_command", "compile_command", "demo_command", "print_demo", "print_prompt_demo"]


@click.command("compile", cls=Command)
@model_argument
@out_option("The bundle to write.", required=True)
@takes(stated=ModelOptions, options=CompileOptions)
@force_option(BUNDLE)
@exports_option
@as_json
def compile_command(
    model: str | None,
    out: Path,
    force: bool,
    exports: Path | None,
    stated: ModelOptions,
    options: CompileOptions,
    json_: bool,
) -> None:
    """Compile MODEL into a bundle.

    MODEL is "digits" or "emoji" (built in), a .pt or .safetensors file with the keys of the original DiT release, a
    diffusers folder, or MODULE:FUNCTION that returns a model of your own.
    """
    from ditc.compiler.driver import compile_model

    name = stated.name(model, options.seed)
    with progress_on_stderr() as progress:
        bundle = compile_model(
            name,
            out,
            options,
            progress=progress,
            force=force,
            exports=exports,
            on_note=echo_note,
            **stated.reading,
        )
    if json_:
        from ditc.cli.listing import CompiledBundle

        print_record(CompiledBundle(bundle=str(out), manifest=bundle.manifest))
    else:
        print_facts(out, bundle)


@click.command("demo", cls=Command)
@click.argument("model", type=click.Choice(names_of(BuiltIn)), default="digits")
@out_option("Folder for the results.", default=Path("out/demo"), show_default=True)
@takes(options=CompileOptions)
@as_json
def demo_command(model: BuiltIn, out: Path, options: CompileOptions, json_: bool) -> None:
    """Compile a built-in model and hold it against plain torch: a picture and a table.

    MODEL is digits unless given; emoji draws twelve prompts, at 25 steps, guidance 2 and 256 points unless you say
    otherwise.
    """
    from ditc.quality.demo import run_demo
    from ditc.quality.prompt_demo import run_prompt_demo

    demos: dict[BuiltIn, tuple[Callable[..., Any], Callable[[Any], None]]] = {
        "digits": (run_demo, print_demo),
        "emoji": (run_prompt_demo, print_prompt_demo),
    }
    run, show = demos[model]
    with progress_on_stderr() as progress:
        demo = run(out, options, progress)
    print_record(demo) if json_ else show(demo)


@click.command("build", cls=Command)
@a_bundle
@takes(options=BuildOptions)
@click.option(
    "--dry-run", is_flag=True, cls=SettingOption, help="Print the engines' keys and the memory plan, and build nothing."
)
@as_json
def build_command(bundle: Path, options: BuildOptions, dry_run: bool, json_: bool) -> None:
    """Build a bundle's TensorRT engines on this machine.

    Every segment is built in a process of its own; what is built stays, and a second build does nothing.
    """
    from ditc.cli.building import build_bundle, preview_build

    if dry_run:
        preview = preview_build(bundle, options)
        print_record(preview) if json_ else print_preview(preview)
        return
    with progress_on_stderr() as progress:
        built = build_bundle(bundle, options, progress=progress, on_preview=None if json_ else print_preview)
    print_record(built) if json_ else print_engines(built)


def print_demo(demo: Demo) -> None:
    """Print the comparison with plain torch."""
    from ditc.report.wording import megabytes

    torch, ours = demo.torch, demo.compiled
    click.echo(f"\n{'':<30}{'torch float32':>16}{'bundle':>16}{'ratio':>9}")
    for batch, times in demo.seconds_per_image.items():
        name = f"ms per image, batch {batch}"
        click.echo(f"{name:<30}{times.torch * 1e3:>16.2f}{times.compiled * 1e3:>16.2f}{times.ratio:>8.1f}x")
    for name, theirs, own in (
        ("pixels", torch.frechet_distance, ours.frechet_distance),
        ("classifier", torch.frechet_distance_classifier, ours.frechet_distance_classifier),
    ):
        click.echo(f"{f'Frechet distance ({name})':<30}{theirs:>16.3f}{own:>16.3f}")
    click.echo(f"{'class agreement':<30}{torch.class_agreement:>16.1%}{ours.class_agreement:>16.1%}")
    click.echo(f"{'PSNR against torch':<30}{'':>16}{ours.psnr_db:>13.1f} dB")
    ratio = torch.size_bytes / ours.size_bytes
    click.echo(f"{'size':<30}{megabytes(torch.size_bytes):>16}{megabytes(ours.size_bytes):>16}{ratio:>8.1f}x")
    click.echo(f"\nquality over {demo.images} images of each, same noise")
    print_arithmetic(demo.arithmetic)
    click.echo(f"picture: {demo.grid} (torch above, bundle below)\nbundle:  {demo.bundle}")


def print_prompt_demo(demo: PromptDemo) -> None:
    """Print the prompts, and the comparison with plain torch."""
    from ditc.report.wording import megabytes

    half, times = len(demo.prompts) // 2, demo.seconds_per_image
    click.echo(f"\n{'':<30}{'torch float32':>16}{'bundle':>16}{'ratio':>9}")
    name = f"ms per image, batch {len(demo.prompts)}"
    click.echo(f"{name:<30}{times.torch * 1e3:>16.2f}{times.compiled * 1e3:>16.2f}{times.ratio:>8.1f}x")
    click.echo(f"{'PSNR against torch':<30}{'':>16}{demo.psnr_db:>13.1f} dB")
    ratio = demo.torch_bytes / demo.bundle_bytes
    click.echo(f"{'size':<30}{megabytes(demo.torch_bytes):>16}{megabytes(demo.bundle_bytes):>16}{ratio:>8.1f}x\n")
    print_arithmetic(demo.arithmetic)
    for row in (demo.prompts[:half], demo.prompts[half:]):
        click.echo("; ".join(row))
    click.echo(f"picture: {demo.grid} (torch above, bundle below)\nbundle:  {demo.bundle}")


def print_preview(preview: BuildPreview) -> None:
    """Print what a build will make: platform, memory, keys."""
    click.echo(f"{preview.platform}\n")
    for name, size_bytes in preview.memory.items():
        click.echo(f"  {name:<24} {size_bytes / 1e6:>12,.2f} MB")
    click.echo(f"  {'device':<24} {preview.total_bytes / 1e6:>12,.2f} MB, {preview.free_bytes / 1e6:,.2f} MB free\n")
    click.echo(f"  cache key  {preview.cache_key}")
    for engine in preview.engines:
        click.echo(f"  {engine.segment:<14} {engine.file}  {'built earlier' if engine.present else ''}".rstrip())
    click.echo("")


def print_engines(built: BuiltEngines) -> None:
    """Print every engine, with its size and the seconds that it took."""
    for engine in built.engines:
        state = f"built in {engine.build_seconds:.1f} s" if engine.built else "built earlier"
        click.echo(f"  {engine.segment:<14} {engine.size_bytes / 1e6:>10,.2f} MB  {state:<18} {engine.file}")
