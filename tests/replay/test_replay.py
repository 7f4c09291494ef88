"""The replay's own check in every run: a small model compiles to the programs, settings and graphs that were reviewed.

The numbers in them are a processor's matter; `replay.py` compares those, between two commits on one machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from graph_text import graph_text
from replay import differences

from ditc.bundle import Bundle, read_tables, seal_bundle, write_tables

KEPT = Path(__file__).with_name("digests.json")
TEXTS = ("program", "reference_program", "settings")


def digests_of(bundle: Bundle) -> dict[str, str]:
    """Return a digest of each text that no processor decides."""
    manifest = bundle.manifest.model_dump(mode="json")
    texts = {part: json.dumps(manifest[part], sort_keys=True) for part in TEXTS}
    graphs = {name: graph_text(bundle.path / name) for name in bundle.manifest.files if name.endswith(".onnx")}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in {**texts, **graphs}.items()}


@pytest.mark.parametrize("name", ["float-ends"])
def test_a_small_model_compiles_to_what_was_reviewed(name: str, bundles: dict[str, Bundle]) -> None:
    digests = {name: digests_of(bundles[name])}
    if os.environ.get("GOLDEN") == "write":
        KEPT.write_text(json.dumps(digests, indent=1) + "\n")
    assert digests == json.loads(KEPT.read_text()), "if it is meant, GOLDEN=write pytest tests/golden tests/replay"


def test_the_replay_finds_no_difference_where_there_is_none(bundles: dict[str, Bundle]) -> None:
    assert list(differences(bundles["cached"].path, bundles["cached"].path)) == []


def test_the_replay_names_what_differs(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    told = "\n".join(differences(bundles["cached"].path, bundles["fp32-branches"].path))
    for name in ("program", "settings", "precision", "segments/full.onnx:\n", "calib/calib.npz: gone"):
        assert name in told


def test_the_replay_sees_one_other_number(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundles["cached"].path, tmp_path / "b"))
    tables = read_tables(folder / "tables.safetensors")
    tables["sampler.sigma"] = np.nextafter(tables["sampler.sigma"], 1)
    write_tables(folder / "tables.safetensors", tables)
    seal_bundle(folder, bundles["cached"].manifest)
    assert list(differences(bundles["cached"].path, folder)) == ["tables.safetensors: other numbers"]
