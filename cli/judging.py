"""The commands that say how good: evaluate, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ditc.cli.model_options import ModelOptions, echo_note, model_argument
from ditc.cli.options import BUNDLE, Command, a_bundle, as_json, force_option, out_option, part_of, save_option, takes
from ditc.cli.output import print_json, print_table
from ditc.cli.progress import progress_on_stderr
from ditc.compiler.options import CompileOptions
from ditc.quality.options import SEARCHED, EvaluateOptions, TuneOptions
from ditc.runtime.options import Place

__all__ = ["evaluate_command", "print_evaluation", "print_veto", "tune_command"]


@click.command("evaluate", cls=Command)
@a_bundle
@takes(options=EvaluateOptions, place=Place)
@save_option
@as_json
def evaluate_command(bundle: Path, options: EvaluateOptions, place: Place, save: Path | None, json_: bool) -> None:
    """Measure a bundle's images: against FP on the same noise, and against real images, with intervals."""
    from ditc.quality.evaluating import check_not_worse, evaluate_bundle

    with progress_on_stderr() as progress:
        found = evaluate_bundle(bundle, options, place=place, save=save, progress=progress)
    print_json(found) if json_ else print_evaluation(found)
    if options.fail_if_worse is not None:
        check_not_worse(found, options.fail_if_worse)


@click.command("tune", cls=Command)
@model_argument
@out_option("The bundle to write.", required=True)
@takes(
    options=TuneOptions,
    stated=ModelOptions,
    base=part_of(CompileOptions, refused=SEARCHED, reason="is what tune searches; leave it out, or use ditc compile"),
)
@force_option(BUNDLE)
@as_json
def tune_command(
    model: str | None,
    out: Path,
    force: bool,
    options: TuneOptions,
    stated: ModelOptions,
    base: CompileOptions,
    json_: bool,
) -> None:
    """Search for the fastest bundle of MODEL within a budget of quality, by compiling and measuring candidates."""
    from ditc.quality.tuning import tune_model

    name = stated.name(model, base.seed)
    with progress_on_stderr(lines=False) as progress:  # a line for each candidate says more
        found = tune_model(
            name,
            out,
            base,
            options,
            progress=progress,
            on_trial=print_trial,
            on_note=echo_note,
            force=force,
            **stated.reading,
        )
    print_json(found) if json_ else print_tuning(found)


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
