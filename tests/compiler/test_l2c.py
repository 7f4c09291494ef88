"""Learning-to-Cache compiled: several segments, its two ends, and what is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.compiler.options import CompileOptions
from ditc.compiler.planning import make_plan
from ditc.exporter.dit import DiT
from ditc.exporter.router_files import write_routers
from ditc.program import AHEAD, FULL, REUSE
from ditc.routers import Routers
from ditc.runtime.pipeline import Pipeline
from tests.compiler.test_smoothcache import rows_of

LABELS = [0, 3, 1, 4]


def test_every_row_that_differs_is_a_segment(bundles: Mapping[str, Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fp32-l2c", "l2c"):
        program = bundles[name].manifest.program
        assert rows_of(bundles[name]) == ["###.#.", "#.###.", "#.#.#.", "#.###."]
        names = [step.segment for step in program.steps]
        assert len({*names}) == 4
        assert names[::2] == [FULL] * 3
        assert names[5] == REUSE
    assert run(["inspect", str(bundles["l2c"].path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["policy"].endswith("routers.pt:0.5:3")


def test_another_router_gives_another_result(pipes: dict[str, Pipeline]) -> None:
    routed, cached, none = (pipes[f"fp32-{name}"].latents(LABELS, seed=3) for name in ("l2c", "cached", "none"))
    assert not np.allclose(routed, cached)
    assert not np.allclose(routed, none)


def test_at_theta_0_it_is_the_uncached_result_and_at_1_that_of_every_other_step(pipes: dict[str, Pipeline]) -> None:
    for routed, same in (("fp32-l2c-0", "fp32-none"), ("fp32-l2c-1", "fp32-cached")):
        one, other = (pipes[name].latents(LABELS, seed=3) for name in (routed, same))
        assert np.array_equal(one, other)
    assert pipes["fp32-l2c-1"].bundle.manifest.program.segment(FULL).writes == (f"{AHEAD}.1",)


def test_rows_are_merged_to_four_segments_unless_asked_otherwise(
    make_small_model: Callable[..., DiT], quick_options: CompileOptions, tmp_path: Path
) -> None:
    model = make_small_model(depth=6)
    rows = (3 * torch.randn(20, 12, generator=torch.Generator().manual_seed(0))).tolist()
    write_routers(tmp_path / "r.pt", Routers(tuple(map(tuple, rows)), model.spec.branches))
    for argument, most in (("", 4), (":0.4:1", 1), (":0.4:7", 7), (":0.4:10", 10)):
        options = quick_options.model_copy(update={"policy": f"l2c:{tmp_path / 'r.pt'}{argument}", "steps": 20})
        plan = make_plan(model, options)
        assert len({step.segment for step in plan.program.steps} - {FULL}) == most
        assert plan.options.policy.endswith(argument or ":0.1:4")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("l2c", "policy l2c needs FILE[:THETA[:SEGMENTS]]"),
        ("l2c:{file}:1.5", "policy l2c needs FILE[:THETA[:SEGMENTS]]"),
        ("l2c:absent.pt", "no such file of routers: absent.pt"),
        ("l2c:{file}:half", "no such file of routers: {file}:half"),
        ("l2c:{file}", "has routers for 6 steps, the sampler takes 50; set --steps 6"),
        ("l2c:{file} --steps 6", "has routers for 4 branches, digits has 12, blocks.0.attn, "),
        ("l2c:{text}", "is a text file"),
    ],
)
def test_what_cannot_be_is_one_line(
    policy: str, said: str, small_routers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "t" / "notes.txt"
    text.parent.mkdir()
    text.write_text("theta: 0.1")
    asked, *options = policy.format(file=small_routers, text=text).split()
    assert run(["compile", "digits", "-o", str(tmp_path / "b"), "--policy", asked, *options]) == 2
    refused = capsys.readouterr().err
    assert said.format(file=small_routers) in refused
    assert refused.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
