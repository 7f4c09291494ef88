"""The settings of `ditc build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from ditc.choices import Calibration, Target
from ditc.errors import InputError
from ditc.settings import Option, Settings

if TYPE_CHECKING:
    from ditc.engines.store import BuildSettings

__all__ = ["BuildOptions"]

BUILDABLE: Literal["tensorrt"] = "tensorrt"
COMPATIBILITY = "Compatibility"
CACHE = "Timing cache"


class BuildOptions(Settings):
    """The settings of `ditc build`; `workspace` is in MiB. `dla` is there to be refused with the reason."""

    target: Annotated[Target, Option("What to build for.", metavar=BUILDABLE)] = BUILDABLE
    engines: Annotated[Path | None, Option("Folder for the engines; default is the bundle's own.")] = None
    optimization_level: Annotated[int, Field(ge=0, le=5), Option("How long TensorRT searches, 0 to 5.")] = 3
    workspace: Annotated[
        int, Field(ge=1), Option("MiB of scratch memory TensorRT may take.", advice="it is in MiB")
    ] = 1024
    calibration: Annotated[Calibration, Option("Scales of the bundle, or those of a calibrator of TensorRT 10.")] = (
        "explicit"
    )
    timing_cache: Annotated[
        Path | None, Option("Timing cache to use and extend; default lies by the engines.", group=CACHE)
    ] = None
    replay: Annotated[bool, Option("Build from the timing cache alone, and leave it as it is.", group=CACHE)] = False
    version_compatible: Annotated[
        bool, Option("Plans that a later TensorRT's lean runtime takes.", group=COMPATIBILITY)
    ] = False
    hardware_compatible: Annotated[
        bool, Option("Plans for every GPU from Ampere on, at some cost in speed.", group=COMPATIBILITY)
    ] = False
    dla: Annotated[
        int | None, Option("Refused: says why a diffusion transformer does not run on a DLA core.", group=COMPATIBILITY)
    ] = None

    @model_validator(mode="after")
    def _can_be_built(self) -> BuildOptions:
        if self.target != BUILDABLE:
            raise InputError(
                f"--target {self.target} needs no build: it takes the bundle as it is; run it with: ditc run"
            )
        if self.dla is not None:
            raise InputError(
                "a diffusion transformer does not run on a DLA: its LayerNorm, Softmax and matrix products of two "
                "activations have no DLA layer, and falling back to the GPU costs a copy each; leave --dla out"
            )
        return self

    @property
    def settings(self) -> BuildSettings:
        """The part that decides an engine."""
        from ditc.engines.store import BuildSettings

        return BuildSettings(
            workspace_bytes=self.workspace << 20, **self.model_dump(include=set(BuildSettings.model_fields))
        )
