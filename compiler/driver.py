"""The driver: runs the stages in order, resumes where an earlier compile stopped, and seals the bundle."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import ditc
from ditc.bundle import TABLES, Bundle, Manifest, open_bundle, read_tables, seal_bundle, write_tables
from ditc.compiler import stages
from ditc.compiler.approximating import approximate
from ditc.compiler.fingerprinting import fingerprint
from ditc.compiler.options import CompileOptions
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.planning import make_plan
from ditc.compiler.smoothing import smooth
from ditc.compiler.work import WorkFolder, shared, work_folder
from ditc.engines.backend import lowered_path
from ditc.errors import DoubtWarning, InputError
from ditc.exporter.model_facts import ModelFacts
from ditc.exporter.onnx_files import data_path
from ditc.files import atomic_folder, digest_of, sha256_of
from ditc.folders import FOLDERS
from ditc.host_memory import release_weights, return_free_memory
from ditc.lowering.backend_forms import LOWERINGS
from ditc.machine import package_versions
from ditc.program import Program
from ditc.progress import Progress, silent
from ditc.runtime.approximation import FITS
from ditc.runtime.compensation import TableCompensation
from ditc.spec import ModelSpec
from ditc.tables import sampler_tables

__all__ = ["check_places", "compile_model"]

# settings that decide which points calibrate
SELECT_SETTINGS = {
    *("select", "points", "clusters", "pool_images", "pool_steps"),
    *("tap_alpha", "tap_tau", "tap_subsamples", "tap_share"),
}
# stage -> the JSON it leaves for the manifest's `checks`
CHECK_FILES = (
    ("export", "parity"),
    ("select", "pool"),
    ("smooth", "smooth"),
    ("quantize", "kernels"),
    ("quantize", "storage"),
    ("approximate", "approximation"),
    ("lower", "tensorrt"),
    ("lower", "footprints"),
    ("verify", "verify"),
)


def compile_model(
    model: Any,
    out: str | PathLike[str],
    options: CompileOptions | None = None,
    *,
    progress: Progress = silent,
    force: bool = False,
    num_heads: int | None = None,
    vae: str | PathLike[str] | None = None,
    facts: ModelFacts | None = None,
    exports: str | PathLike[str] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Bundle:
    """Compile a model into the bundle `out`, and return it opened.

    `model` is a name as the command line takes it ("digits", a checkpoint, a diffusers folder, "random:SIZE",
    "module:function"), or an object that fits `ditc.exporter.protocol.TrajectoryModel`. A model loaded from a name is
    released after the export. An interrupted compile resumes after its last whole stage. `vae` is a local
    `AutoencoderKL` folder for a checkpoint that comes without one. `exports` is a folder in which the exported FP
    segments stay for later compiles of the same model with other settings; of a small model they take most of the time.
    Raises InputError for settings or a model that make no sense, and CheckError where a result fails its check; `out`
    is then as it was.

    `num_heads` and `facts` state what a checkpoint leaves open. What is assumed instead stands in the bundle
    (`manifest.model.assumptions`), as do doubts about it; `on_note` takes a line about each before the work begins.
    Without it doubts are Python warnings (`DoubtWarning`).
    """
    options = options or CompileOptions()
    target, kept = Path(out).absolute(), None if exports is None else Path(exports).absolute()
    check_places(target, kept, force=force)
    opened = _opened(model, num_heads, vae, facts)
    _tell(opened.spec, on_note)
    plan = make_plan(opened, options, progress)
    with work_folder(target) as work:
        compile_ = _Compile(plan, work, _decided(plan, opened), tables={**plan.reuse_tables})
        segments = compile_.export(opened, kept)
        if opened is not model:
            release_weights(opened)  # ours, and nothing after the export needs it
        _run_stages(compile_, segments, target)
        work.remove()
    return open_bundle(target)


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


def _opened(model: Any, num_heads: int | None, vae: str | PathLike[str] | None, facts: ModelFacts | None) -> Any:
    """A loaded model from a name; a model object is held to the protocol, and states itself what it is."""
    if isinstance(model, (str, PathLike)):
        from ditc.exporter.models import load_model

        return load_model(str(model), num_heads=num_heads, vae=None if vae is None else Path(vae), facts=facts)
    from ditc.exporter.protocol import check_decomposition

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
    folders: dict[str, Path] = field(default_factory=dict)
    tables: dict[str, NDArray[Any]] = field(default_factory=dict)  # of the bundle, beside the sampler's

    def stage(self, name: str, settings: list[Any], make: Callable[[Path], None]) -> Path:
        """The folder of a stage, made now or kept from an earlier run."""
        self.key = digest_of([self.key, name, settings])
        folder, resumed = self.work.stage(name, self.key, make)
        return_free_memory()
        self.plan.progress(f"{name} (kept from an earlier run)" if resumed else name, 1, 1)
        self.folders[name] = folder
        return folder

    @property
    def run_settings(self) -> list[Any]:
        """What decides a trajectory beside the segments."""
        columns = {name: column.tolist() for name, column in self.plan.table.items()}
        return [digest_of(columns), self.plan.program.model_dump(), self.plan.options.cfg, self.plan.options.seed]

    def export(self, model: Any, exports: Path | None) -> Segments:
        plan = self.plan

        def make(folder: Path) -> None:
            stages.export(plan, model, folder)

        folder = self.stage("export", [], make if exports is None else shared(exports / f"export-{self.key}", make))
        return {name: folder / f"{name}.onnx" for name in plan.cached_program.calls}

    def select(self, segments: Segments) -> Path:
        """The calibration set."""
        plan = self.plan
        chosen = [self.run_settings, plan.options.model_dump(include=SELECT_SETTINGS)]
        return self.stage("select", chosen, lambda folder: stages.select(plan, segments, folder)) / "calib.npz"

    def smooth(self, segments: Segments, calib: Path) -> Segments:
        """The FP segments, re-parameterised where the settings ask for it; they take each other's tables only."""
        plan, options = self.plan, self.plan.options
        if options.smooth == "none":
            return segments
        settings = [options.smooth, options.ranges, options.bits]
        return self._replaced("smooth", segments, settings, lambda folder: smooth(plan, segments, calib, folder))

    def quantize(self, segments: Segments, calib: Path) -> Segments:
        """The INT8 segments; those without a linear layer stay."""
        plan, options = self.plan, self.plan.options
        settings = [options.bits, options.ranges, options.scales, options.midpoint, options.float_steps]
        made = self._replaced(
            "quantize", segments, settings, lambda folder: stages.quantize(plan, segments, calib, folder)
        )
        self.tables |= read_tables(self.folders["quantize"] / "scales.safetensors")
        return made

    def _replaced(self, name: str, segments: Segments, settings: list[Any], make: Callable[[Path], None]) -> Segments:
        """The segments, with those that a stage made beside or in place of the ones it took."""
        return stages.replaced(segments, self.stage(name, settings, make))

    def lower(self, compiled: Segments) -> None:
        """What GPUs need beside the portable segments."""
        plan = self.plan
        settings = [self.run_settings, plan.options.precision, plan.options.batch]
        self.stage("lower", settings, lambda folder: stages.lower_for_devices(plan, compiled, folder))

    def approximate(self, segments: Segments, compiled: Segments) -> None:
        """The numbers with which steps combine what they reuse, where those are fitted."""
        plan, options = self.plan, self.plan.options
        if options.reuse not in FITS:
            return
        settings = [self.run_settings, options.vc_images]
        folder = self.stage(
            "approximate", settings, lambda folder: approximate(plan, segments, compiled, self.tables, folder)
        )
        self.tables |= read_tables(folder / "approximate.safetensors")

    def fit(self, segments: Segments, compiled: Segments) -> None:
        """The compensation; a program that is the FP program itself has nothing to compensate."""
        plan, options = self.plan, self.plan.options
        if options.vc == "none" or (options.bits is None and not plan.program.slots):
            return
        settings = [self.run_settings, options.vc, options.vc_images]
        folder = self.stage("fit", settings, lambda folder: stages.fit(plan, segments, compiled, self.tables, folder))
        self.tables |= read_tables(folder / "compensation.safetensors")

    def verify(self, segments: Segments, compiled: Segments) -> None:
        plan, settings = self.plan, [self.run_settings, self.plan.options.verify_images]
        self.stage("verify", settings, lambda folder: stages.verify(plan, segments, compiled, self.tables, folder))

    def seal(self, segments: Segments, compiled: Segments, target: Path) -> None:
        self.plan.progress("seal", 0, 1)
        with atomic_folder(target) as folder:
            _assemble(self, segments, compiled, folder)
        self.plan.progress("seal", 1, 1)


