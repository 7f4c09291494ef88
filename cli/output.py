"""What commands print on a terminal: each function takes what its command found, as JSON would have it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

__all__ = [
    "print_bench",
    "print_bisection",
    "print_calibration",
    "print_demo",
    "print_estimate",
    "print_evaluation",
    "print_facts",
    "print_findings",
    "print_inspection",
    "print_json",
    "print_plan",
    "print_trial",
    "print_tuning",
]


def print_json(value: Any) -> None:
    """One JSON document, indented."""
    click.echo(json.dumps(value, indent=1))


def print_facts(path: Path, bundle: Any) -> None:
    """The headline facts of a bundle."""
    from ditc.cli.listing import bundle_facts

    click.echo(f"{path}")
    for name, text in bundle_facts(bundle).items():
        click.echo(f"  {name:<16} {text}")


def print_findings(findings: Sequence[Any]) -> None:
    """What works and what doesn't, a line each."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        click.echo(f"{'yes' if finding.works else 'no ':<3}  {finding.name:<{width}}  {finding.detail}")


def print_inspection(bundle: Any) -> None:
    """Everything that `ditc inspect` shows."""
    from ditc.cli.listing import calibration_comparisons, schedule_map, step_runs
    from ditc.report.wording import megabytes

    manifest = bundle.manifest
    print_facts(bundle.path, bundle)
    print_notes(bundle)
    click.echo(f"\nprogram: {' '.join(manifest.program.prologue)} once, then")
    click.echo("  steps      t               segment       reads  writes")
    for row in step_runs(manifest.program):
        click.echo(f"  {row['steps']:<9}  {row['t']:<14}  {row['segment']:<12}  {row['reads']:>5}  {row['writes']:>6}")
    if manifest.program.epilogue:
        click.echo(f"  then {' '.join(manifest.program.epilogue)}")
    in_float = any(plan.in_float for plan in manifest.program.segments)
    click.echo(f"\nschedule (# computed, {'f computed in floating point, ' if in_float else ''}. reused)")
    for line in schedule_map(manifest.program):
        click.echo(f"  {line}")
    for row in calibration_comparisons(bundle):
        print_calibration(row)
    click.echo("\nfiles")
    for name, entry in manifest.files.items():
        click.echo(f"  {name:<36} {megabytes(entry.size_bytes):>12}  {entry.sha256[:16]}")
    click.echo("\nmade with")
    for name, value in manifest.settings.items():
        click.echo(f"  {name:<16} {json.dumps(value)}")
    click.echo("  versions         " + ", ".join(f"{name} {found}" for name, found in manifest.versions.items()))


def print_notes(bundle: Any) -> None:
    """What was assumed when the model was read, and what speaks against it; nothing where all is stated."""
    notes = bundle.manifest.model.notes
    if notes:
        click.echo("\nof the model")
    for note in notes:
        click.echo(f"  {note}")


def print_calibration(row: dict[str, Any]) -> None:
    """What a calibrator of TensorRT 10 found over the bundle's own scales; of a long list its two ends."""
    click.echo(f"\n{row['file']}: scale over the bundle's own, {row['layers']} linear layers")
    ranked = sorted(row["ratios"].items(), key=lambda item: item[1])
    for path, ratio in ranked if len(ranked) <= 6 else [*ranked[:3], ("...", None), *ranked[-3:]]:
        click.echo(f"  {path}" if ratio is None else f"  {path:<36} {ratio:>8.3f}")


def print_plan(planned: dict[str, Any]) -> None:
    """What a build will make: platform, memory, keys."""
    click.echo(f"{planned['platform']}\n")
    for name, size_bytes in planned["memory"].items():
        click.echo(f"  {name:<24} {size_bytes / 1e6:>12,.2f} MB")
    click.echo(
        f"  {'device':<24} {planned['total_bytes'] / 1e6:>12,.2f} MB, {planned['free_bytes'] / 1e6:,.2f} MB free\n"
    )
    click.echo(f"  cache key  {planned['cache_key']}")
    for engine in planned["engines"]:
        click.echo(
            f"  {engine['segment']:<14} {engine['file']}  {'built earlier' if engine['present'] else ''}".rstrip()
        )
    click.echo("")


