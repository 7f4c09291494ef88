"""Names that `benchmarks/documents.py` finds lost between two states of the documents."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "documents.py"


@pytest.fixture(scope="module")
def documents() -> ModuleType:
    spec = spec_from_file_location("documents_compared", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_figure_has_a_unit_or_two_digits(documents: ModuleType) -> None:
    text = "N = 3 takes 5 % longer, 1,000\n  images, 0.25 and 0.3, -1.5 dB, 2^-14; see 0007 and v1.2.3"
    assert documents.figures(text) == {"5 %", "1000 images", "0.25", "1.5 dB", "14"}


def test_options_and_files_are_found_in_prose_and_in_commands(documents: ModuleType) -> None:
    text = "`--float-steps FIRST:LAST`, a -- b; `core/folders.py`, python -m ditc.cli, [x](../docs/cli.md#top)"
    assert documents.options(text) == {"--float-steps"}
    assert documents.files(text) == {"folders.py", "ditc.cli", "cli.md"}


def test_what_no_document_names_any_more_is_lost_and_what_moved_is_not(documents: ModuleType) -> None:
    before = {"a.md": "5 %, 12 dB, 99, `--gone`, `x/left.py`", "b.md": "--stays"}
    today = {"c.md": "12 dB, --stays, 99 images"}
    assert documents.lost(before, today) == {
        "a.md": {"figures": ["5 %"], "options": ["--gone"], "files and modules": ["left.py"]}
    }


def test_words_are_counted_by_document_and_in_all(documents: ModuleType) -> None:
    assert documents.words({"a.md": "| one | two |", "b.md": "three\n"}) == [
        "      5  a.md",
        "      1  b.md",
        "      6  in all",
    ]