def _decided(plan: Plan, model: Any) -> str:
    """A digest of what decides every stage: the model, what it computes, the code and its packages."""
    return digest_of(
        [
            stages.model_digest(model),
            stages.behaviour_digest(model),
            plan.spec.model_dump(),
            package_versions(),
            _source_digest(),
            _shapes(plan.cached_program),
        ]
    )


def _run_stages(compile_: _Compile, segments: Segments, target: Path) -> None:
    """Everything after the export."""
    compiled = segments
    if compile_.plan.options.bits is not None:
        calib = compile_.select(segments)
        segments = compile_.smooth(segments, calib)
        compiled = compile_.quantize(segments, calib)
    compile_.lower(compiled)
    compile_.approximate(segments, compiled)
    compile_.fit(segments, compiled)  # after it: compensation is of what is left
    compile_.verify(segments, compiled)
    compile_.seal(segments, compiled, target)


def _source_digest() -> str:
    """A digest of ditc's own code: a stage that other code made is not taken up."""
    packages = [ditc, *(import_module(f"ditc.{name}") for name in FOLDERS)]
    places = [Path(package.__path__[0]) for package in packages]
    return digest_of([sha256_of(path) for place in places for path in sorted(place.glob("*.py"))])


def _shapes(program: Program) -> list[Any]:
    """What of a program decides its segments."""
    return [part.model_dump() for part in program.segments] + list(program.epilogue)


