"""Every setting of a compile, checked at birth."""

from __future__ import annotations

import re

from pydantic import ValidationError

from ditc.calib_data.selection import SelectionOptions, check_selector
from ditc.calib_data.tap import TapSettings
from ditc.engines.targets import TARGETS
from ditc.errors import InputError, unknown_name
from ditc.precision import INT8, PRECISIONS, Bits
from ditc.quantize.midpoints import MIDPOINTS
from ditc.quantize.ranges import RANGES
from ditc.quantize.scale_binding import BINDINGS
from ditc.quantize.transforms import TRANSFORMS
from ditc.runtime.compensation import ESTIMATORS
from ditc.schedule import APPROXIMATORS
from ditc.spec import Record, SamplerSpec

__all__ = ["AUTO", "CompileOptions"]

AUTO = "auto"  # for a setting that is decided when the model and the schedule are known

LARGEST_SEED = 1 << 31
POOL_FACTOR = 4  # the pool holds about this many times the points that are selected from it
CACHES = (AUTO, "sums", "branches")
POOL_STEPS = ("computed", "all", "uncached")
SPACINGS = ("linspace", "leading", "trailing")
VARIANCES = ("learned", "fixed-small", "fixed-large")


class CompileOptions(Record):
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
    so many steps at either end have linear layers in floating point.
    """

    steps: int = 50
    sampler: str | None = None
    spacing: str | None = None
    variance: str | None = None
    eta: float | None = None
    clip: float | None = None
    cfg: float = 1.5
    policy: str = "fora:3"
    caches: str = AUTO
    reuse: str = AUTO
    precision: str = "w8a8"
    float_steps: str = "none"
    select: str = "tap"
    points: int = 800
    clusters: int | None = None
    tap_alpha: float = 0.5
    tap_tau: float = 1.0
    tap_subsamples: int = 3
    tap_share: float = 1 / 20
    pool_images: int | None = None
    pool_steps: str = "computed"
    ranges: str = "mse"
    scales: str = "static"
    midpoint: str = "zero"
    smooth: str = AUTO
    vc: str = AUTO
    vc_images: int = 64
    verify_images: int = 16
    target: str = "cpu"
    batch: int = 1
    seed: int = 0
    reference: bool = True

    def checked(self) -> CompileOptions:
        """Self, or InputError naming the setting that makes no sense."""
        for kind, found, known in (
            ("precision", self.precision, PRECISIONS),
            ("range method", self.ranges, RANGES),
            ("scale binding", self.scales, BINDINGS),
            ("midpoint", self.midpoint, MIDPOINTS),
            ("smoothing", self.smooth, (AUTO, "none", *TRANSFORMS)),
            ("compensation", self.vc, (AUTO, "none", *ESTIMATORS)),
            ("target", self.target, TARGETS),
            ("sampler", self.sampler or "ddim", ("ddim", "ddpm")),
            ("spacing", self.spacing or "linspace", SPACINGS),
            ("variance", self.variance or "learned", VARIANCES),
            ("kind of caches", self.caches, CACHES),
            ("approximator", self.reuse, (AUTO, *APPROXIMATORS)),
            ("pool steps", self.pool_steps, POOL_STEPS),
        ):
            if found not in known:
                raise unknown_name(kind, found, known)
        check_selector(self.select)
        self.selection()
        self._check_numbers()
        self._check_precision()
        return self

    def _check_numbers(self) -> None:
        for name, number, least in (
            ("--steps", self.steps, 2),
            ("--batch", self.batch, 1),
            ("--pool", 1 if self.pool_images is None else self.pool_images, 1),
            ("--vc-images", self.vc_images, 2),
            ("--verify-images", self.verify_images, 1),
        ):
            if number < least:
                raise InputError(f"{name} must be at least {least}, found {number}")
        if not 0 < self.cfg < 1000:
            raise InputError(f"--cfg must be above 0 and below 1000, found {self.cfg:g}; 1 means no guidance")
        if not 0 <= self.seed < LARGEST_SEED:
            raise InputError(f"--seed must be 0 to {LARGEST_SEED - 1}, found {self.seed}")

    def _check_precision(self) -> None:
        """What is for integers only, and what simulated ones don't have."""
        bindings = (("--scales", self.scales, "static"), ("--midpoint", self.midpoint, "zero"))
        other = [(name, found, default) for name, found, default in bindings if found != default]
        for name, found, default in other:
            if self.bits is None:
                raise InputError(
                    f"{name} {found} is for activations in INT8, and --precision {self.precision} has none; "
                    "leave it out, or compile with --precision w8a8"
                )
            if self.bits.activations < INT8.activations:
                raise InputError(
                    f"--precision {self.precision} is simulated with {name} {default} only, found {found}; "
                    "leave it out, or compile with --precision w8a8"
                )
        if self.scales == "dynamic" and self.midpoint != "zero":
            raise InputError(
                f"--scales dynamic measures every tensor as it comes, so --midpoint {self.midpoint} has nothing to do; "
                "leave one of them out"
            )
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

    @property
    def bits(self) -> Bits | None:
        """Of what linear layers multiply; None for floating point."""
        return PRECISIONS[self.precision]

    @property
    def float_ends(self) -> tuple[int, int] | None:
        """How many of the first and of the last steps are not quantized; None for none. Raises InputError."""
        if self.float_steps == "none":
            return None
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", self.float_steps, re.ASCII)
        first, last = (0, 0) if found is None else (int(number) for number in found.groups())
        if first + last == 0:
            raise InputError(
                f"--float-steps needs FIRST:LAST, found {self.float_steps!r}; write for example --float-steps 2:2 to "
                "leave the first 2 and the last 2 steps unquantized"
            )
        return first, last

    def selection(self) -> SelectionOptions:
        """The selector's share of the settings."""
        tap = TapSettings(self.tap_alpha, self.tap_tau, self.tap_subsamples, self.tap_share)
        return SelectionOptions(points=self.points, clusters=self.clusters, seed=self.seed, tap=tap)

    def sampler_spec(self, default: SamplerSpec) -> SamplerSpec:
        """The model's sampler with the settings that were given."""
        given = {
            "name": self.sampler,
            "spacing": self.spacing,
            "variance": self.variance,
            "eta": self.eta,
            "clip": self.clip,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        if "spacing" in changes and changes["spacing"] != "leading":
            changes["offset"] = 0
        try:
            return SamplerSpec.model_validate(default.model_dump() | changes)
        except ValidationError as e:
            first = e.errors()[0]
            raise InputError(f"sampler setting {first['loc'][0]}: {first['msg']}, found {first['input']!r}") from e

    def pool_size(self, recorded_steps: int) -> int:
        """Images to record for the pool."""
        return self.pool_images if self.pool_images is not None else -(-self.points * POOL_FACTOR // recorded_steps)
