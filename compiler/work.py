"""The work folder of a compile: finished stages by key, so that an interrupted compile resumes after the last one.

Beside it, what several compiles have in common may be kept in a folder of the user's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditc.compiler.plan import Segments
from ditc.files import atomic_folder, atomic_write, in_turn, locked, writing

__all__ = ["WorkFolder", "replaced", "shared", "work_folder", "write_json"]

Make = Callable[[Path], None]  # fills a fresh folder


@dataclass(frozen=True)
class WorkFolder:
    """Artifacts of stages. A stage's folder takes its name only when it is whole, so what exists can be used."""

    path: Path

    def stage(self, name: str, key: str, make: Make) -> tuple[Path, bool]:
        """Return (folder of the stage, whether it was there already). `make` fills a fresh folder."""
        folder = self.path / f"{name}-{key}"
        if folder.is_dir():
            return folder, True
        for stale in self.path.glob(f"{name}-*"):  # same stage under other settings: its key will not come again soon
            shutil.rmtree(stale, ignore_errors=True)
        with atomic_folder(folder) as fresh:
            make(fresh)
        return folder, False

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def work_folder(out: Path) -> Iterator[WorkFolder]:
    """Yield the work folder beside a bundle, held by one compile at a time; the lock dies with its process."""
    path = out.with_name(f".{out.name}.work")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path / "lock", f"another compile is writing {out}; wait for it, or choose another output folder"):
        yield WorkFolder(path)


def shared(folder: Path, make: Make) -> Make:
    """Return `make`, but what it made the first time stands at `folder`, and others are given that.

    One compile makes it, and those that want the same just now wait. They get copies: onnx_ir takes no weights from a
    file with several names.
    """

    def give(fresh: Path) -> None:
        with in_turn(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                with atomic_folder(folder) as first:
                    make(first)
        with writing(fresh):
            for file in folder.iterdir():
                shutil.copyfile(file, fresh / file.name)

    return give


def replaced(segments: Segments, folder: Path) -> Segments:
    """Return the segments, with those that a stage made in its folder beside or in place of the ones it took."""
    files = {path.stem: path for path in folder.glob("*.onnx")}  # with a dot it is a backend's form of a segment
    return {**segments, **{name: path for name, path in files.items() if "." not in name}}


def write_json(path: Path, value: Mapping[str, Any] | Iterable[Any]) -> None:
    """Write what a stage measured."""
    atomic_write(path, json.dumps(value, indent=1).encode() + b"\n")
