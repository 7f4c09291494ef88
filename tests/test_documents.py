"""The documents name files that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ditc.folders import FOLDERS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/adr/*.md", "benchmarks/**/*.md", "exporter/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # which tells of what was
)
PLACES = ("core", *FOLDERS, "tests", "benchmarks", "docs")
NAMED = re.compile(rf"`((?:{'|'.join(PLACES)})/[\w/.-]+\.(?:py|md|json|css|onnx|svg|png))`")
LINKED = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)")
ANCHORED = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+?)\s*$", re.MULTILINE)
MOST_WORDS = 34_000  # of README.md and docs/, as `wc -w` counts them: what is said is said once


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_or_linked_is_there(document: Path) -> None:
    text = document.read_text()
    named = {name for name in NAMED.findall(text) if not (ROOT / name).exists()}
    linked = {name for name in LINKED.findall(text) if not (document.parent / name).exists()}
    assert named | linked == set()


def test_every_test_that_is_named_is_there() -> None:
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    named = {name for document in DOCUMENTS for name in re.findall(r"`(test_\w+\.py)`", document.read_text())}
    assert named - there == set()


def anchors_of(text: str) -> set[str]:
    """Return the names of the headings of a document in links, as GitHub makes them; a second one of a name has -1."""
    names: list[str] = []
    for heading in HEADING.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.append(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    return {
        f"{name}-{names[:place].count(name)}" if name in names[:place] else name for place, name in enumerate(names)
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_heading_that_is_linked_is_there(document: Path) -> None:
    linked = {
        (name, anchor): document.parent / name if name else document
        for name, anchor in ANCHORED.findall(document.read_text())
    }
    missing = {key for key, place in linked.items() if key[1] not in anchors_of(place.read_text())}
    assert missing == set()


def test_a_heading_is_linked_as_it_reads() -> None:
    text = "# A\n## What is verified, and what isn't\n```\n# no heading\n```\n## `--x` of [y](z.md)\n## A\n"
    assert anchors_of(text) == {"a", "what-is-verified-and-what-isnt", "--x-of-y", "a-1"}


def test_the_documents_are_short() -> None:
    documents = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    assert sum(len(document.read_text().split()) for document in documents) <= MOST_WORDS


def absolute_paths(value: Any) -> list[str]:
    """The texts in a JSON value that name a place on one machine."""
    if isinstance(value, str):
        return [value] if re.search(r"(?:^|[\s:=])(?:/|~/|[A-Za-z]:\\)\w", value) else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [path for part in parts for path in absolute_paths(part)]


@pytest.mark.parametrize("figures", sorted(ROOT.glob("benchmarks/**/*.json")), ids=lambda path: path.name)
def test_figures_name_no_place_on_the_machine_that_took_them(figures: Path) -> None:
    assert absolute_paths(json.loads(figures.read_text())) == []


def test_modules_that_are_named_can_be_found() -> None:
    modules = set()
    for document in DOCUMENTS:
        modules |= set(re.findall(rf"`ditc\.((?:{'|'.join(FOLDERS)})\.\w+)", document.read_text()))
        modules |= set(re.findall(r"-m ditc\.([\w.]+)", document.read_text()))
    places = {name: ROOT / name.replace(".", "/") for name in modules}
    missing = {name for name, place in places.items() if not (place.with_suffix(".py").exists() or place.is_dir())}
    assert missing == set()


def test_the_readme_has_every_folder() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+)/` \|", readme, re.MULTILINE)
    assert listed == ["core", *FOLDERS]


def test_every_package_at_the_top_is_in_the_list_of_folders() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {"core", *FOLDERS}
