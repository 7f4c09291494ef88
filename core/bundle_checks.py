"""Checks that every whole bundle passes, so that one that contradicts itself is refused before anything runs.

Hashes say that a bundle is what was sealed; these checks, that what was sealed makes sense: its manifest, its program,
its tables and the ports of its graphs agree on everything that two of them say. What only one says can't contradict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from unicodedata import normalize

from ditc.manifest import EXAMPLES, PROMPTS, REFERENCE, SEGMENTS, TABLES, Manifest
from ditc.onnx_ports import Ports
from ditc.port_checks import port_contradictions
from ditc.precision import PRECISIONS, quantized
from ditc.program import FULL, UPDATE
from ditc.program_checks import contradictions, repeated
from ditc.requests import example_names
from ditc.table_checks import table_contradictions
from ditc.tables import Tables
from ditc.text_spec import TEXT, text_contradictions

__all__ = ["bundle_contradictions", "is_graph", "manifest_contradictions"]

ManifestCheck = Callable[[Manifest], Iterator[str]]

MOST_GUIDANCE = 1000.0  # and more is no weight


def manifest_contradictions(manifest: Manifest) -> Iterator[str]:
    """A sentence for each contradiction in the manifest alone; the first one is all that is sure."""
    return (text for check in MANIFEST_CHECKS for text in check(manifest))


def bundle_contradictions(manifest: Manifest, tables: Tables, ports: Mapping[str, Ports]) -> Iterator[str]:
    """The same between a manifest that has none, its tables, and the ports of the graphs that it lists."""
    yield from table_contradictions(manifest, tables)
    yield from port_contradictions(manifest, tables, ports)


def is_graph(file: str) -> bool:
    """Is a file of a bundle the graph of a segment, in the portable form or a backend's?"""
    return file.startswith((SEGMENTS, REFERENCE, f"{TEXT}/")) and file.endswith(".onnx")


def _segment_of(file: str) -> str:
    return file.rpartition("/")[2].split(".")[0]


def numbers_are_possible(manifest: Manifest) -> Iterator[str]:
    """Precision, guidance, batch and the model's own numbers."""
    spec = manifest.model
    if manifest.precision not in PRECISIONS:
        yield f"precision {manifest.precision!r} is none of: {', '.join(PRECISIONS)}"
    if not (math.isfinite(manifest.guidance) and 0 < manifest.guidance < MOST_GUIDANCE):
        yield f"guidance is {manifest.guidance:g}, expected more than 0 and less than {MOST_GUIDANCE:g}"
    if manifest.guidance != 1 and not spec.can_be_guided:
        yield f"guidance is {manifest.guidance:g}, and the model has no unconditional class"
    if spec.null_label is not None and spec.null_label < 0:
        yield f"the unconditional class is {spec.null_label}, expected a number from 0 on"
    if manifest.batch < 1:
        yield f"batch is {manifest.batch}, expected at least 1"
    if spec.branches and (not spec.branch_shape or min(spec.branch_shape) < 1):
        yield f"branches cache the shape {list(spec.branch_shape)}, expected positive numbers"


def programs_are_whole(manifest: Manifest) -> Iterator[str]:
    """Both programs, each by itself."""
    yield from (f"program: {text}" for text in contradictions(manifest.program))
    if manifest.reference_program is not None:
        yield from (f"reference_program: {text}" for text in contradictions(manifest.reference_program))


def programs_walk_the_same_trajectory(manifest: Manifest) -> Iterator[str]:
    """The FP program takes the same steps of the same model, and computes everything at each."""
    program, reference = manifest.program, manifest.reference_program
    if program.branches != manifest.model.branches:
        yield f"the program has the branches {_named(program.branches)}, the model {_named(manifest.model.branches)}"
    if program.streams != manifest.model.streams:
        yield "program and model differ in the streams of their branches"
    if reference is None:
        return
    if program.streams != reference.streams:
        yield "program and reference_program differ in the streams of their branches"
    for kind in ("branches", "prologue", "epilogue"):
        own, other = getattr(program, kind), getattr(reference, kind)
        if own != other:
            yield f"program and reference_program differ in {kind}: {_named(own)} and {_named(other)}"
    times, others = [step.t for step in program.steps], [step.t for step in reference.steps]
    if times != others:
        yield f"program and reference_program differ in their timesteps: {_named(times)} and {_named(others)}"
    if {step.segment for step in reference.steps} != {FULL} or reference.slots:
        yield "reference_program does not compute everything at every step"


