"""The commands that measure a bundle: its images, its latency, and which of its layers err."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ditc.cli.options import (
    as_json,
    feature_options,
    place_options,
    processor_options,
    taken_place,
    threads_option,
    whole_numbers,
)
from ditc.cli.output import print_bench, print_bisection, print_estimate, print_evaluation, print_json
from ditc.cli.progress import progress_on_stderr, steps_on_stderr
from ditc.errors import InputError

__all__ = ["MEASURING"]


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
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


@click.command("evaluate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", type=int, default=1000, show_default=True, help="Images of each seed.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of the noise: 0,1,2.")
@feature_options
@click.option("--step-images", type=int, default=64, show_default=True, help="Images followed step by step.")
@click.option(
    "--veto",
    "veto_images",
    metavar="IMAGES",
    type=int,
    default=0,
    show_default=True,
    help="Images at which quantization noise is held against the change that a reuse exploits; 0 leaves it out.",
)
@click.option("--rounds", type=int, default=1000, show_default=True, help="Rounds of the bootstrap.")
@click.option("--save", type=click.Path(path_type=Path), help="Folder for report, features and FP images.")
@click.option(
    "--fail-if-worse",
    type=float,
    help="Fail (exit code 1) where the interval of the Frechet distance less FP's lies above this.",
)
@place_options
@processor_options
@as_json
def evaluate_command(bundle: Path, seeds: str, save: Path | None, json_: bool, **settings: Any) -> None:
    """Measure a bundle's images: against FP on the same noise, and against real images, with intervals."""
    from ditc.quality.evaluating import EvaluateOptions, check_not_worse, evaluate_bundle
    from ditc.runtime.running import Place

    place = Place(**taken_place(settings))
    options = EvaluateOptions(seeds=whole_numbers(seeds, "--seeds"), **settings).checked()
    with progress_on_stderr() as progress:
        found = evaluate_bundle(bundle, options, place=place, save=save, progress=progress)
    print_json(found) if json_ else print_evaluation(found)
    if options.fail_if_worse is not None:
        check_not_worse(found, options.fail_if_worse)