def _assemble(done: _Compile, segments: Segments, compiled: Segments, target: Path) -> None:
    """Copy what the stages left into a bundle folder, and seal it."""
    plan = done.plan
    for path in compiled.values():
        _copy_segment(path, target / "segments")
    if "lower" in done.folders:
        for path in done.folders["lower"].glob("*.onnx*"):
            shutil.copyfile(path, target / "segments" / path.name)
    if plan.options.reference and compiled["full"] != segments["full"]:
        _copy_segment(segments["full"], target / "reference")
    for stage, name in (("select", "calib.npz"), ("quantize", "scales.json")):
        if stage in done.folders:
            (target / "calib").mkdir(exist_ok=True)
            shutil.copyfile(done.folders[stage] / name, target / "calib" / name)
    write_tables(target / TABLES, sampler_tables(plan.table) | done.tables)
    # of the files as they are deployed: a GPU's form shares the portable one's weights file, and opens beside it only
    fingerprint(plan, {path.stem: target / "segments" / path.name for path in compiled.values()}, done.tables, target)
    seal_bundle(target, _manifest(done))


def _manifest(done: _Compile) -> Manifest:
    plan, options = done.plan, done.plan.options
    checks = {
        name: json.loads((done.folders[stage] / f"{name}.json").read_text())
        for stage, name in CHECK_FILES
        if stage in done.folders and (done.folders[stage] / f"{name}.json").is_file()
    }
    compensation = TableCompensation.from_tables(done.tables)
    if compensation is not None:
        k = compensation.k
        checks["compensation"] = {"k_mean": float(k.mean()), "k_min": float(k.min()), "k_max": float(k.max())}
    sampler = options.sampler_spec(plan.spec.sampler)
    return Manifest(
        ditc_version=ditc.__version__,
        model=plan.spec,
        program=plan.program,
        reference_program=plan.reference_program if options.reference else None,
        precision=options.precision,
        guidance=options.cfg,
        batch=options.batch,
        settings=options.model_dump() | {"sampler": sampler.model_dump()},
        versions=package_versions(),
        checks=checks,
    )


def _copy_segment(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in (path, data_path(path), *(lowered_path(path, backend) for backend in LOWERINGS)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
