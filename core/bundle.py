"""The bundle on disk: a folder that is whole or absent, and opens only where every hash matches.

    manifest.json         schema version, model, program, settings, files with SHA-256 and size, how it was made
    manifest.sha256       the hash of manifest.json
    segments/*.onnx       the deployed segments (+ external data beside them); NAME.BACKEND.onnx is the form of one
                          backend, sharing that data
    tables.safetensors    every per-step number: timesteps, sampler coefficients, compensation
    fingerprint.safetensors   what the segments gave where they were compiled (`runtime.fingerprint`)
    calib/                the calibration set and the scales made from it; a deployment may leave it out
    reference/*.onnx      the FP segments that `ditc verify` compares with; a deployment may leave them out

There is no pickle anywhere, and nothing is read that the manifest doesn't vouch for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from ditc.errors import BundleError
from ditc.files import atomic_write, sha256_of
from ditc.precision import quantized
from ditc.program import Program
from ditc.spec import ModelSpec, Record

__all__ = [
    "SCHEMA_VERSION",
    "Bundle",
    "FileEntry",
    "Manifest",
    "open_bundle",
    "read_tables",
    "seal_bundle",
    "write_tables",
]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
TABLES = "tables.safetensors"
REFERENCE = "reference/"
OPTIONAL = (REFERENCE, "calib/")  # a deployment may leave them out, each as a whole

Tables = Mapping[str, NDArray[Any]]


class FileEntry(Record):
    """What a file of a bundle has to be, byte for byte."""

    sha256: str
    size_bytes: int


class Manifest(Record):
    """What a bundle is and how it was made: `settings` as compiled, `checks` as measured on the way."""

    schema_version: int = SCHEMA_VERSION
    ditc_version: str
    model: ModelSpec
    program: Program
    reference_program: Program | None = None
    precision: str
    guidance: float
    batch: int
    settings: dict[str, JsonValue] = {}
    versions: dict[str, str] = {}
    checks: dict[str, JsonValue] = {}
    files: dict[str, FileEntry] = {}

    @property
    def halves(self) -> int:
        """Network rows per image: 2 with guidance (conditional, unconditional), else 1."""
        return 1 if self.guidance == 1 else 2

    def size_bytes(self, *, reference: bool) -> int:
        """Bytes of the deployed files, or of the reference files that only `verify` needs."""
        return sum(entry.size_bytes for name, entry in self.files.items() if name.startswith(REFERENCE) == reference)


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
        return self.path / "segments" / f"{name}.onnx"

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


def write_tables(path: Path, tables: Tables) -> None:
    """Named arrays as one safetensors file."""
    from safetensors.numpy import save

    atomic_write(path, save({name: np.ascontiguousarray(table) for name, table in tables.items()}))


def read_tables(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file; raises BundleError where it can't be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise BundleError(f"can't read the tables {path}: {e}; compile the bundle again") from e


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
    """The bundle in a folder, or BundleError naming the file that is missing or changed."""
    manifest = _read_manifest(path)
    left_out = tuple(folder for folder in OPTIONAL if not (path / folder).exists())
    for name, entry in manifest.files.items():
        if not name.startswith(left_out):
            _check_file(path, name, entry)
    _check_nothing_unlisted(path, manifest)
    return Bundle(path=path, manifest=manifest)


def _read_manifest(path: Path) -> Manifest:
    try:
        text = (path / MANIFEST).read_bytes()
        raw = json.loads(text)
    except FileNotFoundError as e:
        raise BundleError(
            f"{path} is not a bundle: no {MANIFEST} in it; make one with: ditc compile MODEL -o {path}"
        ) from e
    except NotADirectoryError as e:
        raise BundleError(f"{path} is a file, expected the folder of a bundle") from e
    except (OSError, ValueError) as e:
        raise BundleError(f"{path / MANIFEST} is damaged ({e}); copy the bundle again") from e
    if not (path / SEAL).is_file() or (path / SEAL).read_bytes() != hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise BundleError(f"{path} is damaged: {MANIFEST} does not match {SEAL}; copy the bundle again")
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(found, int):
        raise BundleError(f"{path / MANIFEST} is damaged: it has no schema version; copy the bundle again")
    if found > SCHEMA_VERSION:
        raise BundleError(f"{path / MANIFEST} has schema {found}, this ditc reads up to {SCHEMA_VERSION}; update ditc")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path / MANIFEST} is damaged at {where} ({first['msg']}); copy the bundle again") from e


def _check_file(path: Path, name: str, entry: FileEntry) -> None:
    file = path / name
    if not file.resolve().is_relative_to(path.resolve()):
        raise BundleError(
            f"the manifest of {path} names {name!r}, which lies outside the bundle; don't use this bundle"
        )
    if not file.is_file():
        raise BundleError(f"{path} is incomplete: {name} is missing; copy the bundle again")
    if file.stat().st_size != entry.size_bytes or sha256_of(file) != entry.sha256:
        raise BundleError(f"{path} is damaged: {name} does not match the hash in the manifest; copy the bundle again")


def _check_nothing_unlisted(path: Path, manifest: Manifest) -> None:
    """A file beside the listed ones could be taken for a backend's form of a segment, and run."""
    for folder in ("segments", "reference"):
        for file in sorted((path / folder).glob("*")):
            if f"{folder}/{file.name}" not in manifest.files:
                raise BundleError(
                    f"{path} holds {folder}/{file.name}, which its manifest doesn't list; remove that file"
                )
