"""A model as both sides know it: its shapes, its branches and the diffusion process it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StrictFloat,
    StrictInt,
    model_serializer,
    model_validator,
)

from ditc.choices import BetaSchedule, ProcessPrediction, SamplerName, Sigmas, Spacing, Variance
from ditc.errors import InputError
from ditc.loras import MergedLora
from ditc.records import PartialRecord, Record, Skipped
from ditc.streams import IMAGE, BranchStreams, Wiring

__all__ = [
    "FORMULAS",
    "GIVEN_NULL",
    "LABEL",
    "NO_CONDITION",
    "OWN_SCHEDULER",
    "Condition",
    "DiffusionSpec",
    "ModelSpec",
    "PartialRecord",
    "Record",
    "SamplerSpec",
    "SchedulerSpec",
    "Skipped",
]

FORMULAS = ("ddim", "ddpm")  # samplers that need no scheduler to be read off
OWN_SCHEDULER = "scheduler"  # the name of a sampler that is the scheduler which a model brings
PICTURE = ("height", "width")  # the axes of a picture, after its channels
PIXEL_CHANNELS = (1, 3)  # grey or RGB


class DiffusionSpec(Record):
    """The noise process a model was trained on, and what its output means.

    `prediction` is the meaning of the first `in_channels` output channels. With `learned_sigma` as many channels
    follow that interpolate the log variance between its two bounds (Improved DDPM, arXiv 2102.09672, eq. 15). A "flow"
    is noise minus sample, x = (1 - sigma) x0 + sigma e at timestep sigma * train_steps: it has no betas.
    """

    train_steps: int = Field(default=1000, ge=2)
    beta_schedule: BetaSchedule = "linear"
    beta_start: float = Field(default=1e-4, gt=0)
    beta_end: float = Field(default=2e-2, lt=1)
    prediction: ProcessPrediction = "epsilon"
    learned_sigma: bool = True

    @model_validator(mode="after")
    def _betas_grow(self) -> DiffusionSpec:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start:g} lies above beta_end {self.beta_end:g}")
        return self


class SchedulerSpec(Record):
    """A scheduler of diffusers: its class, and what of its configuration is neither its default nor said elsewhere.

    Process, prediction and timestep spacing are said in the specs beside it.
    """

    kind: str = Field(pattern=r"^[A-Z]\w*Scheduler$")
    config: dict[str, JsonValue] = {}

    @property
    def told(self) -> str:
        """The class and its settings as a call: EulerDiscreteScheduler(use_karras_sigmas=True)."""
        return f"{self.kind}({', '.join(f'{key}={value}' for key, value in self.config.items())})"


class SamplerSpec(PartialRecord):
    """The sampler that walks a trajectory.

    `spacing` picks the timesteps: "linspace" spreads them over both ends (the original DiT's respacing), "leading"
    takes multiples from 0 (+ `offset`), "trailing" from the last down. `variance` is DDPM's: "learned" interpolates
    between its bounds with the network's second half, "fixed-small" is the posterior's, "fixed-large" is beta.
    `eta` scales DDIM's noise. `final_alpha_one` steps to a clean sample at the end, else to the first alpha.
    `clip` bounds the predicted clean sample to [-clip, clip]. Any other sampler is read off a scheduler of diffusers
    and takes `spacing` and `offset` alone: that of its name, or with the name "scheduler" the one in `scheduler`, where
    the other fields are for who chooses another sampler in its place. `sigmas` spreads its noise levels by another rule
    than its own, `shift` moves those of a flow to the noisy end.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"scheduler", "sigmas", "shift"})

    name: SamplerName | Literal["scheduler"] = "ddim"
    spacing: Spacing = "linspace"
    offset: int = Field(default=0, ge=0)
    variance: Variance = "fixed-small"
    eta: float = Field(default=0.0, ge=0, le=1)
    final_alpha_one: bool = True
    clip: float | None = Field(default=None, gt=0)
    scheduler: SchedulerSpec | None = None
    sigmas: Sigmas | None = None
    shift: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _scheduler_is_named(self) -> SamplerSpec:
        if (self.name == OWN_SCHEDULER) != (self.scheduler is not None):
            raise ValueError(
                f"the sampler is {self.name!r} and names {self.scheduler.told if self.scheduler else 'no scheduler'}"
            )
        return self

    @property
    def is_read_off(self) -> bool:
        """Is the sampler a scheduler of diffusers, rather than one of the formulas here?"""
        return self.name not in FORMULAS

    @property
    def told(self) -> str:
        """The sampler as messages name it: the option that chooses it, or the class of the model's own scheduler."""
        return f"--sampler {self.name}" if self.scheduler is None else self.scheduler.kind


