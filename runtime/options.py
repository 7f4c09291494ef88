"""The settings of running a bundle: where, and what for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from ditc.choices import GraphScope, Target
from ditc.errors import InputError
from ditc.settings import Option, Settings

if TYPE_CHECKING:
    from ditc.runtime.pipeline import Pipeline

__all__ = ["HERE", "PLACE", "STRENGTH", "Place", "RunOptions", "VerifyOptions"]

PLACE = "Where it runs"  # the heading of these options
STRENGTH = 0.8  # of a request that begins with a picture, as diffusers has it


class Place(Settings):
    """Where and how a bundle runs: target, folder of engines, how much one CUDA graph holds; and on a processor how
    many threads an engine call has and how many images walk together.
    """

    target: Annotated[Target | None, Option("Where to run; default is the one it was compiled for.", group=PLACE)] = (
        None
    )
    engines: Annotated[Path | None, Option("Folder of built engines; default is the bundle's own.", group=PLACE)] = None
    graphs: Annotated[GraphScope, Option("How much one CUDA graph holds.", group=PLACE)] = "trajectory"
    threads: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Threads of one engine call on a CPU; default every core that the process may use.",
            group=PLACE,
            advice="leave it out for every core",
        ),
    ] = None
    batch: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Images that walk together on a CPU; default what fits a buffer of 256 MiB.",
            group=PLACE,
            advice="leave it out for what fits a small buffer",
        ),
    ] = None

    def load(self, bundle: Path, *, reference: bool = False, compensation: bool = True) -> Pipeline:
        """Open a bundle here; see `runtime.pipeline.load`."""
        from ditc.runtime.pipeline import load

        return load(bundle, reference=reference, compensation=compensation, **self.__dict__)


HERE = Place()


class RunOptions(Settings):
    """The settings of `ditc run`: an image for each of `labels`, or of the texts in `prompt` or the file `prompts`.

    They draw their noise from `seed`. `images` says how many are made of each text. A model of other conditions takes
    them from a file; without one, and without classes, `images` are made of the bundle's own examples.
    `begin_with` is a file of what the images begin with in place of noise alone; `strength` is then the share of the
    steps that are run, STRENGTH where it is None.
    """

    labels: Annotated[tuple[int, ...] | None, Option("Classes, one image each: 207,360.")] = None
    prompt: Annotated[
        tuple[str, ...],
        Option("A prompt, of a bundle that takes any; may be given several times.", metavar="TEXT", several=True),
    ] = ()
    prompts: Annotated[Path | None, Option("A file of prompts, one a line, in UTF-8.", metavar="FILE")] = None
    negative: Annotated[
        str | None, Option("A text that guidance leads away from; default is the empty one.", metavar="TEXT")
    ] = None
    conditions: Annotated[
        Path | None,
        Option("Conditions other than a class, an .npz file with an array of a row for each image.", metavar="FILE"),
    ] = None
    images: Annotated[
        int | None,
        Field(ge=1),
        Option("Images of each prompt; without any, of the bundle's own examples where it has no classes.", short="-n"),
    ] = None
    seed: Annotated[int, Field(ge=0), Option("Seed of the noise.", advice="set --seed 0 or more")] = 0
    begin_with: Annotated[
        Path | None,
        Option(
            "Picture or latents (.npy, .npz) to begin with in place of noise: image to image.",
            flag="--from",
            metavar="FILE",
        ),
    ] = None
    strength: Annotated[
        float | None,
        Field(gt=0, le=1),
        Option(f"Share of the steps that are run on --from, to the nearest that may be; default {STRENGTH:g}."),
    ] = None

    @model_validator(mode="after")
    def _strength_of_something(self) -> RunOptions:
        if self.strength is not None and self.begin_with is None:
            raise InputError(f"--strength {self.strength:g} is of a picture to begin with; name it with --from FILE")
        return self

    @model_validator(mode="after")
    def _names_prompts_once(self) -> RunOptions:
        if self.prompt and self.prompts is not None:
            raise InputError("--prompt and --prompts both name prompts; leave out one of the two")
        return self


class VerifyOptions(Settings):
    """The settings of `ditc verify`: how many images are compared, and the mean PSNR in dB that they have to reach."""

    images: Annotated[int, Field(ge=1), Option("Images to compare.")] = 8
    seed: Annotated[int, Field(ge=0), Option("Seed of the noise.", advice="set --seed 0 or more")] = 1
    min_psnr: Annotated[
        float | None, Field(allow_inf_nan=False), Option("Fail (exit code 1) below this mean PSNR in dB.")
    ] = None
