"""Every setting of a compile."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from ditc.approximators import APPROXIMATORS, canonical
from ditc.calib_data.time_groups import TIME_GROUPS
from ditc.choices import (
    AUTO,
    AutoCaches,
    AutoReuse,
    Compensation,
    GradientRanges,
    Midpoint,
    PoolSteps,
    Precision,
    ProductCorrection,
    RangeMethod,
    SamplerName,
    ScaleBinding,
    Selector,
    Sigmas,
    Smoothing,
    Spacing,
    Target,
    Variance,
    names_of,
)
from ditc.errors import InputError
from ditc.policies import POLICIES, policy_forms, watching_of
from ditc.precision import INT8, PRECISIONS, Bits
from ditc.settings import Option, Settings
from ditc.spec import PartialRecord, SamplerSpec

if TYPE_CHECKING:
    from ditc.calib_data.selection import SelectionOptions

__all__ = ["AUTO", "INTEGERS", "CompileOptions"]

POOL_FACTOR = 4  # the pool holds about this many times the points that are selected from it

# headings in `--help`
SAMPLER = "Sampler"
CACHE = "Cache and what corrects it"
INTEGERS = "INT8"
CALIBRATION = "Calibration"
BUNDLE = "Bundle"


class CompileOptions(PartialRecord, Settings):
    """The settings of `ditc compile`; each default is the recommended one.

    None for a sampler setting means the model's own. `pool_images` of None records about four times the points.
    `caches` is what a computing step leaves for those that reuse: one sum for each of them, or every branch's output;
    "auto" takes sums where the model and the schedule allow it. `pool_steps` is "computed" to calibrate on steps where
    the network runs (what deployment sees), "all", the paper's form, or "uncached", all steps of the FP program that
    knows no cache, a control. `smooth` is "none" or a row of TRANSFORMS; "auto" smooths INT8. `reuse` is what a step
    that reuses takes for the branches' outputs, a row of APPROXIMATORS; "auto" extrapolates where sums are made, and
    under a sampler that adds noise few steps in a row reuse, else holds. `vc` is "none" or a row of ESTIMATORS; "auto"
    compensates what holds without such noise. `vc_images` pairs fit the compensation, and as many others the numbers of
    `reuse` where it has any to fit; `verify_images` others check the result. `float_steps` is "none", or "FIRST:LAST":
    so many steps at either end have linear layers in floating point. `correct` is None or a row of CORRECTIONS, which
    every product in integers gets. `rotate` is None, or the channels of a group, a power of two. `time_groups` of
    None are 10, or the steps where there are fewer. `watch_images` of None are those of the paper, and is no setting of
    a bundle whose policy looks at no images, unless its reuse learns from as many.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset(
        {"shift", "sigmas", "watch_images", "correct", "rotate", "time_groups"}
    )

    steps: Annotated[int, Field(ge=2), Option("Denoising steps.")] = 50
    sampler: Annotated[SamplerName | None, Option("Sampler; default is the model's own.")] = None
    spacing: Annotated[
        Spacing | None, Option("How timesteps are picked; default is the model's own.", group=SAMPLER)
    ] = None
    sigmas: Annotated[
        Sigmas | None, Option("Noise levels of a sampler that is read off; default is its own.", group=SAMPLER)
    ] = None
    shift: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False),
        Option("Shift of a flow's noise levels to the noisy end.", group=SAMPLER),
    ] = None
    variance: Annotated[Variance | None, Option("DDPM's variance; default is the model's own.", group=SAMPLER)] = None
    eta: Annotated[float | None, Field(ge=0, le=1), Option("Noise of DDIM, 0 to 1.", group=SAMPLER)] = None
    clip: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False), Option("Bound of the predicted clean sample.", group=SAMPLER)
    ] = None
    cfg: Annotated[float, Field(gt=0, lt=1000), Option("Guidance weight; 1 is none.", advice="1 means no guidance")] = (
        1.5
    )
    policy: Annotated[
        str,
        Option(f"Cache policy: {policy_forms()}, or a schedule FILE.json.", metavar="POLICY"),
    ] = "fora:3"
    caches: Annotated[
        AutoCaches,
        Option("What a computing step leaves: a sum for each step that reuses, or every branch's output.", group=CACHE),
    ] = "auto"
    reuse: Annotated[
        AutoReuse,
        BeforeValidator(canonical),
        Option(
            "What a reuse takes: the last outputs, corrected per channel, or extrapolated; auto: if it pays.",
            group=CACHE,
        ),
    ] = "auto"
    precision: Annotated[
        Precision,
        Option(
            "Arithmetic of linear layers; fp16 is for GPUs, w7a8 for CPUs without VNNI; w4a8 and w8a6 are simulated."
        ),
    ] = "w8a8"
    float_steps: Annotated[
        str,
        Option("So many of the first and last steps are not quantized.", metavar="none|FIRST:LAST", group=INTEGERS),
    ] = "none"
    select: Annotated[Selector, Option("How points are selected from the pool.", group=CALIBRATION)] = "tap"
    points: Annotated[int, Field(ge=1), Option("Calibration points.", group=CALIBRATION)] = 800
    clusters: Annotated[
        int | None, Field(ge=1), Option("Clusters of tap and kmeans; default one for 8 points.", group=CALIBRATION)
    ] = None
    tap_alpha: Annotated[float, Field(ge=0, le=1), Option("TAP: weight of looks against time.", group=CALIBRATION)] = (
        0.5
    )
    tap_tau: Annotated[
        float, Field(gt=0, allow_inf_nan=False), Option("TAP: reach of the time kernel, in steps.", group=CALIBRATION)
    ] = 1.0
    tap_subsamples: Annotated[int, Field(ge=1), Option("TAP: random sub-samples.", group=CALIBRATION)] = 3
    tap_share: Annotated[
        float, Field(gt=0, le=1), Option("TAP: size of one, as a share of the pool.", group=CALIBRATION)
    ] = 1 / 20
    pool_images: Annotated[
        int | None,
        Field(ge=1),
        Option("Images recorded for the pool; default fills 4 times the points.", flag="--pool", group=CALIBRATION),
    ] = None
    pool_steps: Annotated[
        PoolSteps,
        Option("Steps that enter the pool: computed, all, or all of a run without a cache.", group=CALIBRATION),
    ] = "computed"
    ranges: Annotated[RangeMethod, Option("How ranges are chosen.", group=INTEGERS)] = "mse"
    scales: Annotated[
        ScaleBinding,
        Option(
            "Activation scales: of all steps, of groups of them, of each, or of the tensor as it comes.", group=INTEGERS
        ),
    ] = "static"
    time_groups: Annotated[
        int | None,
        Field(ge=1),
        Option(
            f"Time groups of --scales and --select time-groups; default {TIME_GROUPS}.",
            metavar="GROUPS",
            group=INTEGERS,
        ),
    ] = None
    midpoint: Annotated[
        Midpoint,
        Option("Middle of the ranges; bounded: those after GELU begin at its least value.", group=INTEGERS),
    ] = "zero"
    smooth: Annotated[
        Smoothing,
        Option(
            "Factors per channel folded in front of linear layers, against outliers; auto: smooth for INT8.",
            group=INTEGERS,
        ),
    ] = "auto"
    rotate: Annotated[
        int | None,
        Field(ge=2, le=1 << 14),
        Option(
            "Hadamard rotation of what linear layers read, in groups of so many channels, against outliers.",
            metavar="CHANNELS",
            group=INTEGERS,
            advice="it is a power of two that divides the channels",
        ),
    ] = None
    correct: Annotated[
        ProductCorrection | None,
        Option("Correction of INT8 products per output channel: their least squares line to FP's.", group=INTEGERS),
    ] = None
    vc: Annotated[
        Compensation,
        Option("Variance compensation; auto: std where a reuse holds and the sampler adds no noise.", group=CACHE),
    ] = "auto"
    vc_images: Annotated[int, Field(ge=2), Option("Image pairs that fit compensation and reuse.", group=CACHE)] = 64
    watch_images: Annotated[
        int | None,
        Field(ge=1),
        Option("FP images that a policy, or a reuse that learns, looks at first; default 10.", group=CACHE),
    ] = None
    verify_images: Annotated[int, Field(ge=1), Option("Images that check the result.", group=BUNDLE)] = 16
    target: Annotated[Target, Option("Where the bundle runs by default.")] = "cpu"
    batch: Annotated[
        int,
        Field(ge=1),
        Option("Images that a built engine takes at once; on a CPU a request may have any number.", group=BUNDLE),
    ] = 1
    seed: Annotated[int, Field(ge=0, lt=1 << 31), Option("Seed of everything random.")] = 0
    reference: Annotated[bool, Option("Keep the FP segments for `verify`.", group=BUNDLE)] = True

    @model_validator(mode="after")
    def _says_one_thing(self) -> CompileOptions:
        """Raise InputError for settings that can't be meant together, or are for integers where there are none."""
        self.selection()
        if self.watch_images is not None:
            self._check_watches()
        bindings = (("--scales", self.scales, "static"), ("--midpoint", self.midpoint, "zero"))
        for flag, given, default in bindings:
            if given != default:
                self._check_has_integers(flag, given, default)
        if self.scales == "dynamic" and self.midpoint != "zero":
            raise InputError(
                f"--scales dynamic measures every tensor as it comes, so --midpoint {self.midpoint} has nothing to do; "
                "leave one of them out"
            )
        self._check_gradients_serve()
        self._check_products_are_corrected()
        self._check_rotates()
        self._check_groups()
        if self.smooth not in (AUTO, "none") and self.bits is None:
            raise InputError(
                f"--smooth {self.smooth} needs --precision w8a8, found {self.precision}: without INT8 there is nothing "
                "to make easier"
            )
        if self.float_ends is not None and self.bits is None:
            raise InputError(
                f"--float-steps {self.float_steps} names steps not to be quantized, and --precision {self.precision} "
                "quantizes none; leave it out, or compile with --precision w8a8"
            )
        return self

    def _check_watches(self) -> None:
        row = APPROXIMATORS.get(self.reuse)
        if watching_of(self.policy) is None and (row is None or row.learned is None):
            watching = [name for name, policy in POLICIES.items() if policy.watches is not None]
            raise InputError(
                f"--watch-images {self.watch_images} is for a policy that looks at FP images first, and --policy "
                f"{self.policy} looks at none; leave it out, or choose one of: {', '.join(watching)}"
            )

    def _check_gradients_serve(self) -> None:
        if self.ranges not in names_of(GradientRanges):
            return
        if self.bits is None:
            raise InputError(
                f"--ranges {self.ranges} is for activations in integers, and --precision {self.precision} has none; "
                "leave it out, or compile with --precision w8a8"
            )
        if self.scales == "dynamic":
            raise InputError(
                f"--scales {self.scales} measures every tensor as it comes, so the gradients of --ranges {self.ranges} "
                "have nothing to weigh; leave one of them out"
            )

    def _check_products_are_corrected(self) -> None:
        if self.correct is not None and self.bits is None:
            raise InputError(
                f"--correct {self.correct} is for products of integers, and --precision {self.precision} has none; "
                "leave it out, or compile with --precision w8a8"
            )
        if self.correct is not None and self.scales != "static":
            raise InputError(
                f"--correct {self.correct} is one line for all steps, folded into weights and biases, and --scales "
                f"{self.scales} changes from step to step what it would correct; leave one of them out"
            )

    def _check_rotates(self) -> None:
        if self.rotate is None:
            return
        if self.rotate & (self.rotate - 1):
            below = 1 << (self.rotate.bit_length() - 1)
            raise InputError(
                f"--rotate needs a power of two, found {self.rotate}: Hadamard matrices are made for those; give "
                f"{below} or {2 * below}"
            )
        if self.bits is None:
            raise InputError(
                f"--rotate {self.rotate} is for activations in integers, and --precision {self.precision} has none; "
                "leave it out, or compile with --precision w8a8"
            )
        if self.midpoint != "zero":
            raise InputError(
                f"--rotate {self.rotate} mixes channels, so nothing bounds what a layer reads, and --midpoint "
                f"{self.midpoint} would do nothing; leave one of them out"
            )
        if self.ranges in names_of(GradientRanges):
            raise InputError(
                f"--ranges {self.ranges} weighs what layers of the model read, which --rotate {self.rotate} mixes; "
                "leave one of them out"
            )

    def _check_groups(self) -> None:
        if self.time_groups is None:
            return
        if "time-groups" not in (self.scales, self.select):
            raise InputError(
                f"--time-groups {self.time_groups} is for --scales time-groups and --select time-groups, found "
                f"--scales {self.scales} and --select {self.select}; leave it out, or choose one of them"
            )
        if self.time_groups > self.steps:
            raise InputError(
                f"--time-groups {self.time_groups} are more than the {self.steps} steps; give at most that many"
            )

    def _check_has_integers(self, flag: str, given: str, default: str) -> None:
        if self.bits is None:
            raise InputError(
                f"{flag} {given} is for activations in INT8, and --precision {self.precision} has none; "
                "leave it out, or compile with --precision w8a8"
            )
        if self.bits.activations < INT8.activations:
            raise InputError(
                f"--precision {self.precision} is simulated with {flag} {default} only, found {given}; "
                "leave it out, or compile with --precision w8a8"
            )

    @property
    def bits(self) -> Bits | None:
        """Of what linear layers multiply; None for floating point."""
        return PRECISIONS[self.precision]

    @property
    def float_ends(self) -> tuple[int, int] | None:
        """The numbers of first and of last steps that are not quantized; None for none. Raises InputError."""
        if self.float_steps == "none":
            return None
        ends = re.fullmatch(r"(\d{1,4}):(\d{1,4})", self.float_steps, re.ASCII)
        first, last = (0, 0) if ends is None else (int(number) for number in ends.groups())
        if first + last == 0:
            raise InputError(
                f"--float-steps needs FIRST:LAST, found {self.float_steps!r}; write for example --float-steps 2:2 to "
                "leave the first 2 and the last 2 steps unquantized"
            )
        return first, last

    def selection(self) -> SelectionOptions:
        """Return the selector's share of the settings."""
        from ditc.calib_data.selection import SelectionOptions
        from ditc.calib_data.tap import TapSettings

        tap = TapSettings(self.tap_alpha, self.tap_tau, self.tap_subsamples, self.tap_share)
        return SelectionOptions(
            points=self.points,
            clusters=self.clusters,
            seed=self.seed,
            steps=self.steps,
            time_groups=self.group_count,
            tap=tap,
        )

    @property
    def group_count(self) -> int:
        """The time groups that the steps are cut into where something asks for them."""
        return self.time_groups or min(TIME_GROUPS, self.steps)

    def sampler_spec(self, default: SamplerSpec) -> SamplerSpec:
        """Return the model's sampler with the settings given. Raises InputError for one that does nothing for it."""
        given: dict[str, Any] = {
            "name": self.sampler,
            "spacing": self.spacing,
            "sigmas": self.sigmas,
            "shift": self.shift,
            "variance": self.variance,
            "eta": self.eta,
            "clip": self.clip,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        if "spacing" in changes and changes["spacing"] != "leading":
            changes["offset"] = 0
        own = default.model_dump(exclude={"scheduler", "sigmas"} if self.sampler else None)
        sampler = SamplerSpec.model_validate(own | changes)
        if not sampler.is_read_off:
            useless = [f"--{name}" for name in ("sigmas", "shift") if name in changes]
            if useless:
                raise InputError(
                    f"{sampler.told} has the noise levels of its timesteps, so {' and '.join(useless)} would do "
                    "nothing; leave it out, or choose a sampler that is read off, like --sampler dpm++2m"
                )
            return sampler.model_copy(update={"shift": None})
        useless = [f"--{name}" for name in ("variance", "eta", "clip") if name in changes]
        if useless:
            raise InputError(
                f"{sampler.told} has its own noise or none and clips nothing, so {' and '.join(useless)} would do "
                "nothing; leave it out"
            )
        return SamplerSpec(
            name=sampler.name,
            spacing=sampler.spacing,
            offset=sampler.offset,
            scheduler=sampler.scheduler,
            sigmas=sampler.sigmas,
            shift=sampler.shift,
        )

    def pool_size(self, recorded_steps: int) -> int:
        """Return the number of images to record for the pool."""
        return self.pool_images if self.pool_images is not None else -(-self.points * POOL_FACTOR // recorded_steps)
