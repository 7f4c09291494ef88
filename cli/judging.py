"""The commands that say how good: evaluate, tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ditc.cli.headings import BUNDLE, Command
from ditc.cli.model_options import ModelOptions, echo_note, model_argument
from ditc.cli.options import part_of, takes
from ditc.cli.output import print_record, print_table
from ditc.cli.progress import progress_on_stderr
from ditc.cli.shared_options import a_bundle, as_json, force_option, out_option, save_option
from ditc.compiler.options import CompileOptions
from ditc.quality.options import SEARCHED, EvaluateOptions, TuneOptions
from ditc.runtime.options import Place

if TYPE_CHECKING:
    from ditc.quality.evaluation import Distributions, Drifts, Evaluation, Veto
    from ditc.quality.trials import Trial
    from ditc.quality.tuning import Tuning

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
        evaluation = evaluate_bundle(bundle, options, place=place, save=save, progress=progress)
    print_record(evaluation) if json_ else print_evaluation(evaluation)
    if options.fail_if_worse is not None:
        check_not_worse(evaluation, options.fail_if_worse)


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
        tuning = tune_model(
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
    print_record(tuning) if json_ else print_tuning(tuning)


def print_evaluation(evaluation: Evaluation) -> None:
    """Print pairs, distributions with their intervals, and the drift of every step."""
    from ditc.spec import Skipped

    bundle, seeds = evaluation.bundle, ", ".join(map(str, evaluation.seeds))
    click.echo(f"{bundle.model} {bundle.precision}, {bundle.policy}: {evaluation.n:,} images, seeds {seeds}")
    bootstrap = evaluation.bootstrap
    click.echo(f"intervals: {bootstrap.level:.0%}, {bootstrap.rounds:,} bootstrap rounds\n")
    click.echo(f"{'against FP, same noise':<26}{'mean':>10}{'interval':>22}{'worst':>11}")
    for name, measure in evaluation.paired.items():
        if isinstance(measure, Skipped):
            click.echo(f"{name:<26}not measured: {measure.skipped}")
            continue
        label = name if measure.window is None else f"{name}, window {measure.window}"
        span = f"{measure.low:.4f} to {measure.high:.4f}"
        click.echo(f"{label:<26}{measure.mean:>10.4f}{span:>22}{measure.worst:>11.4f}")
    if isinstance(evaluation.distribution, Skipped):
        click.echo(f"\nno distribution measures: {evaluation.distribution.skipped}")
    else:
        print_distributions(evaluation.distribution)
    print_drifts(evaluation.steps)
    if evaluation.veto is not None:
        print_veto(evaluation.veto)


def print_distributions(distributions: Distributions) -> None:
    """Print both sides against the real images, and their difference."""
    features, real = distributions.features, distributions.real
    click.echo(f"\nfeatures: {features.name}, {features.about}; real: {real.about}")
    sides = (distributions.bundle, distributions.fp, distributions.difference)
    click.echo(f"{'':<18}" + "".join(f"{name:>11}{'interval':>20}" for name in ("bundle", "FP", "difference")))
    for name in distributions.bundle.measures:
        estimates = (side.measures[name] for side in sides)
        text = (f"{row.value:>11.4f}{row.low:>9.4f} to{row.high:>8.4f}" for row in estimates)
        click.echo(f"{name.replace('_', ' '):<18}{''.join(text)}")
    small = [side.frechet_distance.bias for side in sides[:2]]
    click.echo(f"of the Frechet distances about {small[0]:.4f} and {small[1]:.4f} come from the number of images alone")
    for row in distributions.per_seed:
        distances = f"{row.bundle.frechet_distance:.4f}, FP {row.fp.frechet_distance:.4f}"
        click.echo(f"  seed {row.seed}, {row.n:,} images: Frechet distance {distances}")


def print_drifts(drifts: Drifts) -> None:
    """Print per step the relative error, and of mean and variance the channel that drifts most; the same without VC."""
    names = {"bundle": "bundle", "uncompensated": "without compensation"}
    sides = drifts.sides
    click.echo(f"\n{drifts.bundle.images} images step by step; of the channels the one that drifts most")
    click.echo("      " + "".join(f"{names[side]:<34}" for side in sides))
    click.echo("step  " + f"{'error':<10}{'mean/std':<12}{'variance':<12}" * len(sides))
    for step in range(len(drifts.bundle.relative_error)):
        cells = ""
        for drift in sides.values():
            mean, variance = max(drift.mean_drift[step], key=abs), max(drift.variance_drift[step], key=abs)
            cells += f"{drift.relative_error[step]:<10.5f}{mean:<+12.5f}{variance:<+12.5f}"
        click.echo(f"{step:4d}  {cells.rstrip()}")


def print_veto(veto: Veto) -> None:
    """Print each branch's ratio of quantization noise to the change that a reuse exploits; each step in JSON only."""
    width = max(map(len, ["branch", *veto.branches]))
    click.echo(f"\nquantization noise over the change that a reuse exploits, {veto.images} images; above 1 is vetoed")
    click.echo(f"{'branch':<{width}}  {'noise':>9}{'change':>9}{'ratio':>9}{'largest':>9}{'at step':>9}{'vetoed':>9}")
    for place, branch in enumerate(veto.branches):
        if cells := _veto_cells(veto, place):
            click.echo(f"{branch:<{width}}  {cells}")
    click.echo(f"medians over the steps that reuse; of all reuses {veto.vetoed:.1%} are vetoed")


