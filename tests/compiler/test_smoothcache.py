"""SmoothCache compiled: schedules whose kinds of branches differ, from the statistics to what runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ditc
from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler.driver import compile_model
from ditc.compiler.options import CompileOptions
from ditc.exporter.dit import DiT
from ditc.passes import NoSumsError

# of the small model over 6 steps: attention and the MLPs have rows of their own
UNLIKE = "smoothcache:0.15"
ATTENTION, MLP = "###...", "##.#.."


def rows_of(bundle: Bundle) -> list[str]:
    """The schedule of each branch, # computed and . reused."""
    program = bundle.manifest.program
    rows = [program.segment(step.segment).compute for step in program.steps]
    return ["".join("#" if cell else "." for cell in column) for column in zip(*rows, strict=True)]


@pytest.fixture(scope="module")
def compiled(
    compiled_once: Callable[..., Bundle], make_small_model: Callable[[], DiT], quick_options: CompileOptions
) -> Callable[..., Bundle]:
    """Compiles the small model with some settings."""

    def compiled_with(**changes: Any) -> Bundle:
        return compiled_once(make_small_model(), quick_options.model_copy(update=changes))

    return compiled_with


def test_kinds_with_rows_of_their_own_become_a_segment_for_each_distinct_row(
    compiled: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = compiled(policy=UNLIKE)
    program = bundle.manifest.program
    assert rows_of(bundle) == [ATTENTION, MLP, ATTENTION, MLP]
    names = [step.segment.split("-")[0] for step in program.steps]
    assert names == ["full", "full", "row", "row", "reuse", "reuse"]
    assert len(program.segments) == 4
    assert program.slots == 4  # branches are kept one by one
    assert run(["inspect", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert f"  blocks.0.attn  {ATTENTION}\n  blocks.0.mlp   {MLP}\n" in shown
    assert "watched          10 FP images; change from step to step: attn " in shown
    assert '  policy           "smoothcache:0.15"' in shown


def test_int8_runs_and_stays_near_fp_under_rows_that_differ(
    compiled: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = compiled(policy=UNLIKE)
    verified = bundle.manifest.measured("verify").verify
    assert verified is not None
    assert max(verified.relative_error[:2]) < 0.02  # everything computes there; what a cache costs comes after
    with ditc.load(bundle.path) as pipe:
        assert np.array_equal(pipe.images([0, 1], seed=3), pipe.images([0, 1], seed=3))
    commands = (
        f"verify {bundle.path} --images 2",
        f"run {bundle.path} --labels 1 -o {tmp_path / 'images'}",
        f"report {bundle.path} --images 1 --requests 1 -o {tmp_path / 'r.html'}",
    )
    for command in commands:
        assert run(command.split()) == 0, capsys.readouterr().err
    page = (tmp_path / "r.html").read_text()
    assert "smoothcache:0.15" in page
    assert "watch.images" in page


def test_an_alpha_of_0_is_no_cache_bit_for_bit(compiled: Callable[..., Bundle]) -> None:
    fp = {"precision": "fp32", "vc": "none"}
    bundle, uncached = (compiled(policy=policy, **fp) for policy in ("smoothcache:0", "none"))
    assert bundle.manifest.program == uncached.manifest.program
    assert {n: f.sha256 for n, f in bundle.manifest.files.items()} == {
        n: f.sha256 for n, f in uncached.manifest.files.items()
    }
    with ditc.load(bundle.path) as one, ditc.load(uncached.path) as other:
        assert np.array_equal(one.images([0, 4], seed=2), other.images([0, 4], seed=2))


def test_an_alpha_that_nothing_reaches_is_fora_of_four(compiled: Callable[..., Bundle]) -> None:
    """Sums are made ahead there, and all that comes after is the same."""
    fp = {"precision": "fp32", "vc": "none"}
    bundle, fora = (compiled(policy=policy, **fp) for policy in ("smoothcache:1e9", "fora:4"))
    assert bundle.manifest.program == fora.manifest.program
    assert {n: f.sha256 for n, f in bundle.manifest.files.items()} == {
        n: f.sha256 for n, f in fora.manifest.files.items()
    }


def test_two_compiles_give_the_same_bytes(
    compiled: Callable[..., Bundle],
    make_small_model: Callable[[], DiT],
    quick_options: CompileOptions,
    tmp_path: Path,
) -> None:
    """The second one watches again."""
    bundle = compiled(policy=UNLIKE)
    options = quick_options.model_copy(update={"policy": UNLIKE})
    again = compile_model(make_small_model(), tmp_path / "again", options)
    assert (again.path / "manifest.json").read_bytes() == (bundle.path / "manifest.json").read_bytes()


def test_extrapolating_is_refused_where_rows_differ_and_does_not_watch_again_after(
    make_small_model: Callable[[], DiT], quick_options: CompileOptions, tmp_path: Path
) -> None:
    options = quick_options.model_copy(update={"policy": UNLIKE, "reuse": "taylor", "vc": "none"})
    with pytest.raises(NoSumsError, match="--reuse taylor works on sums made ahead"):
        compile_model(make_small_model(), tmp_path / "b", options)
    assert not (tmp_path / "b").exists()
    assert [path.name.split("-")[0] for path in (tmp_path / ".b.work").iterdir() if path.is_dir()] == ["watch"]


@pytest.mark.parametrize("policy", ["smoothcache", "smoothcache:", "smoothcache:-1", "smoothcache:much"])
def test_an_argument_that_is_no_number_is_one_line(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", "digits", "-o", str(tmp_path / "b"), "--policy", policy]) == 2
    refused = capsys.readouterr().err
    assert "policy smoothcache needs ALPHA >= 0" in refused
    assert refused.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_images_to_watch_without_a_policy_that_looks_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", "digits", "-o", str(tmp_path / "b"), "--watch-images", "4"]) == 2
    assert capsys.readouterr().err == (
        "ditc: --watch-images 4 is for a policy that looks at FP images first, and --policy fora:3 looks at none; "
        "leave it out, or choose one of: smoothcache, dps\n"
    )
    assert not list(tmp_path.iterdir())
