"""The driver: runs the stages in order, resumes where an earlier compile stopped, and seals the bundle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import ditc
from ditc.approximators import APPROXIMATORS
from ditc.bundle import Bundle, open_bundle, read_tables
from ditc.compiler.device_forms import lower_for_devices
from ditc.compiler.examples import conditions_of
from ditc.compiler.exporting import behaviour_digest, export, model_digest
from ditc.compiler.fitting import approximate, fit
from ditc.compiler.learning import LEARNED_ON, close_loop, learn, learned_plan, learns, sums_to_watch, watch_sums
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan, plan_to_watch
from ditc.compiler.pooling import select
from ditc.compiler.quantizing import quantize
from ditc.compiler.rotating import check_rotatable, rotate_segments
from ditc.compiler.sealing import seal
from ditc.compiler.smoothing import smooth, smoothed_plan
from ditc.compiler.teaching import TAUGHT, Teacher, check_teachable, needs_teacher, teach
from ditc.compiler.text import NO_TEXT, Text, export_text
from ditc.compiler.verifying import verify
from ditc.compiler.watching import STATISTICS, WATCH_IMAGES, watch
from ditc.compiler.work import WorkFolder, replaced, shared, work_folder
from ditc.errors import DoubtWarning, InputError
from ditc.exporter.model_facts import ModelFacts
from ditc.files import digest_of, sha256_of
from ditc.folders import FOLDERS
from ditc.host_memory import release_weights, return_free_memory
from ditc.loras import Lora, loras_from
from ditc.machine import package_versions
from ditc.policies import Watching
from ditc.program import FULL, Program
from ditc.progress import Progress, silent
from ditc.requests import Examples, read_conditions
from ditc.spec import ModelSpec
from ditc.step_statistics import StepStatistics
from ditc.text_spec import TEXT

__all__ = ["check_places", "compile_model", "model_spec"]

# settings that decide which points calibrate
SELECT_SETTINGS = {
    *("select", "points", "clusters", "pool_images", "pool_steps"),
    *("tap_alpha", "tap_tau", "tap_subsamples", "tap_share", "time_groups"),
}


def compile_model(
    model: Any,
    out: str | PathLike[str],
    options: CompileOptions | None = None,
    *,
    progress: Progress = silent,
    force: bool = False,
    num_heads: int | None = None,
    vae: str | PathLike[str] | None = None,
    conditions: str | PathLike[str] | Mapping[str, Any] | None = None,
    prompts: str | PathLike[str] | Sequence[str] | None = None,
    text: bool = True,
    facts: ModelFacts | None = None,
    loras: Iterable[str | PathLike[str] | Lora] = (),
    exports: str | PathLike[str] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Bundle:
    """Compile a model into the bundle `out`, and return it opened.

    `model` is a name as the command line takes it ("digits", a checkpoint, a diffusers folder, "random:SIZE",
    "module:function"), or an object that fits `ditc.exporter.protocol.TrajectoryModel`. A model loaded from a name is
    released after the export, and loaded once more where a setting needs gradients. An interrupted compile resumes
    after its last whole stage. `vae` is a local `AutoencoderKL` folder for a checkpoint that comes without one.
    `loras` are merged into the weights before anything else: names as the command line takes them ("FILE:WEIGHT"), or
    `ditc.Lora(path, weight)`. `exports` is a folder in which the exported FP segments, and the statistics that a policy
    looks at, stay for later compiles of the same model with other settings; of a small model they take most of the
    time. Raises InputError for settings or a model that make no sense, and CheckError where a result fails its check;
    `out` is then as it was.

    `conditions` are those of typical images, of a model that has others than a class: arrays by name, or an .npz file.
    Where a model has text encoders, the bundle takes prompts, unless `text` is False, and the conditions that those
    give come from `prompts`: a file with one a line, or a list; the shipped ones unless given.
    `num_heads` and `facts` state what a checkpoint leaves open. What is assumed instead stands in the bundle
    (`manifest.model.assumptions`), as do doubts about it; `on_note` takes a line about each before the work begins.
    Without it doubts are Python warnings (`DoubtWarning`).
    """
    options = options or CompileOptions()
    target, shared_exports = Path(out).absolute(), None if exports is None else Path(exports).absolute()
    check_places(target, shared_exports, force=force)
    named_loras = loras_from(loras)
    opened = _opened(model, num_heads, vae, facts, named_loras)
    given = read_conditions(Path(conditions)) if isinstance(conditions, (str, PathLike)) else conditions
    own_text, examples = conditions_of(opened, given, prompts, wanted=text, progress=progress)
    _tell(examples.spec, on_note)
    to_watch = plan_to_watch(opened, options, progress, examples)
    plan = make_plan(opened, options, progress, examples=examples) if to_watch is None else to_watch[0]
    is_ours = opened is not model
    teacher = Teacher(
        open=lambda: _opened(model, num_heads, vae, facts, named_loras) if is_ours else model,
        digest=model_digest(opened),
        is_ours=is_ours,
    )
    with work_folder(target) as work:
        compile_ = _Compile(plan, work, _decided(opened, examples, teacher.digest), own_text)
        compile_.export_text(shared_exports)
        if is_ours:
            own_text.release()
        if to_watch is not None:
            statistics = compile_.watch(opened, to_watch[1], shared_exports)
            compile_.plan = make_plan(opened, options, progress, statistics, examples)
        compile_.learn(opened, shared_exports)
        compile_.tables |= compile_.plan.reuse_tables
        segments = compile_.export(opened, shared_exports)
        check_rotatable(compile_.plan, segments[FULL])
        if needs_teacher(compile_.plan.options):
            check_teachable(opened, segments[FULL])
        if is_ours:
            release_weights(opened)  # the teacher loads it once more, where anything after the export needs it
        _run_stages(compile_, segments, teacher, target)
        work.remove()
    return open_bundle(target)


def model_spec(
    model: Any,
    *,
    num_heads: int | None = None,
    vae: str | PathLike[str] | None = None,
    facts: ModelFacts | None = None,
    loras: Iterable[str | PathLike[str] | Lora] = (),
) -> ModelSpec:
    """Return what a model states of itself, as `compile_model` reads it; nothing is compiled."""
    opened = _opened(model, num_heads, vae, facts, loras_from(loras))
    spec: ModelSpec = opened.spec
    if opened is not model:
        release_weights(opened)
    return spec


def check_places(target: Path, exports: Path | None, *, force: bool) -> None:
    """Raise InputError where a bundle can't be written, or exports can't be kept."""
    if target.exists() and not force:
        raise InputError(f"{target} exists already; remove it, choose another output folder, or add --force")
    if target.exists() and not (target / "manifest.json").is_file():
        raise InputError(f"{target} exists and is not a bundle, so --force does not replace it; choose another folder")
    if exports is not None and exports.resolve().is_relative_to(target.resolve()):
        raise InputError(
            f"--exports {exports} lies in the bundle {target}, which is written whole; choose a folder beside it"
        )


def _opened(
    model: Any,
    num_heads: int | None,
    vae: str | PathLike[str] | None,
    facts: ModelFacts | None,
    loras: tuple[Lora, ...],
) -> Any:
    """Load a model from a name; hold a model object, which states itself what it is, to the protocol."""
    if isinstance(model, (str, PathLike)):
        from ditc.exporter.models import load_model

        folder = None if vae is None else Path(vae)
        return load_model(str(model), num_heads=num_heads, vae=folder, facts=facts, loras=loras)
    from ditc.exporter.protocol import check_decomposition

    if loras:
        raise InputError(
            "loras are merged into a model that is named; into an object merge them before, with "
            "ditc.exporter.loras.with_loras(model, loras)"
        )
    stated = {"num_heads": num_heads, "vae": vae, "facts": facts}
    useless = [name for name, value in stated.items() if value is not None]
    if useless:
        raise InputError(
            f"{' and '.join(useless)} would change nothing: a model object states its heads, facts and decoder itself"
        )
    check_decomposition(model)
    return model.eval()


def _tell(spec: ModelSpec, on_note: Callable[[str], None] | None) -> None:
    """Say what was assumed when a model was read, and what speaks against it."""
    if on_note is None:
        for line in spec.doubts:
            warnings.warn(f"{spec.name}: {line}", DoubtWarning, stacklevel=3)
        return
    for note in spec.notes:
        on_note(note)


@dataclass
class _Compile:
    """The stages of one compile in order; `key` grows with every setting that decides what comes after."""

    plan: Plan
    work: WorkFolder
    key: str
    text: Text = NO_TEXT
    folders: dict[str, Path] = field(default_factory=dict)
    tables: dict[str, NDArray[Any]] = field(default_factory=dict)  # of the bundle, beside the sampler's

    def stage(self, name: str, settings: list[Any], make: Callable[[Path], None]) -> Path:
        """Run a stage, unless an earlier run left it, and return its folder."""
        self.key = digest_of([self.key, name, settings])
        folder, resumed = self.work.stage(name, self.key, make)
        return_free_memory()
        self.plan.progress(f"{name} (kept from an earlier run)" if resumed else name, 1, 1)
        self.folders[name] = folder
        return folder

    def _shared_stage(self, name: str, settings: list[Any], make: Callable[[Path], None], exports: Path | None) -> Path:
        """Run a stage as `stage` does, or take what an earlier compile left of it in `exports`."""
        key = digest_of([self.key, settings])
        return self.stage(name, settings, make if exports is None else shared(exports / f"{name}-{key}", make))

    @property
    def run_settings(self) -> list[Any]:
        """The settings that decide a trajectory beside the segments."""
        columns = {name: column.tolist() for name, column in self.plan.columns.items()}
        return [digest_of(columns), self.plan.program.model_dump(), self.plan.options.cfg, self.plan.options.seed]

    def watch(self, model: Any, wanted: Watching, exports: Path | None) -> StepStatistics:
        """Return the statistics that the policy asks for; those of `exports` are taken where it has them.

        What comes after hangs on the schedule that they make, not on them: it may be that of another policy.
        """
        plan, key = self.plan, self.key

        def make(folder: Path) -> None:
            watch(plan, model, wanted, folder)

        folder = self._shared_stage("watch", self._watch_settings(wanted), make, exports)
        self.key = key
        return StepStatistics.load(folder / STATISTICS)

    def _watch_settings(self, wanted: Watching) -> list[Any]:
        """Return the settings that decide what is watched."""
        columns, options = {name: column.tolist() for name, column in self.plan.columns.items()}, self.plan.options
        return [digest_of(columns), options.cfg, options.seed, options.watch_images or WATCH_IMAGES, asdict(wanted)]

    def learn(self, model: Any, exports: Path | None) -> None:
        """Learn the numbers with which steps combine what they reuse, where they are learned.

        What is watched for it serves all schedules that reach as far back.
        """
        plan, key = self.plan, self.key
        if not learns(plan):
            return
        settings, folders = self._watch_settings(sums_to_watch(plan)), []
        for name, purpose in LEARNED_ON.items():
            make = partial(watch_sums, plan, model, purpose)
            self.key = key
            folders.append(self._shared_stage(name, settings, make, exports))
        folder = self.stage("learn", [self.run_settings], lambda folder: learn(plan, folders, folder))
        self.plan = learned_plan(plan, folder)

    def export_text(self, exports: Path | None) -> None:
        """Export the text encoders, where the bundle gets any; nothing that comes after hangs on them."""
        if not self.text.encoders:
            return
        text, backend, key = self.text, self.plan.backend, self.key
        self._shared_stage(TEXT, text.digests, lambda folder: export_text(text, backend, folder), exports)
        self.key = key

    def export(self, model: Any, exports: Path | None) -> Segments:
        """Return the FP segments; those of `exports` are taken where it has them."""
        plan = self.plan

        def make(folder: Path) -> None:
            export(plan, model, folder)

        folder = self._shared_stage("export", _shapes(plan.cached_program), make, exports)
        return {name: folder / f"{name}.onnx" for name in plan.cached_program.calls}

    def select(self, segments: Segments) -> Path:
        """Return the file of the calibration set."""
        plan = self.plan
        chosen = [self.run_settings, plan.options.model_dump(include=SELECT_SETTINGS)]
        return self.stage("select", chosen, lambda folder: select(plan, segments, folder)) / "calib.npz"

    def smooth(self, segments: Segments, calib: Path) -> Segments:
        """Return the FP segments, smoothed where the settings ask for it; they take each other's tables only."""
        plan, options = self.plan, self.plan.options
        if options.smooth == "none":
            return segments
        settings = [options.smooth, options.ranges, options.bits]
        smoothed = self._replaced("smooth", segments, settings, lambda folder: smooth(plan, segments, calib, folder))
        self.plan = smoothed_plan(plan, self.folders["smooth"])
        return smoothed

    def rotate(self, segments: Segments, calib: Path) -> Segments | None:
        """Return the rotated forms of the FP segments, beside those that have none; None where no setting asks."""
        plan, size = self.plan, self.plan.options.rotate
        if size is None:
            return None
        return self._replaced("rotate", segments, [size], lambda folder: rotate_segments(plan, segments, calib, folder))

    def teach(self, segments: Segments, calib: Path, teacher: Teacher) -> Path | None:
        """Return the file of ranges by gradients, None where no setting needs any."""
        plan, options = self.plan, self.plan.options
        if not needs_teacher(options):
            return None
        settings = self._scale_settings
        return self.stage("teach", settings, lambda folder: teach(plan, teacher, segments, calib, folder)) / TAUGHT

    @property
    def _scale_settings(self) -> list[Any]:
        """The settings that decide the scales of what linear layers read."""
        options = self.plan.options
        groups = [options.scales, options.time_groups]
        return [options.bits, options.ranges, *groups, options.midpoint, options.float_steps]

    def quantize(self, segments: Segments, calib: Path, taught: Path | None) -> Segments:
        """Return the INT8 segments; those without a linear layer stay."""
        plan, options = self.plan, self.plan.options
        settings = [self._scale_settings, options.correct]
        rotated = self.rotate(segments, calib)
        compiled = self._replaced(
            "quantize", segments, settings, lambda folder: quantize(plan, segments, calib, folder, taught, rotated)
        )
        self.tables |= read_tables(self.folders["quantize"] / "scales.safetensors")
        return compiled

    def _replaced(self, name: str, segments: Segments, settings: list[Any], make: Callable[[Path], None]) -> Segments:
        """Run a stage, and return the segments with those that it made beside or in place of the ones it took."""
        return replaced(segments, self.stage(name, settings, make))

    def lower(self, compiled: Segments) -> None:
        """Write what GPUs need beside the portable segments."""
        plan = self.plan
        settings = [self.run_settings, plan.options.precision, plan.options.batch]
        self.stage("lower", settings, lambda folder: lower_for_devices(plan, compiled, folder))

    def approximate(self, segments: Segments, compiled: Segments) -> None:
        """Fit the numbers with which steps combine what they reuse, where a reuse has any to fit."""
        plan, options = self.plan, self.plan.options
        closes = learns(plan) and APPROXIMATORS[options.reuse].learned == "closed"
        if APPROXIMATORS[options.reuse].fit is None and not closes:
            return
        settings, make = [self.run_settings, options.vc_images], close_loop if closes else approximate
        folder = self.stage("approximate", settings, lambda folder: make(plan, segments, compiled, self.tables, folder))
        self.tables |= read_tables(folder / "approximate.safetensors")

    def fit(self, segments: Segments, compiled: Segments) -> None:
        """Fit the compensation; a program that is the FP program itself has nothing to compensate."""
        plan, options = self.plan, self.plan.options
        if options.vc == "none" or (options.bits is None and not plan.program.slots):
            return
        settings = [self.run_settings, options.vc, options.vc_images]
        folder = self.stage("fit", settings, lambda folder: fit(plan, segments, compiled, self.tables, folder))
        self.tables |= read_tables(folder / "compensation.safetensors")

    def verify(self, segments: Segments, compiled: Segments) -> None:
        """Measure the compiled program against the FP one."""
        plan, settings = self.plan, [self.run_settings, self.plan.options.verify_images]
        self.stage("verify", settings, lambda folder: verify(plan, segments, compiled, self.tables, folder))


