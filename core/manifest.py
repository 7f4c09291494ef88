"""The manifest: what a bundle says of itself, and the names of what lies in its folder."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from ditc.checks import Checks
from ditc.errors import BundleError
from ditc.guidance import halves_of
from ditc.program import Program
from ditc.prompt_lists import PromptOrigin
from ditc.spec import FORMULAS, OWN_SCHEDULER, ModelSpec, PartialRecord, Record, SchedulerSpec
from ditc.text_spec import TextSpec

__all__ = [
    "EXAMPLES",
    "MANIFEST",
    "PROMPTS",
    "REFERENCE",
    "SCHEMA_VERSION",
    "SEAL",
    "SEGMENTS",
    "TABLES",
    "AskedSettings",
    "FileEntry",
    "Manifest",
    "SamplerSetting",
]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
TABLES = "tables.safetensors"
EXAMPLES = "conditions.safetensors"
PROMPTS = "prompts.txt"  # of those conditions, one a line
SEGMENTS = "segments/"
REFERENCE = "reference/"


class FileEntry(Record):
    """The bytes that a file of a bundle has to have, by their hash."""

    sha256: str
    size_bytes: int


class SamplerSetting(Record):
    """The part that is read of the sampler of a compile; others of its numbers are in the tables."""

    model_config = ConfigDict(extra="ignore")

    name: str | None = None
    variance: str | None = None
    scheduler: SchedulerSpec | None = None

    @model_validator(mode="after")
    def _scheduler_is_there(self) -> SamplerSetting:
        if (self.name == OWN_SCHEDULER) != (self.scheduler is not None):
            given = "without" if self.scheduler is None else "with"
            raise ValueError(f"the sampler {self.name!r} comes {given} a scheduler")
        return self

    @property
    def is_read_off(self) -> bool:
        """Was the sampler a scheduler of diffusers?"""
        return self.name is not None and self.name not in FORMULAS

    @property
    def told(self) -> str:
        """The sampler as a sentence names it, nothing for one that is not known."""
        return (self.name or "").upper() if self.scheduler is None else self.scheduler.told


class AskedSettings(Record):
    """The settings of a compile that are read again when its bundle is opened, run or described.

    None is a setting that the bundle does not name: it came later than the ditc that compiled it.
    """

    model_config = ConfigDict(extra="ignore")

    target: str | None = None
    scales: str | None = None
    sampler: SamplerSetting | None = None
    policy: str | None = None
    reuse: str | None = None
    select: str | None = None
    points: int | None = None
    ranges: str | None = None
    smooth: str | None = None
    rotate: int | None = None
    vc: str | None = None
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_is_named_is_not_null(cls, given: Any) -> Any:
        if isinstance(given, dict) and (null := [name for name in cls.model_fields if given.get(name, "") is None]):
            raise ValueError(f"{null[0]} is null")
        return given


class Manifest(PartialRecord):
    """A bundle's account of itself and of its making: `settings` as compiled, `checks` as measured on the way.

    Both are kept as they were written: every setting of the ditc that compiled the bundle, whichever that was, in its
    order, so that nothing of an older or newer bundle is lost, renamed or given a default when it is shown or copied.
    They are read through typed views: `asked`, which is checked when a manifest is made or opened, and `measured`.
    (Typed in full here, the settings would be all of CompileOptions a second time, to the left of it, and every key
    that a later ditc adds or drops would have to be told apart from one that a bundle never had.)

    `text` are the text encoders of a bundle that takes prompts, `prompts` those that it was compiled with.
    """

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"text", "prompts"})

    schema_version: int = SCHEMA_VERSION
    ditc_version: str
    model: ModelSpec
    text: tuple[TextSpec, ...] | None = Field(default=None, min_length=1)
    prompts: PromptOrigin | None = None
    program: Program
    reference_program: Program | None = None
    precision: str
    guidance: float
    batch: int
    settings: dict[str, JsonValue] = {}
    versions: dict[str, str] = {}
    checks: dict[str, JsonValue] = {}
    files: dict[str, FileEntry] = {}

    @field_validator("settings")
    @classmethod
    def _settings_can_be_read(cls, settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            AskedSettings.model_validate(settings)
        except ValidationError as e:
            raise ValueError(_first(e)) from e
        return settings

    @property
    def asked(self) -> AskedSettings:
        """The settings asked for at the compile, as far as they are read again."""
        return AskedSettings.model_validate(self.settings)

    @property
    def target(self) -> str:
        """The target that the bundle was compiled for."""
        return "cpu" if self.asked.target is None else self.asked.target

    @property
    def scales(self) -> str:
        """The binding of the scales of activations."""
        return "static" if self.asked.scales is None else self.asked.scales

    def measured(self, *stages: str) -> Checks:
        """Return what `stages` of the compile measured, or all of them.

        Raises BundleError where one of their checks is of another form: what a bundle says of its own making decides
        nothing that runs, so it is looked at only here.
        """
        wanted = {name: check for name, check in self.checks.items() if not stages or name in stages}
        try:
            return Checks.model_validate(wanted)
        except ValidationError as e:
            raise BundleError(
                f"the `checks` in its manifest are not those of a compile ({_first(e)}); compile it again"
            ) from e

    @property
    def halves(self) -> int:
        """Network rows per image: 2 with guidance (conditional, unconditional), else 1."""
        return halves_of(self.guidance)

    def size_bytes(self, *, reference: bool) -> int:
        """Bytes of the deployed files, or of the reference files that only `verify` needs."""
        return sum(entry.size_bytes for name, entry in self.files.items() if name.startswith(REFERENCE) == reference)


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors()[0]
    said = first["msg"].removeprefix("Value error, ")  # pydantic's heading of what a validator says
    return f"{'.'.join(str(part) for part in first['loc'])}: {said}".removeprefix(": ")
