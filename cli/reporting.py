"""The command that puts all of a bundle on one page: report."""

from __future__ import annotations

from pathlib import Path

import click

from ditc.cli.headings import Command
from ditc.cli.options import part_of, takes
from ditc.cli.output import print_record
from ditc.cli.progress import progress_on_stderr
from ditc.cli.shared_options import a_bundle, as_json, out_option
from ditc.report.options import ReportOptions
from ditc.runtime.options import Place

__all__ = ["report_command"]


@click.command("report", cls=Command)
@a_bundle
@out_option("The page, ending in .html, outside the bundle; default BUNDLE-report.html.")
@takes(options=ReportOptions, place=part_of(Place, "target", "engines", "graphs"))
@as_json
def report_command(bundle: Path, out: Path | None, options: ReportOptions, place: Place, json_: bool) -> None:
    """Write one page about a bundle: pictures, program, latencies, errors, calibration, how it was made."""
    from ditc.report.gathering import check_page_path, check_report, default_page, report_bundle, write_report

    page = out or default_page(bundle)
    check_page_path(page, bundle)
    with progress_on_stderr() as progress:
        report = report_bundle(bundle, options, place=place, progress=progress)
    numbers = write_report(report, page)
    print_record(report) if json_ else click.echo(f"{page}\n{numbers}")
    check_report(report, options)
