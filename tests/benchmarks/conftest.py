"""Scripts of the quality experiment as modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture(scope="module")
def results() -> Iterator[ModuleType]:
    """The script that writes the pages; while it is open, those beside it can be imported too."""
    before = set(sys.modules)
    sys.path.insert(0, str(QUALITY))
    import results as module

    yield module
    sys.path.remove(str(QUALITY))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or ".").parent == QUALITY:
            del sys.modules[name]