def _named(values: object) -> str:
    """A sequence as text, the middle of a long one left out."""
    items = [str(value) for value in values]  # type: ignore[attr-defined]
    return ", ".join(items if len(items) <= 8 else [*items[:4], "...", *items[-3:]]) or "none"


def prompts_give_conditions(manifest: Manifest) -> Iterator[str]:
    """Text encoders give conditions that the model has; only where there are any, prompts were compiled with."""
    yield from text_contradictions(manifest.model, manifest.text or ())
    if manifest.prompts is not None and manifest.text is None:
        yield "it was compiled with prompts, and has no text encoder"


def settings_say_the_same(manifest: Manifest) -> Iterator[str]:
    """The bundle is as it was asked for at its compile, where both are said."""
    program = manifest.program
    own = {
        "steps": len(program.steps),
        "cfg": manifest.guidance,
        "precision": manifest.precision,
        "batch": manifest.batch,
        "reuse": program.reuse,
    }
    for name, value in own.items():
        made_with = manifest.settings.get(name, "auto")
        if made_with not in ("auto", value):
            yield f"it was made with {name} {made_with}, and has {value}"


def files_are_those_that_are_called(manifest: Manifest) -> Iterator[str]:
    """There is a graph for every call, tables, and no graph that nothing calls."""
    called = manifest.program.calls
    needed = [TABLES, *(f"{SEGMENTS}{name}.onnx" for name in called)]
    needed += [EXAMPLES] if example_names(manifest.model) else []
    needed += [PROMPTS] if manifest.prompts is not None else []
    text = [file for encoder in manifest.text or () for file in encoder.files]
    needed += text
    reference = manifest.reference_program
    if reference is not None and quantized(manifest.precision):
        needed.append(f"{REFERENCE}{FULL}.onnx")
    if EXAMPLES in manifest.files and EXAMPLES not in needed:
        yield f"`files` lists {EXAMPLES!r}, and the model is asked for with classes alone, or with nothing"
    if PROMPTS in manifest.files and PROMPTS not in needed:
        yield f"`files` lists {PROMPTS!r}, and it says of no prompts that it was compiled with them"
    for name in needed:
        if name not in manifest.files:
            yield f"the program needs {name}, and `files` doesn't list it"
    known = {SEGMENTS: {*called, UPDATE}, REFERENCE: set() if reference is None else set(reference.calls)}
    for name in (name for name in filter(is_graph, manifest.files) if name not in text):
        folder = f"{name.partition('/')[0]}/"
        if _segment_of(name) not in known.get(folder, ()) or name.count("/") > 1:
            yield f"`files` lists {name!r}, which no program calls"


def file_names_stay_inside(manifest: Manifest) -> Iterator[str]:
    """Names are relative, with slashes, without "..", and differ by more than upper and lower case."""
    for name in manifest.files:
        parts = name.split("/")
        if {"", ".", ".."} & set(parts) or set(name) & {"\\", ":"} or not name.isprintable():
            yield f"`files` names {name!r}, which lies outside the bundle or is no plain name; don't use this bundle"
    for name in repeated([normalize("NFC", name).casefold() for name in manifest.files]):
        yield f"`files` names {name!r} twice, but for upper and lower case"


MANIFEST_CHECKS: tuple[ManifestCheck, ...] = (
    file_names_stay_inside,  # first: nothing of a manifest that points elsewhere is looked at
    numbers_are_possible,
    programs_are_whole,  # steps have their segments from here on
    programs_walk_the_same_trajectory,
    prompts_give_conditions,
    settings_say_the_same,
    files_are_those_that_are_called,
)