def print_bench(found: dict[str, Any]) -> None:
    """Latencies per request, segment and outside the engines; limits and peers where they were asked for."""
    request = found["request"]
    click.echo(f"{found['machine']['processor']}, {found['machine']['cores']} cores")
    print_arithmetic(found["arithmetic"])
    what = f"{request['n']} requests of {found['batch']} images, {found['bundle']['steps']} steps"
    click.echo(f"{what}, after {found['warmup']} others\n")
    outside = found["outside_engines"]
    rows = {"request": request, **found["segments"], "outside engines": outside}
    print_table(
        ("", "n", "median ms", "p90 ms", "spread", "share"),
        [
            (name, str(times["n"]), *_times(times), f"{times['share']:.1%}" if "share" in times else "")
            for name, times in rows.items()
        ],
    )
    peak = found["host_peak_memory_bytes"] / 1e6
    click.echo(f"\n{found['seconds_per_image'] * 1e3:.2f} ms per image, {peak:,.0f} MB of host memory at most")
    click.echo(
        f"outside the engines: {outside['seconds_per_step'] * 1e3:.3f} ms per step, "
        f"{outside['share']:.1%} of the trajectory"
    )
    if "roofline" in found:
        print_roofline(found["roofline"])
    if "against" in found:
        print_peers(found["against"])
    for file in found.get("trace", []):
        click.echo(f"  {file}")


def print_arithmetic(found: dict[str, Any] | None) -> None:
    """How integer products run on this machine, where there are any."""
    if found is not None:
        click.echo(f"INT8 on this CPU: {found['text']}")


def _times(latency: dict[str, Any]) -> tuple[str, str, str]:
    return f"{latency['median'] * 1e3:,.3f}", f"{latency['p90'] * 1e3:,.3f}", f"{latency['spread']:.0%}"


def print_roofline(found: dict[str, Any]) -> None:
    """Every segment against the ceilings of the machine."""
    rates = found["rates"]
    click.echo(
        f"\nceilings, measured just now: INT8 {rates['int8_operations'] / 1e9:,.0f} G/s, "
        f"float {rates['float_operations'] / 1e9:,.0f} G/s, memory {rates['bandwidth'] / 1e9:,.1f} GB/s"
    )
    print_table(
        ("", "INT8 G", "float G", "MB at least", "limit ms", "unfused ms", "measured ms", "of the limit", "bound by"),
        [
            (
                name,
                f"{row['int8_operations'] / 1e9:,.3f}",
                f"{row['float_operations'] / 1e9:,.3f}",
                f"{row['least_bytes'] / 1e6:,.2f}",
                *(f"{row[kind] * 1e3:,.3f}" for kind in ("limit", "unfused", "measured")),
                f"{row['share_of_limit']:.1%}",
                row["bound_by"],
            )
            for name, row in found["segments"].items()
        ],
    )


def print_peers(found: dict[str, Any]) -> None:
    """The bundle and its peers, and why others were skipped."""
    click.echo("")
    if found["peers"]:
        print_sides(found, {"bundle": found["bundle"], **found["peers"]})
    for name, reason in found["skipped"].items():
        click.echo(f"  {name} skipped: {reason}")