class Condition(Record):
    """A named input of a request beside the sample and its timestep: an array of `shape` for each image.

    It holds numbers of `dtype`: integers of 0 to `classes` - 1, or floats. `null` is what the unconditional half of
    guidance gets in its place: a number, for every place of the array (an integer may be one past the classes); "same",
    what the image itself gets; "given", an array that comes with the request (`null_name`), such as a negative text.
    A condition that is `fresh` comes with no request: it is unit normal noise of the image's own at every step.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    dtype: Literal["int64", "float32"] = "float32"
    shape: tuple[Annotated[int, Field(ge=1)], ...] = ()
    classes: int | None = Field(default=None, ge=1)
    null: StrictInt | StrictFloat | Literal["same", "given"] = "same"
    fresh: bool = False

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Condition:
        if self.name in RESERVED or self.name.startswith(GIVEN_NULL):
            raise ValueError(f"a condition can't be called {self.name!r}: segments and requests use that name")
        if (self.classes is None) == (self.dtype == "int64"):
            raise ValueError(f"condition {self.name}: integers have `classes`, and floats have none")
        if self.fresh and (self.classes is not None or self.null != "same"):
            raise ValueError(f"condition {self.name} is fresh noise: floats, without a null")
        if isinstance(self.null, (int, float)) and not self._may_hold(self.null):
            raise ValueError(f"condition {self.name}: the null {self.null} is no {self.dtype} that it may hold")
        return self

    def _may_hold(self, null: float) -> bool:
        if self.classes is None:
            return math.isfinite(null)
        return isinstance(null, int) and 0 <= null <= self.classes

    @property
    def null_name(self) -> str | None:
        """The name under which a request gives what the unconditional half gets, None where nobody gives that."""
        return f"{GIVEN_NULL}{self.name}" if self.null == "given" else None


LABEL = "y"  # the condition that is a class
RESERVED = {LABEL, "t", "x", "out", "rows", "latent", "image", "scales", "midpoints", "labels", "seeds", "noise"}
GIVEN_NULL = "null_"  # in front of a condition's name: what the unconditional half gets of it, as a request gives that


def _label(classes: int, null: int | None) -> Condition:
    return Condition.model_construct(
        name=LABEL, dtype="int64", shape=(), classes=classes, null="same" if null is None else null, fresh=False
    )


# what `condition` takes of a model without any: a zero for each row, which says no more than how many there are
NO_CONDITION = Condition.model_construct(name="rows", dtype="int64", shape=(), classes=1, null="same", fresh=False)


class ModelSpec(Record):
    """A diffusion transformer as the schedule, the samplers and the executor see it.

    A sample, or latent, is (in_channels, *space): (height, width) of a picture, (frames, height, width) of a video, ()
    of a vector. For a picture `height` and `width` may be given in place of `space`, and are what is written as JSON.
    `branches` are the residual sub-layers in the order they run; each caches a tensor of `branch_shape` (without the
    batch axis), the shape of the stream that the head reads. `streams` has those branches that read or write another
    stream or give several outputs, None where there are none. A model of classes states how many, `num_classes`, and
    with `null_label` the one of unconditional guidance, None without it; that is the condition "y". `conditions` are
    all others, in the order in which the model takes them. `cfg_channels` says to how many of the latent channels
    guidance applies: 3 in the original DiT release, all in diffusers.
    `assumptions` are facts that neither the weights nor what lies beside them state, `doubts` what a look at the
    model's output speaks against; each is a line for people. `loras` are those that were merged into its weights.
    """

    name: str
    family: str
    in_channels: int = Field(ge=1)
    space: tuple[Annotated[int, Field(ge=1)], ...]
    num_classes: int | None = Field(default=None, ge=1)
    null_label: int | None = None
    conditions: tuple[Condition, ...] = ()
    cfg_channels: int = Field(ge=1)
    branches: tuple[str, ...]
    branch_shape: tuple[int, ...]
    streams: dict[str, BranchStreams] | None = Field(default=None, min_length=1)
    parameters: int = Field(ge=0)
    diffusion: DiffusionSpec = DiffusionSpec()
    sampler: SamplerSpec = SamplerSpec()
    latent_scale: float | None = Field(
        default=None, description="decode(latent / latent_scale + latent_shift); None: no decoder"
    )
    latent_shift: float = 0.0
    assumptions: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    loras: tuple[MergedLora, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _space_of_a_picture(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "space" in given or not given.keys() & {*PICTURE}:
            return given
        sides = tuple(given[side] for side in PICTURE if side in given)
        if len(sides) != len(PICTURE):
            raise ValueError(f"a picture has a height and a width, found only {', '.join(given.keys() & {*PICTURE})}")
        return {name: value for name, value in given.items() if name not in PICTURE} | {"space": sides}

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for name, value in handler(self).items():
            picture = name == "space" and len(value) == len(PICTURE)
            if value or name not in ("conditions", "streams", "loras"):  # most have a class, one stream and no LoRA
                written |= dict(zip(PICTURE, value, strict=True)) if picture else {name: value}
        return written

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> ModelSpec:
        """Return a copy with other values, of a picture its `height` and `width` too."""
        given = dict(update or {})
        if given.keys() & {*PICTURE}:
            own = dict(zip(PICTURE, self.space, strict=False)) if len(self.space) == len(PICTURE) else {}
            given["space"] = tuple(given.pop(side) if side in given else own[side] for side in PICTURE)
        return super().model_copy(update=given, deep=deep)

    @property
    def height(self) -> int:
        """Rows of a picture."""
        return self.space[-2]

    @property
    def width(self) -> int:
        """Columns of a picture."""
        return self.space[-1]

    @property
    def notes(self) -> list[str]:
        """A line for each assumption, for each LoRA that was merged, and for each doubt."""
        return [
            *(f"assumed: {line}" for line in self.assumptions),
            *(f"merged: {lora.told}" for lora in self.loras),
            *(f"warning: {line}" for line in self.doubts),
        ]

    @model_validator(mode="after")
    def _channels_fit(self) -> ModelSpec:
        if self.cfg_channels > self.in_channels:
            raise ValueError(f"cfg_channels is {self.cfg_channels}, the model has only {self.in_channels} channels")
        return self

    @model_validator(mode="after")
    def _conditions_have_names_of_their_own(self) -> ModelSpec:
        names = [condition.name for condition in self.conditions]
        if len(set(names)) < len(names):
            raise ValueError(f"two conditions have the same name: {', '.join(names)}")
        if self.num_classes is None and self.null_label is not None:
            raise ValueError(f"null_label is {self.null_label}, and the model has no classes: state num_classes")
        return self

    @property
    def inputs(self) -> tuple[Condition, ...]:
        """Every condition, in the order in which the model takes them: its class first, where it has classes."""
        label = () if self.num_classes is None else (_label(self.num_classes, self.null_label),)
        return *label, *self.conditions

    @property
    def network_inputs(self) -> tuple[Condition, ...]:
        """The same, as the segment `condition` takes them: NO_CONDITION where there is none."""
        return self.inputs or (NO_CONDITION,)

    @property
    def can_be_guided(self) -> bool:
        """Is there a condition with a null, so that guidance has an unconditional half?"""
        return any(condition.null != "same" for condition in self.inputs)

    @model_validator(mode="after")
    def _streams_fit(self) -> ModelSpec:
        for contradiction in self.wiring.contradictions():
            raise ValueError(contradiction)
        return self

    @property
    def wiring(self) -> Wiring:
        """The streams between the branches."""
        return Wiring(self.branches, self.streams or {})

    def shape_of(self, value: str) -> tuple[int, ...]:
        """Return the shape of a cached value, of a branch or a sum, without the batch axis."""
        return self.wiring.shapes.get(value, self.branch_shape)

    @property
    def cached_numbers(self) -> int:
        """Numbers in the outputs of all branches for one network row."""
        return sum(prod(output.shape or self.branch_shape) for output in self.wiring.values.values())

    @property
    def stream_numbers(self) -> int:
        """Numbers in all streams together for one network row, of each as many as in the largest output to it."""
        sizes = {IMAGE: prod(self.branch_shape)}
        for output in self.wiring.values.values():
            sizes[output.stream] = max(sizes.get(output.stream, 0), prod(output.shape or self.branch_shape))
        return sum(sizes.values())

    @property
    def out_channels(self) -> int:
        """Channels that the network returns: twice the input's where it learns the variance."""
        return self.in_channels * (2 if self.diffusion.learned_sigma else 1)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, *space) of one sample."""
        return self.in_channels, *self.space

    @property
    def prediction_shape(self) -> tuple[int, ...]:
        """(channels, *space) of what the network returns for one sample."""
        return self.out_channels, *self.space

    @property
    def is_picture(self) -> bool:
        """Is a sample itself a picture, grey or RGB?"""
        return len(self.space) == len(PICTURE) and self.in_channels in PIXEL_CHANNELS

    def labels_in_turn(self, first: int, count: int) -> list[int]:
        """Return the classes of images `first` to `first + count`, where the classes take turns; 0 without classes."""
        return [number % (self.num_classes or 1) for number in range(first, first + count)]

    def check_labels(self, labels: tuple[int, ...]) -> None:
        """Raise InputError unless every label is a class of this model."""
        if self.num_classes is None:
            raise InputError(f"{self.name} has no classes, found the labels {list(labels)}; leave them out")
        if not labels:
            raise InputError("no labels given; name at least one class, for example --labels 0,1,2")
        wrong = [label for label in labels if not 0 <= label < self.num_classes]
        if wrong:
            raise InputError(
                f"label {wrong[0]} is not a class of {self.name}: expected 0 to {self.num_classes - 1}, found {wrong}"
            )
