"""Law 6: a bundle that contradicts itself is refused, naming the contradiction, or what was changed changes nothing.

Every field of the programs in a manifest and every table is changed in turn, in each of the ways below, and the hashes
are made to match again, as someone would who can hash.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditc.bundle import Bundle, Manifest, open_bundle, read_tables, write_tables
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.errors import BundleError
from ditc.runtime.pipeline import load
from tests.models.token_mixer import MODELS

SHOWN = 23  # of the manifests that open, every so many are inspected
KINDS = ("cached", "float-ends", "fp32-taylor", "fp32-taylor-3", "fp32-branches", "streams-rows")
Place = tuple[Any, ...]  # keys and numbers that lead to a value
Change = tuple[str, Any]  # what was done to a value, and what it then is


def other_numbers(value: int | float) -> Iterator[Change]:
    for other in (value + 1, value - 1, -value - 1, value * 2 + 3, 10**30, float("nan"), float("inf")):
        yield f"{other}", other


def changes_of(value: Any) -> Iterator[Change]:
    """A value's other types, its neighbours, and what it is with a part gone, twice, swapped or renamed."""
    yield from (("null", None), ("text", "other"), ("list", []), ("dict", {}), ("float", 0.5))
    if isinstance(value, bool):
        yield "flipped", not value
    elif isinstance(value, (int, float)):
        yield from other_numbers(value)
    elif isinstance(value, str):
        yield from (("empty", ""), ("longer", value + "x"), ("dotted", f"../{value}"), ("broken", "\ud800\n"))
    elif isinstance(value, list):
        yield from list_changes(value)
    elif isinstance(value, dict):
        yield from dict_changes(value)


def list_changes(value: list[Any]) -> Iterator[Change]:
    for place in range(len(value)):
        yield f"without {place}", [*value[:place], *value[place + 1 :]]
        yield f"twice {place}", [*value[: place + 1], *value[place:]]
    for place in range(len(value) - 1):
        yield f"swapped {place}", [*value[:place], value[place + 1], value[place], *value[place + 2 :]]
    yield "longer", [*value, "other"]


def dict_changes(value: dict[str, Any]) -> Iterator[Change]:
    for key in value:
        yield f"without {key}", {name: part for name, part in value.items() if name != key}
        yield f"renamed {key}", {name if name != key else f"{key}x": part for name, part in value.items()}
    for first, second in zip(value, [*value][1:], strict=False):
        yield f"swapped {first}", {**value, first: value[second], second: value[first]}
    yield "longer", {**value, "other": 1}


