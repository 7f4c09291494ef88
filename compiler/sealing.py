"""The last stage of a compile: what the others left becomes a bundle folder, with fingerprint and manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import ditc
from ditc.bundle import TABLES, Manifest, seal_bundle, write_tables
from ditc.compiler.fingerprinting import fingerprint
from ditc.compiler.plan import Plan, Segments
from ditc.compiler.text import NO_TEXT, Text
from ditc.engines.backend import lowered_path
from ditc.exporter.onnx_files import data_path
from ditc.files import atomic_folder, atomic_write
from ditc.lowering.backend_forms import LOWERINGS
from ditc.machine import package_versions
from ditc.manifest import EXAMPLES, PROMPTS
from ditc.prompt_lists import PromptOrigin, written_prompts
from ditc.runtime.compensation import TableCompensation
from ditc.tables import Tables
from ditc.text_spec import TEXT

__all__ = ["seal"]

Folders = Mapping[str, Path]  # of the stages that ran, by name

# stage -> the JSON it leaves for the manifest's `checks`
CHECK_FILES = (
    ("text", "text"),
    ("watch", "watch"),
    ("export", "parity"),
    ("select", "pool"),
    ("smooth", "smooth"),
    ("rotate", "rotate"),
    ("quantize", "kernels"),
    ("quantize", "storage"),
    ("learn", "approximation"),
    ("approximate", "approximation"),  # of the closed loop, in place of the open one's
    ("lower", "tensorrt"),
    ("lower", "footprints"),
    ("verify", "verify"),
)


def seal(
    plan: Plan,
    segments: Segments,
    compiled: Segments,
    folders: Folders,
    tables: Tables,
    target: Path,
    text: Text = NO_TEXT,
) -> None:
    """Write the bundle `target` whole: `segments` are the FP ones, `tables` those beside the plan's own."""
    plan.progress("seal", 0, 1)
    with atomic_folder(target) as folder:
        _copy_files(plan, segments, compiled, folders, folder)
        write_tables(folder / TABLES, {**plan.tables, **tables})
        if plan.examples.arrays:
            write_tables(folder / EXAMPLES, plan.examples.arrays)
        if plan.examples.prompts:
            atomic_write(folder / PROMPTS, written_prompts(plan.examples.prompts))
        # of the files as they are deployed: a GPU's form shares the portable one's weights, and opens beside it only
        deployed = {path.stem: folder / "segments" / path.name for path in compiled.values()}
        fingerprint(plan, deployed, tables, folder)
        seal_bundle(folder, _manifest(plan, folders, tables, text))
    plan.progress("seal", 1, 1)


def _copy_files(plan: Plan, segments: Segments, compiled: Segments, folders: Folders, target: Path) -> None:
    """Copy what the stages left into a bundle folder."""
    for path in compiled.values():
        _copy_segment(path, target / "segments")
    if "lower" in folders:
        for path in folders["lower"].glob("*.onnx*"):
            shutil.copyfile(path, target / "segments" / path.name)
    if TEXT in folders:
        (target / TEXT).mkdir()
        for path in folders[TEXT].iterdir():
            if path.name != f"{TEXT}.json":
                shutil.copyfile(path, target / TEXT / path.name)
    if plan.options.reference and compiled["full"] != segments["full"]:
        _copy_segment(segments["full"], target / "reference")
    for stage, name in (("select", "calib.npz"), ("quantize", "scales.json")):
        if stage in folders:
            (target / "calib").mkdir(exist_ok=True)
            shutil.copyfile(folders[stage] / name, target / "calib" / name)


def _manifest(plan: Plan, folders: Folders, tables: Tables, text: Text) -> Manifest:
    options, prompts = plan.options, text.prompts
    checks = {
        name: json.loads((folders[stage] / f"{name}.json").read_text())
        for stage, name in CHECK_FILES
        if stage in folders and (folders[stage] / f"{name}.json").is_file()
    }
    compensation = TableCompensation.from_tables(tables)
    if compensation is not None:
        k = compensation.k
        checks["compensation"] = {"k_mean": float(k.mean()), "k_min": float(k.min()), "k_max": float(k.max())}
    sampler = options.sampler_spec(plan.spec.sampler)
    return Manifest(
        ditc_version=ditc.__version__,
        model=plan.spec,
        text=text.specs or None,
        prompts=None if prompts is None else PromptOrigin(source=prompts.source, count=len(prompts.prompts)),
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
