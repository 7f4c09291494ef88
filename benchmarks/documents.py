"""Names that documents of another revision have and today's no longer, and the number of words of each document.

    python benchmarks/documents.py main     figures, options and files that no document names any more, by document
    python benchmarks/documents.py --words  words of each document, as `wc -w` counts them

A figure is a number with a unit or with two digits and more; a file is known by its name without the folder. What is
named anywhere today, in a document or in a table that a script wrote, is not lost.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
# documents, and tables that scripts write beside their figures
PLACES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/adr/*.md", "benchmarks/**/*.md", "exporter/*.md")
UNITS = (
    "%|dB|ns|ms|s|seconds|minutes|hours|KB|MB|GB|KiB|MiB|GiB|GOP/s|GFLOP/s|GFLOP|x|times|images|points|steps|bits|blocks"
    "|cores|threads|layers|levels|values|pixels|rows|tokens|trials|classes|seeds"
)
FIGURE = re.compile(rf"(?<![\w.:/-])[+-]?(\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)(?:\s{{0,4}}({UNITS})(?![\w/]))?(?![\w]|\.\d)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
FILE = re.compile(r"[\w-]+(?:\.[\w-]+)*\.(?:py|json|md|npz|onnx|sh|css|svg|png|safetensors|toml)\b|\bditc(?:\.\w+)+")
Documents = Mapping[str, str]


def figures(text: str) -> set[str]:
    """Return the figures in a text, each with its unit where it has one."""
    pairs = {(number.replace(",", ""), unit) for number, unit in FIGURE.findall(text)}
    return {
        f"{number} {unit}".strip() for number, unit in pairs if unit or len(re.sub(r"\D", "", number.lstrip("0."))) > 1
    }


def options(text: str) -> set[str]:
    """Return the command-line options in a text."""
    return set(OPTION.findall(text))


def files(text: str) -> set[str]:
    """Return the names of files, without their folders, and of modules in a text."""
    return set(FILE.findall(text))


NAMES: Mapping[str, Callable[[str], set[str]]] = {"figures": figures, "options": options, "files and modules": files}


def lost(before: Documents, today: Documents) -> dict[str, dict[str, list[str]]]:
    """Return by document and kind what `before` named and none of `today` does; those without loss are left out."""
    now = {kind: set().union(*map(names, today.values())) for kind, names in NAMES.items()}
    bare = {figure.split()[0] for figure in now["figures"]}
    now["figures"] |= bare  # a number that has a unit today may have had none
    losses = {
        name: {kind: sorted(missing) for kind, names in NAMES.items() if (missing := names(text) - now[kind])}
        for name, text in before.items()
    }
    return {name: kinds for name, kinds in losses.items() if kinds}


def documents_today() -> dict[str, str]:
    """Return the documents of the working tree by their paths."""
    paths = sorted({path for place in PLACES for path in ROOT.glob(place)})
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def documents_of(revision: str) -> dict[str, str]:
    """Return the documents of a revision by their paths."""
    pathspecs = [f":(glob){place}" for place in PLACES]
    listed = git("ls-tree", "-r", "--name-only", revision).split()
    known = set(git("ls-files", "--with-tree", revision, "--", *pathspecs).split())
    return {path: git("show", f"{revision}:{path}") for path in listed if path in known}


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def words(documents: Documents) -> list[str]:
    """Return a line for each document with its words, and one with their sum."""
    counts = {name: len(text.split()) for name, text in documents.items()}
    return [*(f"{count:7,}  {name}" for name, count in counts.items()), f"{sum(counts.values()):7,}  in all"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("revision", nargs="?", help="list what its documents named and today's do not")
    parser.add_argument("--words", action="store_true", help="count the words of README.md and docs/")
    arguments = parser.parse_args()
    if not arguments.words and arguments.revision is None:
        parser.error("expected a revision, or --words")
    today = documents_today()
    if arguments.words:
        print("\n".join(words({n: text for n, text in today.items() if n == "README.md" or n.startswith("docs/")})))
    if arguments.revision is not None:
        for name, kinds in lost(documents_of(arguments.revision), today).items():
            print(f"\n{name}")
            for kind, missing in kinds.items():
                print(f"  {kind}: {', '.join(missing)}")


if __name__ == "__main__":
    main()
