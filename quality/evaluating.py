"""`ditc evaluate` as a function: how good a bundle's images are, against FP on the same noise and against real ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditc.bundle import Bundle, Manifest, open_bundle
from ditc.errors import CheckError
from ditc.files import atomic_write
from ditc.machine import machine
from ditc.progress import Progress, silent
from ditc.quality.bootstrap import LEVEL, bootstrapped, estimates
from ditc.quality.distributions import (
    FeatureArray,
    Generated,
    MeasuredSet,
    RealSet,
    compare_sets,
    distribution_values,
    measure_set,
)
from ditc.quality.evaluation import (
    Bootstrap,
    Distributions,
    Drifts,
    EvaluatedBundle,
    Evaluation,
    FeaturesUsed,
    PairedMeasure,
    RealImages,
    SeedValues,
)
from ditc.quality.features import (
    Extractor,
    check_sources,
)
from ditc.quality.options import EvaluateOptions, VetoOptions
from ditc.quality.pairs import Pairs, Work, measure_pairs
from ditc.runtime.closeness import ssim_window
from ditc.runtime.options import HERE, Place
from ditc.spec import Skipped

__all__ = ["check_not_worse", "evaluate_bundle", "generated", "measured_features", "paired_measures"]

BOOTSTRAP_SEED = 0
LOWER_IS_BETTER = ("lpips",)


def evaluate_bundle(
    bundle: Path,
    options: EvaluateOptions,
    *,
    place: Place = HERE,
    save: Path | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure pairs, drifts per step, and distributions with intervals.

    `save` is a folder for the report, the features, and FP's images; those that lie there already are taken again.
    Raises BundleError for a bundle without its FP reference, CheckError where images are NaN, and InputError where the
    veto is asked of a bundle that is not quantized.
    """
    check_sources(options.features, options.real)
    if options.veto_images:
        from ditc.quality.veto import check_has_noise

        check_has_noise(open_bundle(bundle))  # before anything takes its time
    with TemporaryDirectory(prefix="ditc-evaluate-") if save is None else nullcontext(save) as folder:
        work = Work(options, place, Path(folder), progress)
        pairs = measure_pairs(bundle, work)
        evaluation = _evaluation(pairs, work)
    if options.veto_images:
        from ditc.quality.veto import veto_of

        settings = VetoOptions(images=options.veto_images, seed=options.seeds[0])
        evaluation = evaluation.model_copy(update={"veto": veto_of(bundle, settings, progress=progress)})
    if save is not None:
        _save(evaluation, pairs, save)
    return evaluation


def check_not_worse(evaluation: Evaluation, most: float) -> None:
    """Raise CheckError where the whole interval of the difference in Frechet distance lies above `most`."""
    if isinstance(evaluation.distribution, Skipped):
        raise CheckError(f"no Frechet distance was measured: {evaluation.distribution.skipped} (--fail-if-worse)")
    difference = evaluation.distribution.difference.frechet_distance
    if difference.low > most:
        raise CheckError(
            f"the Frechet distance is worse than FP's by {difference.value:.4g}, {LEVEL:.0%} interval "
            f"{difference.low:.4g} to {difference.high:.4g}, all above {most:g} (--fail-if-worse)"
        )


def _evaluation(pairs: Pairs, work: Work) -> Evaluation:
    options = work.options
    return Evaluation(
        machine=machine(),
        bundle=_evaluated(pairs.bundle.manifest),
        images=options.images,
        seeds=options.seeds,
        n=options.images * len(options.seeds),
        bootstrap=Bootstrap(rounds=options.rounds, level=LEVEL, seed=BOOTSTRAP_SEED),
        paired=paired_measures(pairs, options.rounds),
        steps=Drifts(**pairs.steps),
        distribution=_distributions(pairs, work),
    )


def _evaluated(manifest: Manifest) -> EvaluatedBundle:
    asked = manifest.asked
    return EvaluatedBundle(
        model=manifest.model.name,
        precision=manifest.precision,
        steps=len(manifest.program.steps),
        guidance=manifest.guidance,
        policy=asked.policy,
        reuse=asked.reuse,
        select=asked.select,
        ranges=asked.ranges,
        smooth=asked.smooth,
        vc=asked.vc,
        seed=asked.seed,
    )


