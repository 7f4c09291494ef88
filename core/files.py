"""Digests and writes that are whole or absent: what every artifact on disk goes through."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditc.errors import InputError

__all__ = ["atomic_folder", "atomic_write", "digest_of", "in_turn", "locked", "sha256_of", "writing"]

CHUNK_BYTES = 1 << 22


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """A short digest (16 hex digits) of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, read-only folder, no permission) into one clear line."""
    try:
        yield
    except OSError as e:
        raise InputError(
            f"can't write {path}: {e.strerror or e}; free some space or choose a folder you may write to"
        ) from e


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file for one process at a time; raises InputError with `busy` where another holds it.

    The lock dies with its process.
    """
    with writing(path):
        lock = path.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise InputError(busy) from e
        yield


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold a lock file as `locked` does, after whoever holds it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file through a temporary sibling and a rename. Of several writers the last one wins, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _swap(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path`; whatever stood there goes, or comes back if that fails."""
    retired = path.with_name(f".{path.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if path.exists():
        path.rename(retired)
    try:
        temporary.rename(path)
    except OSError:
        if retired.exists():
            retired.rename(path)
        raise
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling folder that takes the name `path` when the block ends well, and is gone when it doesn't.

    A folder that already stands at `path` is replaced at the last moment, and only then.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path):
        if temporary.exists():  # left by a killed run; it never had the real name
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    try:
        with writing(path):
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
