"""Options that commands share, and the texts that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ditc.errors import InputError

if TYPE_CHECKING:
    from ditc.exporter.model_facts import ModelFacts

__all__ = [
    "A_PATH",
    "ModelSettings",
    "as_json",
    "compile_options",
    "echo_note",
    "feature_options",
    "model_options",
    "place_options",
    "processor_options",
    "taken_place",
    "target_options",
    "threads_option",
    "whole_numbers",
]


class _Path(click.Path):
    """A path that is not empty: the working directory, which an empty one stands for, nobody means by it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            name = "a path" if param is None else param.get_error_hint(ctx)
            raise InputError(f"{name} is empty; name a file or folder, . for the working directory")
        return super().convert(value, param, ctx)


A_PATH = _Path(path_type=Path)

Command = TypeVar("Command", bound=Callable[..., Any])

TARGETS = "cpu|openvino|openvino-bf16|cuda|tensorrt|ort-tensorrt"

COMPILE_OPTIONS = (
    click.option("--steps", type=int, default=50, show_default=True, help="Denoising steps."),
    click.option("--sampler", metavar="ddim|ddpm", help="Sampler; default is the model's own."),
    click.option(
        "--spacing", metavar="linspace|leading|trailing", help="How timesteps are picked; default the model's."
    ),
    click.option("--variance", metavar="learned|fixed-small|fixed-large", help="DDPM's variance; default the model's."),
    click.option("--eta", type=float, help="Noise of DDIM, 0 to 1."),
    click.option("--clip", type=float, help="Bound of the predicted clean sample."),
    click.option("--cfg", type=float, default=1.5, show_default=True, help="Guidance weight; 1 is none."),
    click.option(
        "--policy",
        default="fora:3",
        show_default=True,
        help="Cache policy: none, fora:N, window:N:FIRST:LAST, or a schedule FILE.json.",
    ),
    click.option(
        "--caches",
        metavar="auto|sums|branches",
        default="auto",
        show_default=True,
        help="What a computing step leaves: a sum for each step that reuses, or every branch's output.",
    ),
    click.option(
        "--reuse",
        metavar="auto|hold|affine|variance|taylor",
        default="auto",
        show_default=True,
        help="What a reuse takes: the last outputs, corrected per channel, or extrapolated; auto: if it pays.",
    ),
    click.option(
        "--precision",
        metavar="fp32|fp16|w8a8|w7a8|w4a8|w8a6",
        default="w8a8",
        show_default=True,
        help="Arithmetic of linear layers; w7a8 is for CPUs without VNNI; 4 and 6 bits are simulated in 8.",
    ),
    click.option(
        "--float-steps",
        metavar="none|FIRST:LAST",
        default="none",
        show_default=True,
        help="So many of the first and last steps are not quantized.",
    ),
    click.option(
        "--select",
        metavar="tap|random|uniform-time|kmeans|tap-activations",
        default="tap",
        show_default=True,
        help="Selector.",
    ),
    click.option("--points", type=int, default=800, show_default=True, help="Calibration points."),
    click.option("--clusters", type=int, help="Clusters of tap and kmeans; default one for 8 points."),
    click.option("--tap-alpha", type=float, default=0.5, show_default=True, help="TAP: weight of looks against time."),
    click.option(
        "--tap-tau", type=float, default=1.0, show_default=True, help="TAP: reach of the time kernel, in steps."
    ),
    click.option("--tap-subsamples", type=int, default=3, show_default=True, help="TAP: random sub-samples."),
    click.option(
        "--tap-share", type=float, default=0.05, show_default=True, help="TAP: size of one, as a share of the pool."
    ),
    click.option(
        "--pool", "pool_images", type=int, help="Images recorded for the pool; default fills 4 times the points."
    ),
    click.option(
        "--pool-steps",
        metavar="computed|all|uncached",
        default="computed",
        show_default=True,
        help="Steps that enter the pool.",
    ),
    click.option(
        "--ranges",
        metavar="max|percentile|mse|entropy",
        default="mse",
        show_default=True,
        help="How ranges are chosen.",
    ),
    click.option(
        "--scales",
        metavar="static|per-step|dynamic",
        default="static",
        show_default=True,
        help="Activation scales: one for all steps, one for each, or of the tensor as it comes.",
    ),
    click.option(
        "--midpoint",
        metavar="zero|bounded",
        default="zero",
        show_default=True,
        help="Middle of the ranges; bounded: those after GELU begin at its least value.",
    ),
    click.option(
        "--smooth",
        metavar="auto|none|smooth|balance",
        default="auto",
        show_default=True,
        help="Factors per channel folded in front of linear layers, against outliers; auto: smooth for INT8.",
    ),
    click.option(
        "--vc",
        metavar="auto|none|std|lsq|paper",
        default="auto",
        show_default=True,
        help="Variance compensation; auto: std where a reuse holds and the sampler adds no noise.",
    ),
    click.option(
        "--vc-images", type=int, default=64, show_default=True, help="Image pairs that fit compensation and reuse."
    ),
    click.option("--verify-images", type=int, default=16, show_default=True, help="Images that check the result."),
    click.option(
        "--target", metavar=TARGETS, default="cpu", show_default=True, help="Where the bundle runs by default."
    ),
    click.option("--batch", type=int, default=1, show_default=True, help="Images that a built engine takes at once."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random."),
    click.option(
        "--reference/--no-reference", default=True, show_default=True, help="Keep the FP segments for `verify`."
    ),
)

TARGET_OPTIONS = (
    click.option("--target", metavar=TARGETS, help="Where to run; default is the one it was compiled for."),
    click.option("--engines", type=A_PATH, help="Folder of built engines; default is the bundle's own."),
)

PLACE_OPTIONS = (
    *TARGET_OPTIONS,
    click.option(
        "--graphs",
        metavar="trajectory|step|none",
        default="trajectory",
        show_default=True,
        help="How much one CUDA graph holds.",
    ),
)

THREADS_OPTION = click.option(
    "--threads", type=int, help="Threads of one engine call on a CPU; default every core that the process may use."
)

PROCESSOR_OPTIONS = (
    THREADS_OPTION,
    click.option("--batch", type=int, help="Images that walk together on a CPU; default what fits a small buffer."),
)

FEATURE_OPTIONS = (
    click.option(
        "--features", metavar="digits|pixels|inception", help="What images are measured by; default the model's."
    ),
    click.option("--real", metavar="fp|digits|PATH", help="Real images: a folder, an .npz file; default the model's."),
)

MODEL_OPTIONS = (
    click.argument("model", required=False),
    click.option(
        "--random", "random_size", metavar="SIZE", help="A released size with random weights, like dit-xl-2-256."
    ),
    click.option("--vae", type=A_PATH, help="AutoencoderKL folder whose decoder makes the images."),
    click.option("--heads", type=int, help="Attention heads, where the checkpoint's width does not tell."),
    click.option("--classes", type=int, help="Classes of a checkpoint; a row more in its label table is for none."),
    click.option("--no-null", is_flag=True, help="The checkpoint has no class for none: it was trained without."),
    click.option("--prediction", metavar="epsilon|v|sample", help="What a checkpoint predicts; noise if not given."),
    click.option(
        "--beta-schedule",
        metavar="linear|scaled-linear|squared-cosine[:START:END]",
        help="Betas that a checkpoint was trained on; the release's linear ones if not given.",
    ),
    click.option("--train-steps", type=int, help="Steps that a checkpoint was trained on; 1000 if not given."),
)


def with_all(options: Sequence[Callable[[Any], Any]]) -> Callable[[Command], Command]:
    """A decorator that gives a command these options, in their order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


compile_options = with_all(COMPILE_OPTIONS)  # the settings of a compile
target_options = with_all(TARGET_OPTIONS)  # on what a bundle runs
place_options = with_all(PLACE_OPTIONS)  # where a bundle runs
threads_option = with_all((THREADS_OPTION,))
processor_options = with_all(PROCESSOR_OPTIONS)  # how it runs on a CPU
feature_options = with_all(FEATURE_OPTIONS)  # what images are held against
model_options = with_all(MODEL_OPTIONS)  # what is compiled; `ModelSettings` reads them
as_json = click.option(
    "--json", "json_", is_flag=True, help="Print one JSON document on stdout, and nothing else there."
)


def chosen_model(model: str | None, random_size: str | None, seed: int) -> str:
    """The one model that a command line names. Raises InputError for none or two."""
    if (model is None) == (random_size is None):
        raise InputError("name one model: MODEL, or --random SIZE")
    return model or f"random:{random_size}:{seed}"


def taken_place(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a Place, taken out of a command's."""
    names = ("target", "engines", "graphs", "threads", "batch")
    return {name: settings.pop(name) for name in names if name in settings}


@dataclass(frozen=True)
class ModelSettings:
    """What the options of MODEL_OPTIONS say: the model's name, and what is stated of it."""

    name: str
    num_heads: int | None
    vae: Path | None
    facts: ModelFacts

    @classmethod
    def of(cls, settings: dict[str, Any]) -> ModelSettings:
        """Take those options out of all that a command got. Raises InputError for no model, two, or wrong facts."""
        from ditc.exporter.model_facts import ModelFacts, beta_schedule_facts

        name = chosen_model(settings.pop("model"), settings.pop("random_size"), settings["seed"])
        facts = ModelFacts(
            classes=settings.pop("classes"),
            null_class=False if settings.pop("no_null") else None,
            prediction=settings.pop("prediction"),
            train_steps=settings.pop("train_steps"),
            **beta_schedule_facts(settings.pop("beta_schedule")),
        )
        return cls(name, settings.pop("heads"), settings.pop("vae"), facts)

    @property
    def reading(self) -> dict[str, Any]:
        """The keyword arguments of `compile_model` and `tune_model` that say how the model is read."""
        return {"num_heads": self.num_heads, "vae": self.vae, "facts": self.facts}


def echo_note(note: str) -> None:
    """A line about a model on stderr, before the work begins."""
    click.echo(note, err=True)


def whole_numbers(text: str, option: str, example: str = "0,1,2") -> tuple[int, ...]:
    """ "0,1,2" to (0, 1, 2). Raises InputError that names the `option`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise InputError(f"{option} must be whole numbers with commas between, like {example}; found {text!r}") from e