def _veto_cells(veto: Veto, place: int) -> str:
    """Return the numbers of one branch; nothing where it never reuses."""
    from statistics import median

    ratio = {step: row[place] for step, row in enumerate(veto.ratio)}
    ratios = {step: value for step, value in ratio.items() if value is not None}
    if not ratios:
        return ""
    worst = max(ratios, key=ratios.__getitem__)
    middle = "".join(
        f"{median(value for step in ratios if (value := rows[step][place]) is not None):>9.4f}"
        for rows in (veto.noise, veto.change)
    )
    share = sum(value > 1 for value in ratios.values()) / len(ratios)
    return f"{middle}{median(ratios.values()):>9.2f}{ratios[worst]:>9.2f}{worst:>9}{share:>9.0%}"


def print_trial(trial: Trial) -> None:
    """Print a candidate of `ditc tune` as it comes, on stderr."""
    from ditc.quality.trials import described

    click.echo(f"{trial.stage}: {described(trial)}{', within the budget' if trial.within else ''}", err=True)


def print_tuning(tuning: Tuning) -> None:
    """Print the front, fastest first, with a star at what was chosen, and what it is held against."""
    from ditc.quality.trials import settings_text

    rows = []
    for trial in tuning.front:
        mark = " *" if trial.changes == tuning.chosen.changes else ""
        worse = "" if trial.worse_by is None else f"{trial.worse_by:+.3f} to {trial.worse_high:+.3f}"
        settings = settings_text(trial.changes)
        within = "yes" if trial.within else "no"
        rows.append((settings + mark, f"{trial.seconds * 1e3:.2f}", f"{trial.psnr_db:.1f}", worse, within))
    print_table(("none is faster and better", "ms per image", "PSNR dB", "worse by, up to", "in budget"), rows)
    click.echo(f"{len(tuning.trials)} candidates, {tuning.images:,} images of seeds {list(tuning.seeds)} each")
    if (anchor := tuning.anchor) is not None:
        solver = ", ".join((anchor.sampler or "the model's own sampler", *filter(None, [anchor.spacing])))
        click.echo(
            f"held against FP of {solver}, {anchor.steps} steps: Frechet distance {anchor.frechet_distance:.3f}, "
            f"recall {anchor.recall:.3f}"
        )
    for note in tuning.notes:
        click.echo(note)