@click.command("report")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The page; default BUNDLE-report.html.")
@click.option("--images", type=int, default=16, show_default=True, help="Images to hold against FP, step by step.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the noise.")
@click.option("--requests", type=int, default=10, show_default=True, help="Full batches to time.")
@click.option(
    "--against",
    metavar="PEER,...|all|none",
    multiple=True,
    help="Peers to time in turn with the bundle; default FP in ONNX Runtime.",
)
@click.option("--evaluate-images", type=int, help="Also measure distributions over so many images of each seed.")
@click.option("--evaluate-seeds", default="0,1,2", show_default=True, help="Seeds of those images: 0,1,2.")
@click.option(
    "--fail-if-worse",
    type=float,
    help="Fail (exit code 1) where the interval of the Frechet distance less FP's lies above this.",
)
@click.option(
    "--fail-if-slower",
    type=float,
    metavar="RATIO",
    help="Fail (exit code 1) where a peer's whole run takes less than RATIO times the bundle's.",
)
@place_options
@as_json
def report_command(
    bundle: Path, out: Path | None, against: tuple[str, ...], evaluate_seeds: str, json_: bool, **settings: Any
) -> None:
    """Write one page about a bundle: pictures, program, latencies, errors, calibration, how it was made."""
    from ditc.report.gathering import (
        ReportOptions,
        check_page_path,
        check_report,
        default_page,
        report_bundle,
        write_report,
    )
    from ditc.runtime.running import Place
    from ditc.speed.peers import peer_names

    place = Place(**taken_place(settings))
    peers = () if against == ("none",) else peer_names(against) if against else None
    seeds = whole_numbers(evaluate_seeds, "--evaluate-seeds")
    options = ReportOptions(against=peers, evaluate_seeds=seeds, **settings)
    page = out or default_page(bundle)
    check_page_path(page, bundle)
    with progress_on_stderr() as progress:
        report = report_bundle(bundle, options, place=place, progress=progress)
    numbers = write_report(report, page)
    print_json(report.model_dump(mode="json")) if json_ else click.echo(f"{page}\n{numbers}")
    check_report(report, options)


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--requests", type=int, default=10, show_default=True, help="Full batches to measure.")
@click.option("--warmup", type=int, default=2, show_default=True, help="Full batches before those.")
@click.option("--trace", type=click.Path(path_type=Path), help="Folder for layers_*.json and profile_*.json.")
@click.option("--max-seconds", type=float, help="Fail (exit code 1) where the median request takes longer.")
@click.option("--against", metavar="PEER,...|all", multiple=True, help="Peers to measure in turn with the bundle.")
@click.option("--model", metavar="MODEL", help="The model it was compiled from, for peers in torch.")
@click.option("--heads", type=int, help="Attention heads of --model, where its width does not tell.")
@click.option(
    "--fail-if-slower",
    "least_ratio",
    type=float,
    metavar="RATIO",
    help="Fail (exit code 1) where a peer's whole run takes less than RATIO times the bundle's.",
)
@click.option("--roofline", is_flag=True, help="Measure this machine's ceilings, and hold every segment to them.")
@place_options
@threads_option
@as_json
def bench_command(
    bundle: Path,
    requests: int,
    warmup: int,
    trace: Path | None,
    max_seconds: float | None,
    against: tuple[str, ...],
    model: str | None,
    heads: int | None,
    least_ratio: float | None,
    roofline: bool,
    json_: bool,
    **place: Any,
) -> None:
    """Measure a bundle's latency per request, step and segment: beside its peers, and against the machine's limits."""
    from ditc.runtime.running import Place
    from ditc.speed.bench_options import BenchOptions, ModelChoice
    from ditc.speed.benching import bench_bundle
    from ditc.speed.peers import peer_names
    from ditc.speed.side_by_side import check_not_slower

    options = BenchOptions(
        requests=requests,
        warmup=warmup,
        trace=trace,
        most_seconds=max_seconds,
        against=peer_names(against),
        model=ModelChoice(model, heads),
        least_ratio=least_ratio,
        roofline=roofline,
    )
    with progress_on_stderr() as progress:
        found = bench_bundle(bundle, options, place=Place(**place), progress=progress)
    print_json(found) if json_ else print_bench(found)
    if least_ratio is not None:
        check_not_slower(found["against"], least_ratio)


@click.command("estimate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--device",
    metavar="agx-orin|h100|h200|here|l4|orin-nx",
    default="here",
    show_default=True,
    help="Where the bundle would run.",
)
@as_json
def estimate_command(bundle: Path, device: str, json_: bool) -> None:
    """Predict latency and memory of a bundle on a device from operations, bytes and published rates."""
    from ditc.speed.estimating import estimate_bundle

    found = estimate_bundle(bundle, device)
    print_json(found) if json_ else print_estimate(found)


@click.command("bisect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--by", metavar="layer|branch|block", default="layer", show_default=True, help="What a group is.")
@click.option(
    "--mode", metavar="only|without", default="only", show_default=True, help="Quantize only the group, or all but it."
)
@click.option("--points", type=int, default=16, show_default=True, help="Calibration points to measure at.")
@click.option("--top", type=int, default=20, show_default=True, help="Groups the table shows; --json has all.")
@click.option("--target", metavar="cpu|tensorrt", default="cpu", show_default=True, help="Where the variants run.")
@as_json
def bisect_command(bundle: Path, by: str, mode: str, points: int, top: int, target: str, json_: bool) -> None:
    """Rank the linear layers of a bundle by the error that quantizing them causes."""
    if top < 1:
        raise InputError(f"--top must be at least 1, found {top}")
    from ditc.diagnosis.bisecting import BisectOptions, bisect_bundle, open_target

    options = BisectOptions(by=by, mode=mode, points=points).checked()
    with progress_on_stderr() as progress, open_target(target, bundle) as where:
        found = bisect_bundle(bundle, options, target=where, progress=progress)
    if json_:
        print_json(found.model_dump(mode="json"))
    else:
        print_bisection(found, top)


MEASURING = (
    verify_command,
    evaluate_command,
    report_command,
    bench_command,
    estimate_command,
    bisect_command,
)
