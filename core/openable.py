"""Names under which libraries find an ONNX file and the files of its larger tensors, wherever they lie.

A graph names those files, and libraries look for them beside it. They take names in UTF-8 only, while a folder's may be
any bytes. And a cache of a model hub keeps every file as a link to a blob of another name: who reads a graph through
its link looks for the weights among the blobs, or takes a link that leads out of the folder for an attack.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

from ditc.errors import InputError
from ditc.files import writing
from ditc.onnx_ports import read_ports

__all__ = ["Links", "check_utf8", "is_utf8", "openable", "plain_name"]

OPEN_FILES = Path("/proc/self/fd")  # a folder that is open, under a name of digits; names are UTF-8 wherever it lacks


class Links(Enum):
    """The links that a library follows from a graph to its weights: any that end in the graph's real folder, or none.

    ONNX Runtime looks beside the link, and takes what it finds if that lies beside the real graph.
    """

    IN_ONE_FOLDER = "in one folder"
    NONE = "none"


@contextmanager
def openable(graph: Path, links: Links) -> Iterator[str]:
    """The name of an ONNX file for a library that follows such links; it leads there inside the block.

    Raises InputError where links have to be replaced and there is no room for that.
    """
    with ExitStack() as stack:
        files = [graph, *(graph.with_name(name) for name in sorted(data_of(graph)))]
        if not _follows(files, links):
            graph = stack.enter_context(_real_files(files)) / graph.name
        yield stack.enter_context(plain_name(graph))


@contextmanager
def _real_files(files: Sequence[Path]) -> Iterator[Path]:
    """A folder with a graph and its weights as files of their names, inside the block.

    They are hard links, which cost nothing, or copies where the folder of temporary files (TMPDIR) is on another disk.
    What is mapped from them stays when the folder goes.
    """
    with TemporaryDirectory(prefix="ditc-segment-") as name:
        folder = Path(name)
        with writing(folder):
            for file in files:
                _put(file.resolve(), folder / file.name)
        yield folder


def data_of(graph: Path) -> frozenset[str]:
    """Names of the files of a graph's larger tensors; none of what is no graph, which a library will say."""
    try:
        return read_ports(graph).data
    except (OSError, ValueError):
        return frozenset()


def _follows(files: Sequence[Path], links: Links) -> bool:
    """Are a graph and its weights where a library finds them?"""
    real = [file.resolve() for file in files]
    together = len({file.parent for file in real}) == 1
    return together and (links is Links.IN_ONE_FOLDER or [file.name for file in real] == [file.name for file in files])


def _put(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # another disk, or another user's file
        shutil.copyfile(file, place)


@contextmanager
def plain_name(path: Path) -> Iterator[str]:
    """A name in UTF-8 of a file that is there or will be written; it leads there inside the block.

    Raises InputError where the file's own is none, and the system has no other.
    """
    if is_utf8(path):
        yield str(path)
        return
    if not OPEN_FILES.is_dir():
        check_utf8(path.parent, "libraries")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield str(OPEN_FILES / str(folder) / path.name)
    finally:
        os.close(folder)


def is_utf8(path: Path) -> bool:
    """Is a path as a library in C++ gets it, which is in UTF-8, the one that the system knows?"""
    try:
        return str(path).encode() == os.fsencode(path)
    except UnicodeEncodeError:
        return False


def check_utf8(path: Path, library: str) -> None:
    """Raise InputError unless a library that takes names in UTF-8 can be given a path."""
    if not is_utf8(path.absolute()):
        raise InputError(
            f"{library} can be given names in UTF-8 only, found {os.fsencode(path.absolute())!r}; move it to a folder "
            "with another name, or name a link to it"
        )
