"""The bundle on disk: a folder that is whole or absent, and opens only where every hash matches.

    manifest.json         schema version, model, program, settings, files with SHA-256 and size, how it was made
    manifest.sha256       the hash of manifest.json
    segments/*.onnx       the deployed segments (+ external data beside them); NAME.BACKEND.onnx is the form of one
                          backend, sharing that data
    tables.safetensors    every per-step number: timesteps, sampler coefficients, compensation
    conditions.safetensors    of a model of more than classes: conditions of typical images (`requests.Examples`)
    prompts.txt           the prompts that those were encoded from, where they were
    fingerprint.safetensors   what the segments gave where they were compiled (`runtime.fingerprint`)
    text/                 tokenizers and encoders, of a bundle that takes prompts; a deployment may leave them out, and
                          bring embeddings
    calib/                the calibration set and the scales made from it; a deployment may leave it out
    reference/*.onnx      the FP segments that `ditc verify` compares with; a deployment may leave them out

There is no pickle anywhere, and nothing is read that the manifest doesn't vouch for. Files may be links, as caches of
model hubs lay them out: what counts is their names and their bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import ValidationError

from ditc.bundle_checks import bundle_contradictions, is_graph, manifest_contradictions
from ditc.errors import BundleError, InputError
from ditc.files import atomic_write, sha256_of
from ditc.manifest import (
    EXAMPLES,
    MANIFEST,
    PROMPTS,
    REFERENCE,
    SCHEMA_VERSION,
    SEAL,
    SEGMENTS,
    TABLES,
    FileEntry,
    Manifest,
)
from ditc.onnx_ports import Ports, read_ports
from ditc.precision import quantized
from ditc.prompt_lists import lines_of
from ditc.requests import Examples, example_names
from ditc.tables import read_tables, write_tables
from ditc.text_spec import TEXT, text_conditions

__all__ = [
    "REFERENCE",
    "SCHEMA_VERSION",
    "TABLES",
    "Bundle",
    "FileEntry",
    "Manifest",
    "open_bundle",
    "read_tables",
    "seal_bundle",
    "write_tables",
]

OPTIONAL = (REFERENCE, "calib/", f"{TEXT}/")  # a deployment may leave them out, each as a whole


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest; every file that is present has matched its hash."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and so of every file that it vouches for; in hex."""
        return (self.path / SEAL).read_text().strip()

    def segment_path(self, name: str) -> Path:
        return self.path / SEGMENTS / f"{name}.onnx"

    def reference_path(self, name: str) -> Path:
        """The FP form of a segment; the deployed one where both are the same file."""
        path = self.path / REFERENCE / f"{name}.onnx"
        vouched_for = f"{REFERENCE}{name}.onnx" in self.manifest.files
        return path if vouched_for and path.exists() else self.segment_path(name)

    @property
    def has_reference(self) -> bool:
        """Is the FP program here? Where nothing was quantized it is the deployed one's segments."""
        present = not quantized(self.manifest.precision) or (self.path / "reference").is_dir()
        return self.manifest.reference_program is not None and present

    def tables(self) -> dict[str, NDArray[Any]]:
        return read_tables(self.path / TABLES)

    def examples(self) -> Examples:
        """Conditions of typical images: what is made or measured without a request of one's own is made with them."""
        spec = self.manifest.model
        names = example_names(spec)
        arrays = read_tables(self.path / EXAMPLES) if names else {}
        try:
            return Examples.checked(spec, arrays, self._prompts_of(arrays))
        except InputError as e:
            raise BundleError(f"{self.path} contradicts itself: {EXAMPLES}: {e}; compile it again") from e

    def _prompts_of(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[str, ...]:
        """Return the prompts that examples were encoded from, row by row. Raises BundleError where they are others."""
        manifest = self.manifest
        if manifest.prompts is None:
            return ()
        try:
            prompts = lines_of((self.path / PROMPTS).read_bytes())
        except ValueError as e:
            raise BundleError(f"{self.path} contradicts itself: {PROMPTS} holds none ({e}); compile it again") from e
        rows = {len(arrays[name]) for name in text_conditions(manifest.text or ()) if name in arrays}
        if {len(prompts)} != {manifest.prompts.count, *rows}:
            raise BundleError(
                f"{self.path} contradicts itself: {PROMPTS} holds {len(prompts)} prompts, the manifest says "
                f"{manifest.prompts.count}, and {EXAMPLES} has {sorted(rows)} of them; compile it again"
            )
        return prompts

    @property
    def has_text(self) -> bool:
        """Are the text encoders here, so that it takes prompts?"""
        return self.manifest.text is not None and (self.path / TEXT).is_dir()

    def text_path(self, name: str) -> Path:
        """Return the place of a file that prompts need."""
        return self.path / TEXT / name


def seal_bundle(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of a finished folder into its manifest and write that, last."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(path), size_bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, SEAL)
    }
    sealed = manifest.model_copy(update={"files": files})
    atomic_write(folder / MANIFEST, sealed.model_dump_json(indent=1).encode() + b"\n")
    atomic_write(folder / SEAL, sha256_of(folder / MANIFEST).encode() + b"\n")
    return sealed


def open_bundle(path: Path) -> Bundle:
    """The bundle in a folder.

    Raises BundleError naming the file that is missing, changed or can't be read, or what in it contradicts what else.
    """
    with _readable(path):
        manifest = _read_manifest(path)
        _refuse(path, manifest_contradictions(manifest))
        left_out = tuple(folder for folder in OPTIONAL if not (path / folder).exists())
        present = {name: entry for name, entry in manifest.files.items() if not name.startswith(left_out)}
        for name, entry in present.items():
            _check_file(path, name, entry)
        _check_nothing_unlisted(path, manifest)
        ports = {name: _ports(path, name) for name in filter(is_graph, present)}
        _refuse(path, bundle_contradictions(manifest, read_tables(path / TABLES), ports))
        bundle = Bundle(path=path, manifest=manifest)
        bundle.examples()
    return bundle


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn a refusal of the system into one line."""
    try:
        yield
    except OSError as e:
        raise BundleError(f"can't read the bundle {path}: {e.filename or ''}: {e.strerror or e}") from e


def _refuse(path: Path, contradictions: Iterator[str]) -> None:
    for first in contradictions:
        raise BundleError(f"{path} contradicts itself: {first}; compile it again")


def _ports(path: Path, name: str) -> Ports:
    try:
        return read_ports(path / name)
    except ValueError as e:
        raise BundleError(f"{path} holds {name}, which is no ONNX model: {e}; compile it again") from e


def _read_manifest(path: Path) -> Manifest:
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError as e:
        raise BundleError(
            f"{path} is not a bundle: no {MANIFEST} in it; make one with: ditc compile MODEL -o {path}"
        ) from e
    except NotADirectoryError as e:
        raise BundleError(f"{path} is a file, expected the folder of a bundle") from e
    raw = _parsed(path, text)
    if not (path / SEAL).is_file() or (path / SEAL).read_bytes() != hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise BundleError(f"{path} is damaged: {MANIFEST} does not match {SEAL}; copy the bundle again")
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int):
        raise BundleError(f"{path / MANIFEST} is damaged: it has no schema version; copy the bundle again")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path / MANIFEST} has schema {version}, this ditc reads up to {SCHEMA_VERSION}; update ditc"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path / MANIFEST} is damaged at {where} ({first['msg']}); compile it again") from e


def _parsed(path: Path, text: bytes) -> Any:
    """The JSON of a manifest, no name of which may be there twice."""

    def checked(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(entries)) < len(entries):
            names = [name for name, _ in entries]
            raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
        return dict(entries)

    try:
        raw = json.loads(text, object_pairs_hook=checked)
        json.dumps(raw, ensure_ascii=False).encode()  # halves of characters can't be written, so not shown either
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{path / MANIFEST} is damaged ({e}); copy the bundle again") from e
    return raw


def _check_file(path: Path, name: str, entry: FileEntry) -> None:
    file = path / name
    if not file.is_file():
        raise BundleError(f"{path} is incomplete: {name} is {_why_none(file)}; copy the bundle again")
    if file.stat().st_size != entry.size_bytes or sha256_of(file) != entry.sha256:
        raise BundleError(f"{path} is damaged: {name} does not match the hash in the manifest; copy the bundle again")


def _why_none(file: Path) -> str:
    if file.is_dir():
        return "a folder, expected a file"
    return "a link that leads nowhere" if file.is_symlink() else "missing"


def _check_nothing_unlisted(path: Path, manifest: Manifest) -> None:
    """A file beside the listed ones could be taken for a backend's form of a segment, and run."""
    for folder in ("segments", "reference", TEXT):
        for file in sorted((path / folder).glob("*")):
            if f"{folder}/{file.name}" not in manifest.files:
                raise BundleError(
                    f"{path} holds {folder}/{file.name}, which its manifest doesn't list; remove that file"
                )
