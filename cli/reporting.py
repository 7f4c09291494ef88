"""The command that puts all of a bundle on one page: report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ditc.cli.options import (
    A_PATH,
    as_json,
    place_options,
    taken_place,
    whole_numbers,
)
from ditc.cli.output import print_json
from ditc.cli.progress import progress_on_stderr

__all__ = ["report_command"]


@click.command("report")
@click.argument("bundle", type=A_PATH)
@click.option("-o", "--out", type=A_PATH, help="The page; default BUNDLE-report.html.")
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
