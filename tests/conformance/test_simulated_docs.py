"""The CI recipes of docs/ci.md: they parse, and their commands run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ditc.cli.main import cli, run

ROOT = Path(__file__).parents[2]
RECIPES = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), flags=re.DOTALL)


def ditc_commands(recipe: str) -> list[list[str]]:
    lines = [line.strip().removeprefix("- ").removeprefix("run: ") for line in recipe.splitlines()]
    return [shlex.split(line.split(">")[0])[1:] for line in lines if line.startswith("ditc ")]


@pytest.mark.any_version
@pytest.mark.parametrize("recipe", RECIPES, ids=["github", "gitlab"])
def test_the_recipes_of_the_docs_run(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], built: Any
) -> None:
    assert isinstance(yaml.safe_load(recipe), dict)
    commands = ditc_commands(recipe)
    assert [command[0] for command in commands] == ["compile", "build", "build", "verify"]
    cli.commands["compile"].make_context("compile", commands[0][1:])  # its options exist; it runs in other tests
    shutil.copytree(built["digits"], tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    monkeypatch.chdir(tmp_path)
    for command in commands[1:]:
        capsys.readouterr()
        assert run(command) == 0, command
        json.loads(capsys.readouterr().out)