def _decided(model: Any, examples: Examples, weights: str) -> str:
    """Return a digest of what decides every stage: the model, by `weights` and what it computes, code and packages."""
    return digest_of(
        [
            weights,
            behaviour_digest(model),
            examples.spec.model_dump(),
            package_versions(),
            _source_digest(),
            *sorted(examples.digests.items()),
        ]
    )


def _run_stages(compile_: _Compile, segments: Segments, teacher: Teacher, target: Path) -> None:
    """Run everything after the export."""
    compiled = segments
    if compile_.plan.options.bits is not None:
        calib = compile_.select(segments)
        segments = compile_.smooth(segments, calib)
        taught = compile_.teach(segments, calib, teacher)
        compiled = compile_.quantize(segments, calib, taught)
    compile_.lower(compiled)
    compile_.approximate(segments, compiled)
    compile_.fit(segments, compiled)  # after it: compensation is of what is left
    compile_.verify(segments, compiled)
    seal(compile_.plan, segments, compiled, compile_.folders, compile_.tables, target, compile_.text)


def _source_digest() -> str:
    """Return a digest of ditc's own code: a stage that other code made is not taken up."""
    packages = [ditc, *(import_module(f"ditc.{name}") for name in FOLDERS)]
    places = [Path(package.__path__[0]) for package in packages]
    return digest_of([sha256_of(path) for place in places for path in sorted(place.glob("*.py"))])


def _shapes(program: Program) -> list[Any]:
    """Return the parts of a program that decide its segments."""
    return [part.model_dump() for part in program.segments] + list(program.epilogue)
