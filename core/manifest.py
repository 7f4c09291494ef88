"""The manifest: what a bundle says of itself, and the names of what lies in its folder."""

from __future__ import annotations

from pydantic import JsonValue

from ditc.guidance import halves_of
from ditc.program import Program
from ditc.spec import ModelSpec, Record

__all__ = ["MANIFEST", "REFERENCE", "SCHEMA_VERSION", "SEAL", "SEGMENTS", "TABLES", "FileEntry", "Manifest"]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
TABLES = "tables.safetensors"
SEGMENTS = "segments/"
REFERENCE = "reference/"


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
        return halves_of(self.guidance)

    def size_bytes(self, *, reference: bool) -> int:
        """Bytes of the deployed files, or of the reference files that only `verify` needs."""
        return sum(entry.size_bytes for name, entry in self.files.items() if name.startswith(REFERENCE) == reference)
