"""Fixtures of the readers of models."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers_folders import saved, transformer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(transformer(), tmp_path / "tiny")
