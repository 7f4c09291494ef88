"""The settings of `ditc evaluate` and `ditc tune`, and of the veto that both may ask for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from ditc.choices import Features, SamplerName, Spacing
from ditc.errors import InputError
from ditc.settings import Option, Settings

__all__ = ["LEAST_IMAGES", "SEARCHED", "Budget", "EvaluateOptions", "TuneOptions", "VetoOptions", "WorseGate"]

# of CompileOptions, by tune
SEARCHED = ("policy", "watch_images", "ranges", "scales", "smooth", "float_steps", "reuse", "vc")

LEAST_IMAGES = 4  # of a seed; fewer have no neighbourhoods of 3 (quality/manifolds.py)
LEAST_STEPS = 2  # of a trajectory
NOTHING = "none"  # on a command line: a row of names without any
SOLVERS = "Samplers and steps"  # heading in `--help`

FEATURES = Option("What images are measured by; default the model's.")
REAL = Option(
    "Real images: a folder of pictures, an .npz file, or FP images of other noise; default the model's.",
    metavar="fp|digits|emoji|PATH",
)
WorseGate = Annotated[
    float | None,
    Field(allow_inf_nan=False),
    Option("Fail (exit code 1) where the interval of the Frechet distance less FP's lies above this.", group="Gates"),
]


class EvaluateOptions(Settings):
    """The settings of `ditc evaluate`.

    `images` are made for each of `seeds`. `features` and `real` of None are the model's own (`quality/features.py`);
    "fp" as `real` is FP images of other noise. `step_images` are walked step by step; at `veto_images` of them the
    branches are looked at (`quality/veto.py`). `rounds` is of the bootstrap. `fail_if_worse` is the bound of
    `check_not_worse`. Where it or `features` is given, or `require_features`, distribution measures have to be
    possible; else they are left out with the reason.
    """

    images: Annotated[int, Field(ge=LEAST_IMAGES), Option("Images of each seed.")] = 1000
    seeds: Annotated[tuple[int, ...], Option("Seeds of the noise.")] = (0, 1, 2)
    features: Annotated[Features | None, FEATURES] = None
    real: Annotated[str | None, REAL] = None
    step_images: Annotated[int, Field(ge=1), Option("Images followed step by step.")] = 64
    veto_images: Annotated[
        int,
        Field(ge=0),
        Option(
            "Images at which quantization noise is held against the change that a reuse exploits; 0 leaves it out.",
            flag="--veto",
            metavar="IMAGES",
        ),
    ] = 0
    rounds: Annotated[int, Field(ge=2), Option("Rounds of the bootstrap.")] = 1000
    fail_if_worse: WorseGate = None
    require_features: bool = False

    @model_validator(mode="after")
    def _seeds_differ(self) -> EvaluateOptions:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"--seeds must be different numbers from 0 on, like 0,1,2; found {self.seeds}")
        return self

    @property
    def needs_features(self) -> bool:
        """Is it an error to have no features?"""
        return self.require_features or self.features is not None or self.fail_if_worse is not None


class Budget(Settings):
    """The bounds that a bundle must keep to. At least one of the first two is given.

    `worse_by` bounds the upper end of the interval of Frechet distance less FP's, and `less_recall`, beside it, how far
    the lower end of recall's may lie below FP's; `least_psnr_db` the lower end of the mean PSNR's against FP; `seconds`
    the time per image on this machine.
    """

    worse_by: Annotated[
        float | None,
        Field(allow_inf_nan=False),
        Option("Most that the Frechet distance may lie above FP's, interval and all."),
    ] = None
    least_psnr_db: Annotated[
        float | None,
        Field(allow_inf_nan=False),
        Option("Least mean PSNR against FP in dB, interval and all.", flag="--least-psnr"),
    ] = None
    seconds: Annotated[float | None, Field(gt=0), Option("Most seconds per image on this machine.")] = None
    less_recall: Annotated[
        float | None,
        Field(allow_inf_nan=False),
        Option("Beside --worse-by: most that recall may lie below FP's, interval and all."),
    ] = None

    @model_validator(mode="after")
    def _is_of_quality(self) -> Budget:
        if self.worse_by is None and self.least_psnr_db is None:
            raise InputError("a budget of quality is needed; give --worse-by DISTANCE or --least-psnr DB")
        if self.less_recall is not None and self.worse_by is None:
            raise InputError("--less-recall bounds what --worse-by measures; give --worse-by DISTANCE too")
        return self


def _row_of(given: Any) -> Any:
    """Return names with commas between as a row, "none" as an empty one; anything else as it is."""
    if not isinstance(given, str):
        return given
    return () if given == NOTHING else tuple(part.strip() for part in given.split(","))


class TuneOptions(Budget):
    """The settings of `ditc tune`: the budget, images and seeds of each evaluation, and what is tried.

    `features` and `real` are those of EvaluateOptions; `requests` is how many full batches time a candidate.
    `samplers` and `spacings` are tried beside those that the search is given, and `step_counts` beside its number of
    steps; None leaves them to the search (quality/solvers.py), and where PSNR is part of the budget none are tried: it
    tells how far images are from those of the same sampler and steps.
    """

    images: Annotated[int, Field(ge=LEAST_IMAGES), Option("Images of each seed that judge a candidate.")] = 500
    seeds: Annotated[tuple[int, ...], Option("Seeds of their noise.")] = (0,)
    features: Annotated[Features | None, FEATURES] = None
    real: Annotated[str | None, REAL] = None
    intervals: Annotated[tuple[int, ...], Option("Cache intervals to try.")] = (2, 3, 4, 5, 6, 8, 10)
    samplers: Annotated[
        tuple[SamplerName, ...] | None,
        BeforeValidator(_row_of),
        Option(
            "Samplers to try beside --sampler; default dpm++2m,unipc.",
            metavar="NAME,...|none",
            group=SOLVERS,
        ),
    ] = None
    spacings: Annotated[
        tuple[Spacing, ...] | None,
        BeforeValidator(_row_of),
        Option(
            "Spacings to try beside --spacing; default leading,trailing.",
            metavar="NAME,...|none",
            group=SOLVERS,
        ),
    ] = None
    step_counts: Annotated[
        tuple[int, ...] | None,
        Option(
            "Numbers of steps to try beside --steps; default fewer and fewer.",
            metavar="N,N,...",
            group=SOLVERS,
        ),
    ] = None
    requests: Annotated[int, Field(ge=1)] = 3

    @model_validator(mode="after")
    def _solvers_can_be_judged(self) -> TuneOptions:
        counts = self.step_counts
        if counts is not None and (not counts or min(counts) < LEAST_STEPS or len(set(counts)) < len(counts)):
            raise InputError(f"--step-counts must be different numbers from {LEAST_STEPS} on, found {counts}")
        tried = {"--samplers": self.samplers, "--spacings": self.spacings, "--step-counts": counts}
        given = [flag for flag, values in tried.items() if values]
        if given and self.least_psnr_db is not None:
            raise InputError(
                f"{' and '.join(given)} would do nothing beside --least-psnr: PSNR tells how far images are from those "
                "of the same sampler and steps; leave it out, or give --worse-by alone"
            )
        return self

    @model_validator(mode="after")
    def _can_be_searched(self) -> TuneOptions:
        if not self.intervals or min(self.intervals) < 2 or list(self.intervals) != sorted(set(self.intervals)):
            raise InputError(f"--intervals must be growing numbers from 2 on, found {self.intervals}")
        _ = self.evaluation  # what it refuses is refused before anything runs
        return self

    @property
    def is_of_distance(self) -> bool:
        """Does the distance from real images decide alone, so that unlike samplers and steps can be compared?"""
        return self.least_psnr_db is None

    @property
    def fresh_seeds(self) -> tuple[int, ...]:
        """As many seeds as `seeds` that are none of them: noise on which no candidate was chosen."""
        return tuple(max(self.seeds) + 1 + number for number in range(len(self.seeds)))

    @property
    def evaluation(self) -> EvaluateOptions:
        """The settings that evaluate a candidate."""
        return EvaluateOptions(
            images=self.images,
            seeds=self.seeds,
            features=self.features,
            real=self.real,
            step_images=1,
            rounds=200,
            require_features=self.worse_by is not None,
        )


class VetoOptions(Settings):
    """At how many images the veto is measured, and for which reuse.

    `lag` of None is the bundle's own schedule, or 1 where that reuses nothing; a number k is the reuse of the step k
    before, at every step.
    """

    images: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0)] = 0
    lag: Annotated[int | None, Field(ge=1)] = None