def print_sides(found: dict[str, Any], sides: dict[str, Any]) -> None:
    """Those that were measured; x is how many times as long as the bundle it takes."""
    click.echo(f"in turn, guidance {found['guidance']:g}, error at step {found['step']} against the FP reference")
    print_table(
        ("", "n", "step ms", "p90 ms", "spread", "x", "whole run ms", "p90 ms", "spread", "x", "error"),
        [
            (
                name,
                str(side["step"]["n"]),
                *_times(side["step"]),
                f"{side['ratio_step']:.2f}" if "ratio_step" in side else "",
                *_times(side["run"]),
                f"{side['ratio_run']:.2f}" if "ratio_run" in side else "",
                f"{side['relative_error']:.2g}",
            )
            for name, side in sides.items()
        ],
    )
    for name, side in found["peers"].items():
        run = "runs measured whole" if side["run_measured"] else "runs made of its steps"
        click.echo(f"  {name}: {side['what']}; {run}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, names left, numbers right; as wide as it is, whatever the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(80, sum(max(map(len, cells)) + 2 for cells in zip(columns, *rows, strict=True)))).print(table)


def print_estimate(found: dict[str, Any]) -> None:
    """Work and time of every segment, and what they were made from."""
    rates = found["device"]
    click.echo(f"{rates['name']}: {rates['source']}")
    click.echo(
        f"INT8 {rates['int8_operations'] / 1e12:,.2f} T/s, float {rates['float_operations'] / 1e12:,.2f} T/s, "
        f"memory {rates['bandwidth'] / 1e9:,.0f} GB/s"
    )
    click.echo(f"expected: {found['shares']['products']:.0%} and {found['shares']['bandwidth']:.0%} of those\n")
    click.echo(
        f"{'':<12}{'INT8 G':>10}{'float G':>10}{'weights MB':>12}{'moved MB':>10}{'bound ms':>11}{'expected ms':>13}"
    )
    for name, row in found["segments"].items():
        work = f"{row['int8_operations'] / 1e9:>10.2f}{row['float_operations'] / 1e9:>10.2f}"
        size = f"{row['weight_bytes'] / 1e6:>12.2f}{row['moved_bytes'] / 1e6:>10.2f}"
        click.echo(f"{name:<12}{work}{size}{row['bound'] * 1e3:>11.3f}{row['expected'] * 1e3:>13.3f}")
    image = found["seconds_per_image"]
    click.echo(f"\nper image: bound {image['bound'] * 1e3:,.2f} ms, expected {image['expected'] * 1e3:,.2f} ms")
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    click.echo(
        f"memory: {found['memory_bytes'] / 1e6:,.0f} MB at least, {fits} in {rates['memory_bytes'] / 1e9:,.0f} GB"
    )


def print_trial(trial: Any) -> None:
    """A candidate of `ditc tune` as it comes, on stderr."""
    from ditc.quality.tuning import described

    click.echo(f"{trial.stage}: {described(trial)}{', within the budget' if trial.within else ''}", err=True)


def print_tuning(found: dict[str, Any]) -> None:
    """The front, fastest first; a star marks what was chosen."""
    rows = []
    for trial in found["front"]:
        mark = " *" if trial["changes"] == found["chosen"]["changes"] else ""
        worse = "" if trial["worse_by"] is None else f"{trial['worse_by']:+.3f} to {trial['worse_high']:+.3f}"
        settings = ", ".join(f"{name} {value}" for name, value in trial["changes"].items())
        kept = "yes" if trial["within"] else "no"
        rows.append((settings + mark, f"{trial['seconds'] * 1e3:.2f}", f"{trial['psnr_db']:.1f}", worse, kept))
    print_table(("none is faster and better", "ms per image", "PSNR dB", "worse by, up to", "in budget"), rows)
    click.echo(f"{len(found['trials'])} candidates, {found['images']:,} images of seeds {found['seeds']} each")
    for note in found["notes"]:
        click.echo(note)


def print_evaluation(found: dict[str, Any]) -> None:
    """Pairs, distributions with their intervals, and the drift of every step."""
    bundle, seeds = found["bundle"], ", ".join(map(str, found["seeds"]))
    click.echo(f"{bundle['model']} {bundle['precision']}, {bundle['policy']}: {found['n']:,} images, seeds {seeds}")
    click.echo(f"intervals: {found['bootstrap']['level']:.0%}, {found['bootstrap']['rounds']:,} bootstrap rounds\n")
    click.echo(f"{'against FP, same noise':<26}{'mean':>10}{'interval':>22}{'worst':>11}")
    for name, row in found["paired"].items():
        if "skipped" in row:
            click.echo(f"{name:<26}not measured: {row['skipped']}")
            continue
        label = f"{name}, window {row['window']}" if "window" in row else name
        span = f"{row['low']:.4f} to {row['high']:.4f}"
        click.echo(f"{label:<26}{row['mean']:>10.4f}{span:>22}{row['worst']:>11.4f}")
    print_distribution(found["distribution"])
    print_drift(found["steps"])
    if "veto" in found:
        print_veto(found["veto"])


def print_distribution(found: dict[str, Any]) -> None:
    """Both sides against the real images, and their difference."""
    if "skipped" in found:
        click.echo(f"\nno distribution measures: {found['skipped']}")
        return
    click.echo(f"\nfeatures: {found['features']['name']}, {found['features']['about']}; real: {found['real']['about']}")
    sides = ("bundle", "fp", "difference")
    click.echo(f"{'':<18}" + "".join(f"{name:>11}{'interval':>20}" for name in ("bundle", "FP", "difference")))
    for name in (name for name, row in found["bundle"].items() if row is not None):
        cells = (found[side][name] for side in sides)
        text = (f"{row['value']:>11.4f}{row['low']:>9.4f} to{row['high']:>8.4f}" for row in cells)
        click.echo(f"{name.replace('_', ' '):<18}{''.join(text)}")
    small = [found[side]["frechet_distance"]["bias"] for side in sides[:2]]
    click.echo(f"of the Frechet distances about {small[0]:.4f} and {small[1]:.4f} come from the number of images alone")
    for row in found["per_seed"]:
        distances = f"{row['bundle']['frechet_distance']:.4f}, FP {row['fp']['frechet_distance']:.4f}"
        click.echo(f"  seed {row['seed']}, {row['n']:,} images: Frechet distance {distances}")


def print_drift(steps: dict[str, Any]) -> None:
    """Per step the relative error, and of mean and variance the channel that drifts most; beside it without VC."""
    names = {"bundle": "bundle", "uncompensated": "without compensation"}
    click.echo(f"\n{steps['bundle']['images']} images step by step; of the channels the one that drifts most")
    click.echo("      " + "".join(f"{names[side]:<34}" for side in steps))
    click.echo("step  " + f"{'error':<10}{'mean/std':<12}{'variance':<12}" * len(steps))
    for step in range(len(steps["bundle"]["relative_error"])):
        cells = ""
        for drift in steps.values():
            mean, variance = (max(drift[name][step], key=abs) for name in ("mean_drift", "variance_drift"))
            cells += f"{drift['relative_error'][step]:<10.5f}{mean:<+12.5f}{variance:<+12.5f}"
        click.echo(f"{step:4d}  {cells.rstrip()}")


def print_veto(found: dict[str, Any]) -> None:
    """Of every branch the ratio of quantization noise to the change that a reuse exploits; every step in JSON only."""
    from statistics import median

    width = max(map(len, ["branch", *found["branches"]]))
    click.echo(
        f"\nquantization noise over the change that a reuse exploits, {found['images']} images; above 1 is vetoed"
    )
    click.echo(f"{'branch':<{width}}  {'noise':>9}{'change':>9}{'ratio':>9}{'largest':>9}{'at step':>9}{'vetoed':>9}")
    for place, branch in enumerate(found["branches"]):
        noise, change, ratio = ([row[place] for row in found[name]] for name in ("noise", "change", "ratio"))
        steps = [step for step, value in enumerate(ratio) if value is not None]
        if not steps:
            continue
        worst = max(steps, key=ratio.__getitem__)
        middle = (f"{median(column[step] for step in steps):>9.4f}" for column in (noise, change))
        cells = f"{median(ratio[step] for step in steps):>9.2f}{ratio[worst]:>9.2f}{worst:>9}"
        share = sum(ratio[step] > 1 for step in steps) / len(steps)
        click.echo(f"{branch:<{width}}  {''.join(middle)}{cells}{share:>9.0%}")
    click.echo(f"medians over the steps that reuse; of all reuses {found['vetoed']:.1%} are vetoed")


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


def print_demo(found: dict[str, Any]) -> None:
    """The comparison with plain torch."""
    from ditc.report.wording import megabytes

    torch, ours = found["torch"], found["compiled"]
    click.echo(f"\n{'':<30}{'torch float32':>16}{'bundle':>16}{'ratio':>9}")
    for batch, times in found["seconds_per_image"].items():
        name = f"ms per image, batch {batch}"
        numbers = f"{times['torch'] * 1e3:>16.2f}{times['compiled'] * 1e3:>16.2f}{times['ratio']:>8.1f}x"
        click.echo(f"{name:<30}{numbers}")
    for name, key in (("pixels", "frechet_distance"), ("classifier", "frechet_distance_classifier")):
        click.echo(f"{f'Frechet distance ({name})':<30}{torch[key]:>16.3f}{ours[key]:>16.3f}")
    click.echo(f"{'class agreement':<30}{torch['class_agreement']:>16.1%}{ours['class_agreement']:>16.1%}")
    click.echo(f"{'PSNR against torch':<30}{'':>16}{ours['psnr_db']:>13.1f} dB")
    ratio = torch["size_bytes"] / ours["size_bytes"]
    click.echo(f"{'size':<30}{megabytes(torch['size_bytes']):>16}{megabytes(ours['size_bytes']):>16}{ratio:>8.1f}x")
    click.echo(f"\nquality over {found['images']} images of each, same noise")
    print_arithmetic(found["arithmetic"])
    click.echo(f"picture: {found['grid']} (torch above, bundle below)\nbundle:  {found['bundle']}")
