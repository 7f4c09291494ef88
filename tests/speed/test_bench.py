"""`ditc bench`: what it measures adds up, and its traces name layers of the graph that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ditc.bundle import Bundle
from ditc.cli.main import run
from ditc.engines.onnxrt import OnnxRuntimeBackend
from ditc.errors import InputError
from ditc.speed.latency import latency_of, with_spread
from ditc.speed.tracing import profile_rows


def test_latency_says_how_often_and_how_far_it_spread() -> None:
    latency = latency_of([3.0, 1.0, 2.0, 2.0, 10.0])
    assert (latency.n, latency.median, latency.least, latency.most) == (5, 2.0, 1.0, 10.0)
    assert latency.p90 == pytest.approx(7.2)
    assert with_spread(latency).spread == pytest.approx(2.6)
    with pytest.raises(InputError, match="no call was measured"):
        latency_of([])


def test_a_profile_adds_up_to_the_whole() -> None:
    count, *rows = profile_rows({"a": [1.0, 3.0], "b": [2.0, 2.0]})
    assert count == {"count": 2}
    assert [row["percentage"] for row in rows] == [50, 50]
    assert rows[0] == {"name": "a", "timeMs": 4, "averageMs": 2, "medianMs": 2, "percentage": 50}


def test_bench_counts_every_call_and_traces_the_layers(
    bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, folder = bundles["cached"].path, tmp_path / "trace"
    before = sorted(path.name for path in (bundle / "segments").iterdir())
    command = f"bench {bundle} --requests 3 --warmup 0 --trace {folder} --json"
    assert run(command.split()) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["request"]["n"] == 3
    assert printed["arithmetic"] == OnnxRuntimeBackend().arithmetic(8).model_dump()
    assert {name: times["n"] for name, times in printed["segments"].items()} == {
        "condition": 3,
        "full": 9,
        "reuse": 9,
    }
    shares = sum(times["share"] for times in printed["segments"].values()) + printed["outside_engines"]["share"]
    assert shares == pytest.approx(1)
    assert [(s["index"], s["segment"]) for s in printed["steps"]] == list(enumerate(["full", "reuse"] * 3))
    assert all(0 < step["engine_seconds"] < step["seconds"] for step in printed["steps"])
    outside, medians = printed["outside_engines"], {name: s["median"] for name, s in printed["segments"].items()}
    assert outside["n"] == 18
    assert outside["least"] <= outside["seconds_per_step"] <= outside["most"]
    assert medians["condition"] + 3 * (medians["full"] + medians["reuse"]) < 3 * printed["request"]["most"]
    assert printed["seconds_per_image"] == pytest.approx(printed["request"]["median"] / 4)
    assert json.loads((folder / "bench.json").read_text()) == printed
    layers = json.loads((folder / "layers_full.json").read_text())["Layers"]
    _, *rows = json.loads((folder / "profile_full.json").read_text())
    assert {row["name"] for row in rows} <= {layer["Name"] for layer in layers}
    integer = {layer["Metadata"] for layer in layers if layer["LayerType"] == "MatMulIntegerToFloat"}
    assert {"blocks.0.attn.qkv", "blocks.1.mlp.fc1"} <= integer
    assert sorted(path.name for path in (bundle / "segments").iterdir()) == before


def test_a_slower_bundle_than_allowed_fails(bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    bundle = bundles["cached"].path
    assert run(f"bench {bundle} --requests 1 --warmup 0 --max-seconds 0.000001".split()) == 1
    assert "allowed are 1e-06 s (--max-seconds)" in capsys.readouterr().err
    assert run(f"bench {bundle} --requests 0".split()) == 2


def test_bench_says_what_is_spent_outside_the_engines(
    bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"bench {bundles['cached'].path} --requests 1 --warmup 0".split()) == 0
    assert re.search(r"outside the engines: [\d.]+ ms per step, [\d.]+% of the trajectory", capsys.readouterr().out)


@pytest.mark.parametrize(("name", "said"), [("cached", True), ("fp32-cached", False)])
def test_bench_says_in_which_form_integers_ran(
    name: str, said: bool, bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"bench {bundles[name].path} --requests 1 --warmup 0".split()) == 0
    assert ("INT8 on this CPU: exact" in capsys.readouterr().out) == said