def paired_measures(pairs: Pairs, rounds: int) -> dict[str, PairedMeasure | Skipped]:
    """Return the mean of every measure of pairs with its interval, by name."""
    values = np.stack([np.concatenate(parts) for parts in pairs.paired.values()], axis=1)  # (n, measures)
    n = len(values)
    means = bootstrapped(lambda counts: counts @ values / n, n, rounds, BOOTSTRAP_SEED)
    paired: dict[str, PairedMeasure | Skipped] = {}
    for name, row, column in zip(pairs.paired, estimates(values.mean(axis=0), means), values.T, strict=True):
        worst = column.max() if name in LOWER_IS_BETTER else column.min()
        window = ssim_window(*pairs.image_shape[-2:]) if name == "ssim" else None
        paired[name] = PairedMeasure(mean=row.value, low=row.low, high=row.high, worst=float(worst), window=window)
    if pairs.judges.no_lpips:
        paired["lpips"] = Skipped(skipped=pairs.judges.no_lpips)
    return paired


def _distributions(pairs: Pairs, work: Work) -> Distributions | Skipped:
    extractor, real, options = pairs.judges.extractor, pairs.real, work.options
    if extractor is None or real is None:
        return Skipped(skipped=pairs.judges.no_extractor)
    ours, exact = (generated(parts, extractor, pairs.bundle, options) for parts in (pairs.ours, pairs.exact))
    against = RealSet(real.features)
    comparison = compare_sets(
        measured_features("bundle", ours, against, work), measured_features("fp", exact, against, work)
    )
    return Distributions(
        features=FeaturesUsed(name=extractor.name, about=extractor.about, dimensions=comparison.dimensions),
        real=RealImages(n=comparison.real, about=real.about),
        bundle=comparison.ours,
        fp=comparison.exact,
        difference=comparison.difference,
        per_seed=tuple(
            SeedValues(
                seed=seed,
                n=options.images,
                bundle=distribution_values(ours.part(rows), against),
                fp=distribution_values(exact.part(rows), against),
            )
            for seed, rows in zip(options.seeds, _rows_of_seeds(options), strict=True)
        ),
    )


def _rows_of_seeds(options: EvaluateOptions) -> Iterator[slice]:
    for number in range(len(options.seeds)):
        yield slice(number * options.images, (number + 1) * options.images)


def generated(
    parts: Sequence[FeatureArray], extractor: Extractor, bundle: Bundle, options: EvaluateOptions
) -> Generated:
    """Return the features of all images of all seeds, and whether each shows the class that was asked for."""
    features = np.concatenate(parts)
    asked = _asked(extractor, bundle, options.images)
    if extractor.classes is None or asked is None:
        return Generated(features, None)
    return Generated(features, extractor.classes(features) == np.tile(asked, len(options.seeds)))


def _asked(extractor: Extractor, bundle: Bundle, count: int) -> NDArray[np.int64] | None:
    """Return the classes that the images of one seed are asked to show, (count,); None where nobody can tell."""
    model = bundle.manifest.model
    if extractor.asked is None:
        return None if model.num_classes is None else np.array(model.labels_in_turn(0, count))
    return extractor.asked(bundle.examples().in_turn(0, count).prompts)


def measured_features(stage: str, side: Generated, against: RealSet, work: Work) -> MeasuredSet:
    """Measure a set with its bootstrap; any two of equal settings can be compared."""

    def watch(done: int, total: int) -> None:
        work.progress(f"bootstrap-{stage}", done, total)

    return measure_set(side, against, rounds=work.options.rounds, seed=BOOTSTRAP_SEED, watch=watch)


def _save(evaluation: Evaluation, pairs: Pairs, folder: Path) -> None:
    """Write the report, the numbers of every pair, and the real features in the form that --real takes."""
    written = json.dumps(evaluation.model_dump(mode="json"), indent=1)
    atomic_write(folder / "evaluate.json", written.encode() + b"\n")
    arrays = {name: np.concatenate(parts) for name, parts in pairs.paired.items()}
    if pairs.judges.extractor is not None and pairs.real is not None:
        arrays |= {"bundle": np.concatenate(pairs.ours), "fp": np.concatenate(pairs.exact)}
        name = np.array(pairs.judges.extractor.name)
        _save_arrays(folder / "real.npz", {"features": pairs.real.features, "extractor": name})
    _save_arrays(folder / "pairs.npz", arrays)


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    data = BytesIO()
    np.savez(data, **arrays)
    atomic_write(path, data.getvalue())
