"""Words in code: a docstring says what a thing does, and a local what it holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# these folders and their tests
CLEAN = (
    "benchmarks",
    "browser",
    "calib_data",
    "cli",
    "compiler",
    "conformance",
    "core",
    "diagnosis",
    "engines",
    "exporter",
    "golden",
    "lowering",
    "portable",
    "quality",
    "quantize",
    "replay",
    "report",
    "runtime",
    "simulated",
    "speed",
    "wheel",
)

PRONOUNS = ("What", "How", "Which", "Whether")
HAVING = {"found", "made", "kept", "taken"}  # of a value they tell that it was had, not what it is
ON_DISK = {("report/facts.py", "found")}  # a key of the report's JSON


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, docstring) of a module and all that is in it."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, parameter, attribute, function and import."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.alias(name=name, asname=asname):
                yield node.lineno, asname or name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name


def files_of(folder: str) -> dict[str, ast.Module]:
    """The parsed files of a folder and of its tests by their names."""
    paths = sorted(path for part in ("", "tests") for path in (ROOT / part / folder).rglob("*.py"))
    assert paths, folder
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


@pytest.mark.parametrize("folder", CLEAN)
def test_no_docstring_begins_with_a_pronoun(folder: str) -> None:
    texts = [(file, *each) for file, tree in files_of(folder).items() for each in docstrings(tree)]
    assert [f"{file}:{line}: {text}" for file, line, text in texts if text.split()[0] in PRONOUNS] == []


@pytest.mark.parametrize("folder", CLEAN)
def test_nothing_is_named_after_having_been_had(folder: str) -> None:
    names = [(file, *each) for file, tree in files_of(folder).items() for each in bindings(tree)]
    had = [each for each in names if each[2] in HAVING and (each[0], each[2]) not in ON_DISK]
    assert [f"{file}:{line}: {name}" for file, line, name in had] == []


def test_every_binding_is_seen() -> None:
    code = """
import a as found
def kept(taken, *made, **found): self.kept = [taken for taken in made]
lambda made: (found := 1)
try: pass
except E as kept: pass
match x:
    case [made, *taken]: pass
"""
    assert sorted(name for _, name in bindings(ast.parse(code)) if name in HAVING) == sorted(
        ["found", "kept", "taken", "made", "found", "kept", "taken", "made", "found", "kept", "made", "taken"]
    )