def values_in(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where every value lies in a JSON value, itself first."""
    yield place
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from values_in(part, (*place, key))


def at(root: Any, place: Place) -> Any:
    for key in place:
        root = root[key]
    return root


def with_changed(root: Any, place: Place, value: Any) -> Any:
    changed = deepcopy(root)
    at(changed, place[:-1])[place[-1]] = value
    return changed


def mutations(manifest: Any, *starts: str) -> Iterator[tuple[str, Any]]:
    """(what was changed, the manifest with it) for every value under some of its fields."""
    for start in starts:
        for place in values_in(manifest[start], (start,)):
            for change, value in changes_of(at(manifest, place)):
                if value != at(manifest, place) or type(value) is not type(at(manifest, place)):
                    yield f"{'.'.join(map(str, place))}: {change}", with_changed(manifest, place, value)


LENGTH = 1 << 15  # of every manifest: files that keep their length are written much faster


def sealed(folder: Path, manifest: Any) -> None:
    text = json.dumps(manifest).encode().ljust(LENGTH)
    assert len(text) == LENGTH
    seal = sha256(text).hexdigest().encode() + b"\n"
    for name, data in (("manifest.json", text), ("manifest.sha256", seal)):
        with (folder / name).open("r+b") as file:
            file.write(data)


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_bytes())


def is_refused(folder: Path) -> bool:
    """Is a bundle refused, in one line? Any other exception fails the test."""
    message = ""
    try:
        open_bundle(folder)
    except BundleError as e:
        message = str(e)
    assert "\n" not in message
    return str(folder) in message


def latents_of(folder: Path, **settings: Any) -> Any:
    with load(folder, **settings) as pipe:
        classes = pipe.bundle.manifest.model.num_classes
        return pipe.latents([0, 3, 1] if classes else pipe.bundle.examples().in_turn(0, 3), seed=5)


def same_bundle(manifest: Any, other: Any) -> bool:
    """Do two manifests say the same once they are read?"""
    return Manifest.model_validate(manifest) == Manifest.model_validate(other)


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, bundles: dict[str, Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles[request.param].path, tmp_path / "b"))


@pytest.fixture
def cached(bundles: dict[str, Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["cached"].path, tmp_path / "b"))


def check_changes(folder: Path, *fields: str, reference: bool = False) -> int:
    """Each changed manifest is refused, or its images are those of the one that was compiled; how many were refused."""
    manifest, refused = manifest_of(folder), 0
    expected = latents_of(folder, reference=reference)
    for change, changed in mutations(manifest, *fields):
        sealed(folder, changed)
        if is_refused(folder):
            refused += 1
        elif not same_bundle(changed, manifest):
            np.testing.assert_array_equal(latents_of(folder, reference=reference), expected, err_msg=change)
    return refused


def test_a_changed_program_is_refused_or_gives_the_same_images(folder: Path) -> None:
    assert check_changes(folder, "program", "precision", "guidance", "batch") > 900


def test_a_changed_reference_program_is_refused_or_gives_the_same_images(cached: Path) -> None:
    assert check_changes(cached, "reference_program", reference=True) > 500


@pytest.mark.parametrize("fields", [("model",), ("files",), ("settings",), ("versions",), ("checks",)])
def test_whatever_else_a_manifest_says_no_other_exception_comes_of_it(
    cached: Path, fields: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = manifest_of(cached)
    for number, (change, changed) in enumerate(mutations(manifest, *fields)):
        sealed(cached, changed)
        if not is_refused(cached) and number % SHOWN == 0:
            assert run(["inspect", str(cached)]) in (0, 2), change
            assert capsys.readouterr().err.count("\n") <= 1, change


def table_changes(table: Any) -> Iterator[Change]:
    """Other types and shapes of a table, and numbers that are none."""
    with np.errstate(invalid="ignore"):  # infinity is no whole number
        yield from [(kind, table.astype(kind)) for kind in ("float16", "float32", "float64", "int64", "bool")]
    yield from (("a step less", table[:-1]), ("a step more", np.concatenate([table, table[-1:]])))
    yield from (("nothing", table[:0]), ("flat", table.reshape(-1)), ("deeper", table[..., None]))
    yield from (("turned", np.ascontiguousarray(table.T)), ("wider", np.stack([table, table], axis=-1)))
    for number in (np.nan, np.inf, -np.inf):
        changed = table.copy()
        changed.flat[-1] = number
        yield f"{number}", changed


def tables_with_a_change(tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, table in tables.items():
        rest = {other: values for other, values in tables.items() if other != name}
        yield f"without {name}", rest
        yield f"renamed {name}", {**rest, f"{name}x": table}
        yield f"again {name}", {**tables, f"{name}x": table}
        for change, changed in table_changes(table):
            if changed.dtype != table.dtype or not np.array_equal(changed, table):
                yield f"{name}: {change}", {**rest, name: changed}
    for first, second in combinations(sorted(tables), 2):
        yield f"swapped {first}, {second}", {**tables, first: tables[second], second: tables[first]}
    for name in filter(lambda name: name.startswith("sampler."), tables):
        yield f"two steps of {name}", {**tables, name: tables[name][[0, 2, 1, *range(3, len(tables[name]))]]}


def with_tables(folder: Path, manifest: Any, tables: dict[str, Any]) -> None:
    """The tables in their file, and its hash in the manifest."""
    file = folder / "tables.safetensors"
    write_tables(file, tables)
    data = file.read_bytes()
    entry = {"sha256": sha256(data).hexdigest(), "size_bytes": len(data)}
    sealed(folder, {**manifest, "files": {**manifest["files"], file.name: entry}})


@pytest.fixture
def clocked(compiled_once: Callable[..., Bundle], quick_options: CompileOptions, tmp_path: Path) -> Path:
    """A bundle with a table that depends on the timestep alone."""
    options = quick_options.model_copy(update={"policy": "fora:2", "precision": "fp32", "vc": "none"})
    return Path(shutil.copytree(compiled_once(MODELS["clocked"](), options).path, tmp_path / "clocked"))


def test_changed_tables_of_timesteps_are_refused_or_give_the_same_images(clocked: Path) -> None:
    tables = read_tables(clocked / "tables.safetensors")
    check_tables(clocked, {"step.modulation": tables["step.modulation"]}, least=10)


def test_changed_tables_are_refused_or_give_the_same_images(folder: Path) -> None:
    check_tables(folder, read_tables(folder / "tables.safetensors"), least=100)


def check_tables(folder: Path, own: dict[str, Any], least: int) -> None:
    """Change some of a bundle's tables: it is refused, at least so many times, or gives the same images."""
    manifest = manifest_of(folder)
    rest = {name: table for name, table in read_tables(folder / "tables.safetensors").items() if name not in own}
    expected, refused = latents_of(folder), 0
    for change, changed in tables_with_a_change(own):
        with_tables(folder, manifest, {**rest, **changed})
        if is_refused(folder):
            refused += 1
        else:
            np.testing.assert_array_equal(latents_of(folder), expected, err_msg=change)
    assert refused > least
